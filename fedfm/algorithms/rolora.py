"""RoLoRA (Chen et al. 2025, arXiv 2502.01755): one factor at a time, in turns.

  even rounds (0, 2, ...)   A frozen:   B <- sum_i p_i B_i
  odd rounds                B frozen:   A <- sum_i p_i A_i

Exact in every round. B has the first turn: while B = 0 the gradient of A is 0.
A head, if there is one, is trained in every round.
"""

from collections.abc import Sequence
import dataclasses
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
from fedfm.clients.transforms import MessageTransform
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
  """Local work on one factor; the turn comes with the base.

  The message is {"delta": trainable, "b_has_turn": 0 or 1}.
  """

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

  def start(sent, client_state, info):
    return own.start(sent["trainable"], client_state, info)

  def finish(sent, state, info):
    delta, weight, _, metrics = own.finish(sent["trainable"], state, info)
    turn = sent["b_has_turn"].astype(jnp.float32)
    return {"delta": delta, "b_has_turn": turn}, weight, (), metrics

  return ClientUpdate(start, step, finish)


def _split(delta: PyTree) -> dict[str, PyTree]:
  return {
    "a": low_rank.select(delta, "a", rest=False),
    "b": low_rank.select(delta, "b", rest=False),
    "rest": low_rank.map_pairs(lambda pair: None, lambda x: x, delta),
  }


def transform_of_turn(transform: MessageTransform) -> MessageTransform:
  """Transforms what a client sends in its turn; the other factor waits.

  So does what error feedback keeps of the other factor: sent in a round in
  which the server holds that factor, it would be lost.

  Args:
    transform: Of plain deltas.

  Returns:
    A `MessageTransform` of the messages of `rolora`.
  """

  def init(message):
    parts = _split(message["delta"])
    return {name: transform.init(part) for name, part in parts.items()}

  def apply(message, states, info):
    sent, new = {}, {}
    for index, (name, part) in enumerate(_split(message["delta"]).items()):
      own = dataclasses.replace(info, key=jax.random.fold_in(info.key, index))
      sent[name], new[name] = transform.apply(part, states[name], own)
    b_has_turn = message["b_has_turn"] > 0
    delta = low_rank.map_pairs(
      lambda pair, a, b, rest: a | b,
      lambda x, a, b, rest: rest,
      message["delta"],
      *sent.values(),
    )
    # The delta of the factor that waits is zero.
    delta = of_turn(b_has_turn, delta, message["delta"])
    new["a"] = trees.select(b_has_turn, states["a"], new["a"])
    new["b"] = trees.select(b_has_turn, new["b"], states["b"])
    return message | {"delta": delta}, new

  return transform._replace(apply=apply, init=init)


def rolora(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  adapter: Adapter,
  server_optimizer: optax.GradientTransformation | None = None,
  aggregator: Aggregator | None = None,
  transforms: Sequence[MessageTransform] = (),
  downlink: MessageTransform | None = None,
  weighting: str = "examples",
  report_error: bool = True,
  **options: Any,
) -> FederatedAlgorithm:
  """Trains and averages B in one round, A in the next.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    adapter: LoRA.
    server_optimizer: Applied to the pseudo-gradient; A, B and a head have a
      state each. Default `optax.sgd(1.0)`.
    aggregator: Default the weighted mean.
    transforms: What is done to the factor of the turn (and a head) before it
      leaves, such as compression.
    downlink: As in `algorithm.federated`; clients are then sent what they lack
      of both factors in every round.
    weighting: "examples", "tokens" or "uniform".
    report_error: As in `fedit`.
    **options: `seed`, `num_clients` and others of `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: Another adapter than LoRA.
  """
  low_rank.scale_of(adapter, "rolora")

  def wire(state, sent, message):
    """Up the factor of this round, down the other, that of the round before."""
    turn = algorithm.number(state.server_optimizer.b_has_turn, 1)
    up, down = "ba" if turn else "ab"
    sent, delta = sent["trainable"], message["delta"]
    if downlink is None:
      sent = low_rank.select(sent, down)
    return sent, low_rank.select(delta, up)

  server = algorithm.Server(
    broadcast=lambda state: {
      "trainable": state.trainable,
      "b_has_turn": state.server_optimizer.b_has_turn,
    },
    combine=lambda state, mean, *rest: (mean["delta"], state.extra),
    client_base=lambda state, base, heard: (base, heard["b_has_turn"]),
    direction=lambda message: message["delta"],
    wire=wire,
  )
  if report_error:
    aggregator, server = lora_metrics.reported(
      aggregator, server, lambda state, message: message["delta"]
    )
  return algorithm.federated(
    _update(loss, client_optimizer, weighting),
    aggregator=aggregator,
    server_optimizer=in_turns(server_optimizer or optax.sgd(1.0)),
    transforms=[transform_of_turn(t) for t in transforms],
    downlink=downlink,
    server=server,
    **options,
  )
