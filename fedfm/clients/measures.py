"""What some algorithms measure while a client does its local steps."""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax

from fedfm import errors, trees
from fedfm.clients import local

PyTree = Any
_SHAPE = (3, 5)  # Of a made-up weight, to know its moments by.
_SMALL = 2.0**-20  # A gradient that no clipping touches; exact to scale by.


class RunningMean(NamedTuple):
  """A mean over batches, each counted by its examples or tokens.

  Examples:
    >>> mean = RunningMean.start(jnp.zeros(()))
    >>> mean.add(jnp.array(1.0), jnp.array(3)).add(jnp.array(5.0), 1).value()
    Array(2., dtype=float32)
  """

  total: PyTree
  count: jax.Array

  @classmethod
  def start(cls, like: PyTree) -> Self:
    """A mean over nothing yet, of trees shaped like `like`."""
    return cls(trees.zeros_like(like), jnp.zeros((), trees.sum_dtype(like)))

  def add(self, value: PyTree, count: jax.Array) -> Self:
    """Counts `value` as many times as `count` says."""
    total = jax.tree.map(
      lambda t, v: t + v.astype(t.dtype) * count, self.total, value
    )
    return self._replace(total=total, count=self.count + count)

  def value(self) -> PyTree:
    """The mean; over nothing it is zero."""
    return trees.scale(self.total, 1 / jnp.where(self.count, self.count, 1))


class RateState(NamedTuple):
  """The state of a measured optimizer.

  Attributes:
    inner: The optimizer's own.
    probe: Its state for a weight whose gradient is always the same.
    total: How far that weight has moved against its gradient, over it.
    steps: int32 scalar, how many steps it took.
  """

  inner: PyTree
  probe: PyTree
  total: jax.Array
  steps: jax.Array


def measure_rate(optimizer: local.ClientOptimizer) -> local.ClientOptimizer:
  """Adds up the learning rates of a client's steps, in `RateState.total`.

  That is how far a weight of gradient 1 moves: K eta for K steps of SGD of rate
  eta, the |a|_1 eta of FedNova for SGD with momentum, and right under any
  schedule. `ClientInfo.rate`, which multiplies updates later, is not in it.

  Args:
    optimizer: A client optimizer.

  Returns:
    The same optimizer, as a function of the round.
  """

  def at_round(round_index):
    inner = local.as_optimizer(optimizer, round_index)

    def init(params):
      zero = jnp.zeros((), trees.sum_dtype(params))
      steps = jnp.zeros((), jnp.int32)
      return RateState(inner.init(params), inner.init(zero), zero, steps)

    def update(updates, state, params=None):
      zero = jnp.zeros_like(state.total)
      moved, probe = inner.update(zero + _SMALL, state.probe, zero)
      updates, own = inner.update(updates, state.inner, params)
      total = state.total - jnp.asarray(moved) / _SMALL
      return updates, RateState(own, probe, total, state.steps + 1)

    return optax.GradientTransformation(init, update)

  return at_round


def check_sgd(optimizer: local.ClientOptimizer, algorithm: str) -> None:
  """Refuses optimizers that keep more than one moment a weight, as Adam does.

  Looks at shapes only. It cannot tell RMSProp's one moment from momentum's.

  Args:
    optimizer: A client optimizer.
    algorithm: Who needs SGD, for the message.

  Raises:
    ConfigError: More than one moment.
  """

  def state_of(weight, round_index):
    return local.as_optimizer(optimizer, round_index).init(weight)

  state = jax.eval_shape(
    state_of,
    jax.ShapeDtypeStruct(_SHAPE, jnp.float32),
    jax.ShapeDtypeStruct((), jnp.int32),
  )
  if sum(x.shape == _SHAPE for x in jax.tree.leaves(state)) > 1:
    raise errors.ConfigError(
      "client_optimizer: adapts the rate of each weight (as Adam does), but "
      f"{algorithm} takes SGD, with momentum at most"
    )
