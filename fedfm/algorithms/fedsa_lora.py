"""FedSA-LoRA (Guo et al. 2025, arXiv 2410.01463): A is shared, B stays local.

client i trains A and its own B_i (and its own head) from the shared A
A <- sum_i p_i A_i         B_i and the head persist with client i
"""

from typing import Any

import jax
import optax

from fedfm import aggregators, sums, trees
from fedfm.adapters import Adapter
from fedfm.algorithms import algorithm, lora_metrics, low_rank
from fedfm.clients import engine, local
from fedfm.types import (
  Aggregator,
  ClientUpdate,
  FederatedAlgorithm,
  LossFn,
  PyTree,
)


def _own(trainable: PyTree) -> PyTree:
  """The part of a trainable that stays with a client."""
  return low_rank.select(trainable, "b")


def _update(
  loss: LossFn, client_optimizer: local.ClientOptimizer, weighting: str
) -> ClientUpdate:
  """Local work on A and on what the client keeps; sends the delta of A."""
  own = local.local_update(loss, client_optimizer, weighting=weighting)

  def start(shared, client_state, info):
    trainable = low_rank.merge(shared, client_state)
    return own.start(trainable, (), info)

  def finish(shared, state, info):
    of_a = low_rank.select(state.trainable, "a", rest=False)
    message, weight, _, metrics = own.finish(
      shared, state._replace(trainable=of_a), info
    )
    return message, weight, _own(state.trainable), metrics

  return ClientUpdate(start, own.step, finish)


def fedsa_lora(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  adapter: Adapter,
  num_clients: int,
  server_optimizer: optax.GradientTransformation | None = None,
  aggregator: Aggregator | None = None,
  weighting: str = "examples",
  report_error: bool = True,
  **options: Any,
) -> FederatedAlgorithm:
  """Averages A; every client keeps its own B and head.

  A client that never took part has those of the start.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    adapter: LoRA.
    num_clients: Size of the population, whose B are kept.
    server_optimizer: Applied to the pseudo-gradient of A; default
      `optax.sgd(1.0)`.
    aggregator: Of A; default the weighted mean.
    weighting: "examples", "tokens" or "uniform".
    report_error: Report `lora/aggregation_error`, that of A times the mean of
      the B_i: how far the clients' models are, on average, from what they
      trained. The simulation knows the B_i; a server would not.
    **options: `seed`, `transforms`, `downlink` and others of
      `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm`, whose `personal` models are a client's own.

  Raises:
    ConfigError: Another adapter than LoRA.
  """
  low_rank.scale_of(adapter, "fedsa_lora")

  def expand(state, delta):
    return low_rank.join(trees.zeros_like(state.trainable), delta)

  def metrics(state, new_state, kept, result, cohort):
    own = jax.tree.map(
      lambda x: engine.in_cohort_order(cohort, x), result.client_states
    )
    of_a = low_rank.select(state.trainable, "a", rest=False)
    trained = low_rank.merge(trees.add(of_a, kept.messages), own)
    mean_b = sums.weighted(kept.shares, own)
    mean = low_rank.merge(trees.add(of_a, kept.update), mean_b)
    error = lora_metrics.aggregation_error(
      trained, kept.shares, low_rank.pairs_of(mean)
    )
    return {lora_metrics.ERROR: error}

  server = algorithm.Server(
    broadcast=lambda state: low_rank.select(state.trainable, "a", rest=False),
    combine=lambda state, update, *rest: (expand(state, update), state.extra),
  )
  if report_error:
    aggregator = aggregators.keep(aggregator)
    server = server._replace(
      combine=lambda state, kept, *rest: (
        expand(state, kept.update),
        state.extra,
      ),
      metrics=metrics,
    )
  return algorithm.federated(
    _update(loss, client_optimizer, weighting),
    aggregator=aggregator,
    server_optimizer=low_rank.only(
      server_optimizer or optax.sgd(1.0), "a", rest=False
    ),
    server=server,
    client_state=_own,
    num_clients=num_clients,
    personal=lambda state, client_state: low_rank.join(
      state.trainable, client_state
    ),
    **options,
  )
