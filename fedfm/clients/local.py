"""The local update: what one client does in one round."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedfm import errors, trees
from fedfm.types import ClientUpdate, LossFn

PyTree = Any
# An optimizer, or a function of the round (a traced int32 scalar) that gives
# one: client learning rates may be scheduled over rounds.
ClientOptimizer = (
  optax.GradientTransformation
  | Callable[[jax.Array], optax.GradientTransformation]
)
WEIGHTINGS = ("examples", "tokens", "uniform")


class LocalState(NamedTuple):
  """A client in the middle of its work.

  Attributes:
    trainable: The client's weights.
    sent: The weights that it was sent, where a proximal term reads them; or ().
    optimizer: Local optimizer state.
    round: int32 scalar.
    loss_sum: Sum over steps of loss times count.
    count: Tokens (or examples, where the loss does not count tokens) so far.
  """

  trainable: PyTree
  sent: PyTree
  optimizer: PyTree
  round: jax.Array
  loss_sum: jax.Array
  count: jax.Array


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
  proximal: float = 0.0,
) -> ClientUpdate:
  """Builds the usual local update: steps of an optimizer from the sent weights.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    optimizer: Any optax optimizer (chain `optax.clip_by_global_norm` for
      gradient clipping), or a function of the round that returns one.
    weighting: Weight of the client: its "examples", the "tokens" that it
      trained on (the sum of `aux["tokens"]`), or "uniform".
    proximal: mu of FedProx: adds mu/2 |w - w_sent|^2 to the loss.

  Returns:
    A `ClientUpdate` whose message is the delta, trained minus sent.

  Raises:
    ConfigError: Unknown weighting, or a negative or non-finite mu.
  """
  if weighting not in WEIGHTINGS:
    raise errors.ConfigError(
      f"weighting: got {weighting!r}{errors.nearest(weighting, WEIGHTINGS)}"
    )
  if not 0 <= proximal < float("inf"):
    raise errors.ConfigError(
      f"proximal: got {proximal}, expected a finite number of at least 0"
    )
  grad_fn = jax.value_and_grad(loss, has_aux=True)

  def start(broadcast, client_state, info):
    del client_state
    optimizer_state = as_optimizer(optimizer, info.round).init(broadcast)
    zero = jnp.zeros((), _sum_dtype(broadcast))
    sent = broadcast if proximal else ()
    return LocalState(broadcast, sent, optimizer_state, info.round, zero, zero)

  def step(state, base, batch, key):
    (value, aux), grads = grad_fn(state.trainable, base, batch, key)
    if proximal:
      grads = jax.tree.map(
        lambda g, w, w0: g + proximal * (w - w0),
        grads,
        state.trainable,
        state.sent,
      )
    updates, optimizer_state = as_optimizer(optimizer, state.round).update(
      grads, state.optimizer, state.trainable
    )
    count = batch_count(batch, aux).astype(state.count.dtype)
    return state._replace(
      trainable=optax.apply_updates(state.trainable, updates),
      optimizer=optimizer_state,
      loss_sum=state.loss_sum + value.astype(state.count.dtype) * count,
      count=state.count + count,
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


def _sum_dtype(trainable: PyTree) -> Any:
  """float32, or float64 where the trainable is."""
  dtypes = [x.dtype for x in jax.tree.leaves(trainable)]
  return jnp.result_type(jnp.float32, *dtypes)
