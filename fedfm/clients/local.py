"""The local update: what one client does in one round."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedfm import errors, sums, trees
from fedfm.types import ClientUpdate, LossFn

PyTree = Any
# An optimizer, or a function of the round (a traced int32 scalar) that gives
# one: client learning rates may be scheduled over rounds.
ClientOptimizer = (
  optax.GradientTransformation
  | Callable[[jax.Array], optax.GradientTransformation]
)
Correction = Callable[[PyTree, PyTree, PyTree], PyTree]
WEIGHTINGS = ("examples", "tokens", "uniform")


class LocalState(NamedTuple):
  """A client in the middle of its work.

  Attributes:
    trainable: The client's weights.
    memory: What the correction of its gradients reads; or ().
    optimizer: Local optimizer state.
    round: int32 scalar.
    rate: float32 scalar, multiplies the learning rate.
    loss_sum: Sum over steps of loss times count.
    count: Tokens (or examples, where the loss does not count tokens) so far.
    lost: What rounding has added to these two too much; see `sums.add`.
  """

  trainable: PyTree
  memory: PyTree
  optimizer: PyTree
  round: jax.Array
  rate: jax.Array
  loss_sum: jax.Array
  count: jax.Array
  lost: tuple[jax.Array, jax.Array]


def as_optimizer(
  optimizer: ClientOptimizer, round_index: jax.Array
) -> optax.GradientTransformation:
  """Resolves an optimizer that may be a function of the round."""
  if isinstance(optimizer, optax.GradientTransformation):
    return optimizer
  return optimizer(round_index)


def batch_count(batch: PyTree, aux: PyTree) -> jax.Array:
  """Counts a batch: `aux["tokens"]` where the loss gives it, else examples."""
  if isinstance(aux, dict) and "tokens" in aux:
    return aux["tokens"]
  return jnp.sum(batch["mask"])


def check_weighting(weighting: str) -> None:
  """Raises ConfigError for an unknown weighting."""
  if weighting not in WEIGHTINGS:
    raise errors.ConfigError(
      f"weighting: got {weighting!r}{errors.nearest(weighting, WEIGHTINGS)}"
    )


def client_weight(weighting: str, info: Any, count: jax.Array) -> jax.Array:
  """The weight of a client in the mean, before its own multiplier.

  Args:
    weighting: "examples", "tokens" or "uniform".
    info: The client's `ClientInfo`.
    count: Tokens that the client trained on.

  Returns:
    float32 scalar.
  """
  if weighting == "tokens":
    return count
  if weighting == "examples":
    return info.num_examples.astype(jnp.float32)
  return jnp.ones((), jnp.float32)


def local_update(
  loss: LossFn,
  optimizer: ClientOptimizer,
  *,
  weighting: str = "examples",
  correction: Correction | None = None,
) -> ClientUpdate:
  """Builds the usual local update: steps of an optimizer from the sent weights.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    optimizer: Any optax optimizer (chain `optax.clip_by_global_norm` for
      gradient clipping), or a function of the round that returns one.
    weighting: Weight of the client: its "examples", the "tokens" that it
      trained on (the sum of `aux["tokens"]`), or "uniform".
    correction: `correction(grads, trainable, memory) -> grads`, the gradients
      that the optimizer gets in place of the loss's own. `memory` is what
      `start` was given as the client's state.

  Returns:
    A `ClientUpdate` whose message is the delta, trained minus sent.

  Raises:
    ConfigError: Unknown weighting.
  """
  check_weighting(weighting)
  grad_fn = jax.value_and_grad(loss, has_aux=True)

  def start(broadcast, memory, info):
    optimizer_state = as_optimizer(optimizer, info.round).init(broadcast)
    zero = jnp.zeros((), trees.sum_dtype(broadcast))
    return LocalState(
      trainable=broadcast,
      memory=memory if correction else (),
      optimizer=optimizer_state,
      round=info.round,
      rate=info.rate,
      loss_sum=zero,
      count=zero,
      lost=(zero, zero),
    )

  def step(state, base, batch, key):
    (value, aux), grads = grad_fn(state.trainable, base, batch, key)
    if correction:
      grads = correction(grads, state.trainable, state.memory)
    updates, optimizer_state = as_optimizer(optimizer, state.round).update(
      grads, state.optimizer, state.trainable
    )
    updates = trees.scale(updates, state.rate)
    count = batch_count(batch, aux).astype(state.count.dtype)
    loss = value.astype(state.count.dtype) * count
    loss_sum, lost_loss = sums.add(state.loss_sum, state.lost[0], loss)
    count, lost_count = sums.add(state.count, state.lost[1], count)
    return state._replace(
      trainable=optax.apply_updates(state.trainable, updates),
      optimizer=optimizer_state,
      loss_sum=loss_sum,
      count=count,
      lost=(lost_loss, lost_count),
    )

  def finish(broadcast, state, info):
    delta = trees.sub(state.trainable, broadcast)
    metrics = {
      "loss_sum": state.loss_sum,
      "count": state.count,
      "delta_norm": trees.norm(delta),
    }
    return delta, client_weight(weighting, info, state.count), (), metrics

  return ClientUpdate(start, step, finish)
