"""A client update, an aggregator and a server optimizer make an algorithm."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedfm import aggregators, errors, trees
from fedfm.clients import engine
from fedfm.types import (
  Aggregator,
  ClientUpdate,
  FederatedAlgorithm,
  ServerState,
)

PyTree = Any
# `server_step(trainable, base, server_batch, key) -> trainable`
ServerStep = Callable[[PyTree, PyTree, PyTree, jax.Array], PyTree]
_SERVER_KEY = (
  0xFFFFFFFF  # Folded in after the round, for what the server draws.
)


def check_seed(seed: int) -> int:
  """Checks that a seed fits the 32 bits that a key takes.

  Args:
    seed: The seed.

  Returns:
    `seed`.

  Raises:
    ConfigError: Out of [0, 2**32); a key would silently wrap around.
  """
  if isinstance(seed, bool) or not isinstance(seed, int):
    raise errors.ConfigError(f"seed: got {seed!r}, expected an integer")
  if not 0 <= seed < 2**32:
    raise errors.ConfigError(f"seed: got {seed}, expected 0 <= seed < 2**32")
  return seed


def federated(
  update: ClientUpdate,
  *,
  aggregator: Aggregator | None = None,
  server_optimizer: optax.GradientTransformation | None = None,
  seed: int = 0,
  server_step: ServerStep | None = None,
) -> FederatedAlgorithm:
  """Builds an algorithm whose clients send deltas of the trainable.

  Args:
    update: What a client does; its message is a delta.
    aggregator: Default the weighted mean.
    server_optimizer: Applied to the negative aggregate, the pseudo-gradient;
      default `optax.sgd(1.0)`, which adds the aggregate.
    seed: Seed of every random number of the algorithm, in [0, 2**32).
    server_step: Applied to the new trainable where the round gets a
      `server_batch`: data that the server itself holds.

  Returns:
    A `FederatedAlgorithm`.
  """
  aggregator = aggregator or aggregators.weighted_mean()
  server_optimizer = server_optimizer or optax.sgd(1.0)
  check_seed(seed)

  def init(trainable):
    trainable = trees.copy(trainable)
    return ServerState(
      trainable=trainable,
      server_optimizer=server_optimizer.init(trainable),
      aggregator=aggregator.init(trainable),
      clients=(),
      round=jnp.zeros((), jnp.int32),
    )

  def round_fn(state, base, cohort, server_batch=None):
    key = jax.random.key(seed)
    result = engine.run_cohort(
      update,
      aggregator,
      state.aggregator,
      state.trainable,
      base,
      cohort,
      state.clients,
      key,
      state.round,
    )
    with jax.named_scope("aggregate"):
      aggregate, aggregator_state = aggregator.finish(
        state.aggregator, result.collected
      )
    with jax.named_scope("server_optimizer"):
      updates, optimizer_state = server_optimizer.update(
        trees.scale(aggregate, -1),
        state.server_optimizer,
        state.trainable,
      )
      trainable = optax.apply_updates(state.trainable, updates)
    # Momentum would move the weights on a round that brought nothing.
    brought = jnp.sum(result.weights > 0) >= aggregator.min_clients
    trainable, optimizer_state, aggregator_state = trees.select(
      brought,
      (trainable, optimizer_state, aggregator_state),
      (state.trainable, state.server_optimizer, state.aggregator),
    )
    if server_batch is not None and server_step is not None:
      server_key = jax.random.fold_in(
        jax.random.fold_in(key, state.round), _SERVER_KEY
      )
      trainable = server_step(trainable, base, server_batch, server_key)
    metrics = round_metrics(result)
    metrics["update/norm"] = trees.norm(trees.sub(trainable, state.trainable))
    state = ServerState(
      trainable=trainable,
      server_optimizer=optimizer_state,
      aggregator=aggregator_state,
      clients=state.clients,
      round=state.round + 1,
    )
    return state, metrics

  def bytes_per_client(state):
    return trees.num_bytes(state.trainable), trees.num_bytes(state.trainable)

  return FederatedAlgorithm(
    init=init,
    round=round_fn,
    effective_base=lambda state, base: base,
    bytes_per_client=bytes_per_client,
  )


def round_metrics(result: engine.CohortResult) -> dict[str, jax.Array]:
  """Summarises the clients of a round into scalars.

  Args:
    result: What the cohort brought back.

  Returns:
    `train/loss` (over all tokens or examples trained on, nats),
    `train/count`, `clients/participating`, `clients/nonfinite`,
    `drift/delta_norm` (mean over clients) and `drift/delta_norm_max`.
  """
  kept = result.weights > 0
  metrics = {k: jnp.where(kept, v, 0) for k, v in result.metrics.items()}
  count = jnp.sum(metrics["count"])
  participating = jnp.sum(kept)
  return {
    "train/loss": jnp.sum(metrics["loss_sum"]) / jnp.maximum(count, 1),
    "train/count": count,
    "clients/participating": participating,
    "clients/nonfinite": jnp.sum(result.nonfinite),
    "drift/delta_norm": jnp.sum(metrics["delta_norm"])
    / jnp.maximum(participating, 1),
    "drift/delta_norm_max": jnp.max(metrics["delta_norm"], initial=0),
  }
