"""RoLoRA (Chen et al. 2025, arXiv 2502.01755): one factor at a time, in turns.

  even rounds (0, 2, ...)   A frozen:   B <- sum_i p_i B_i
  odd rounds                B frozen:   A <- sum_i p_i A_i

Exact in every round. B has the first turn: while B = 0 the gradient of A is 0.
A head, if there is one, is trained in every round.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedfm import trees
from fedfm.adapters import Adapter
from fedfm.algorithms import (
  algorithm,
  lora_metrics,
  low_rank,
  schedule_clock,
)
from fedfm.clients import local
from fedfm.types import Aggregator, ClientUpdate, FederatedAlgorithm, LossFn

PyTree = Any


class TurnsState(NamedTuple):
  """A server optimizer state for each part, and whose turn it is.

  A round that brings nothing does not count: the turn is taken again.
  """

  a: PyTree
  b: PyTree
  rest: PyTree
  b_has_turn: jax.Array  # shape=(), dtype=bool


def in_turns(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Steps A and B in turns, each with its own state; the rest in all rounds.

  Args:
    optimizer: Any optax transformation.

  Returns:
    An optax transformation for the whole trainable.
  """
  parts = {
    "a": low_rank.only(optimizer, "a", rest=False),
    "b": low_rank.only(optimizer, "b", rest=False),
    "rest": low_rank.only(optimizer, ""),
  }

  def init(params):
    states = {name: part.init(params) for name, part in parts.items()}
    return TurnsState(**states, b_has_turn=jnp.asarray(True))

  def update(updates, state, params=None):
    turn, new = state.b_has_turn, {}
    for name, part in parts.items():
      updates, new[name] = part.update(updates, getattr(state, name), params)
    idle_a = schedule_clock.gone_on(state.a, new["a"])
    idle_b = schedule_clock.gone_on(state.b, new["b"])
    new["a"] = trees.select(turn, idle_a, new["a"])
    new["b"] = trees.select(turn, new["b"], idle_b)
    updates = of_turn(turn, updates, trees.zeros_like(updates))
    return updates, TurnsState(**new, b_has_turn=~turn)

  return optax.GradientTransformation(init, update)


def of_turn(b_has_turn: jax.Array, trained: PyTree, held: PyTree) -> PyTree:
  """Takes the factor whose turn it is from `trained`, the other from `held`."""

  def one(pair, frozen):
    return {
      "a": jnp.where(b_has_turn, frozen["a"], pair["a"]),
      "b": jnp.where(b_has_turn, pair["b"], frozen["b"]),
    }

  return low_rank.map_pairs(one, lambda x, y: x, trained, held)


def _update(
  loss: LossFn, client_optimizer: local.ClientOptimizer, weighting: str
) -> ClientUpdate:
  """Local work on one factor; the turn comes with the base."""

  def loss_of_turn(trainable, base_and_turn, batch, key):
    base, turn = base_and_turn
    held = jax.lax.stop_gradient(trainable)
    return loss(of_turn(turn, trainable, held), base, batch, key)

  own = local.local_update(loss_of_turn, client_optimizer, weighting=weighting)

  def step(state, base_and_turn, batch, key):
    new = own.step(state, base_and_turn, batch, key)
    # Weight decay would move what has no gradient.
    kept = of_turn(base_and_turn[1], new.trainable, state.trainable)
    return new._replace(trainable=kept)

  return own._replace(step=step)


def rolora(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  adapter: Adapter,
  server_optimizer: optax.GradientTransformation | None = None,
  aggregator: Aggregator | None = None,
  weighting: str = "examples",
  seed: int = 0,
  report_error: bool = True,
) -> FederatedAlgorithm:
  """Trains and averages B in one round, A in the next.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    adapter: LoRA.
    server_optimizer: Applied to the pseudo-gradient; A, B and a head have a
      state each. Default `optax.sgd(1.0)`.
    aggregator: Default the weighted mean.
    weighting: "examples", "tokens" or "uniform".
    seed: Seed in [0, 2**32).
    report_error: As in `fedit`.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: Another adapter than LoRA.
  """
  low_rank.scale_of(adapter, "rolora")
  server = algorithm.Server(
    client_base=lambda state, base: (base, state.server_optimizer.b_has_turn)
  )
  if report_error:
    aggregator, server = lora_metrics.reported(
      aggregator, server, lambda state, delta: delta
    )

  def bytes_per_client(state):
    """Up the factor of this round, down the other, that of the round before."""
    a, b = (trees.num_bytes(low_rank.select(state.trainable, f)) for f in "ab")
    turn = algorithm.number(state.server_optimizer.b_has_turn, 1)
    return (b, a) if turn else (a, b)

  return algorithm.federated(
    _update(loss, client_optimizer, weighting),
    aggregator=aggregator,
    server_optimizer=in_turns(server_optimizer or optax.sgd(1.0)),
    seed=seed,
    server=server,
    bytes_per_client=bytes_per_client,
  )
