"""FFA-LoRA (Sun et al. 2024, arXiv 2403.12313): A is frozen at its start.

A_i = A_0, of one seed that all share, never trained and never sent
B <- sum_i p_i B_i                     exact: sum_i p_i A_0 B_i = A_0 B
"""

from typing import Any

import optax

from fedfm import trees
from fedfm.adapters import Adapter
from fedfm.algorithms import algorithm, lora_metrics, low_rank
from fedfm.clients import local
from fedfm.privacy import Mechanism
from fedfm.types import Aggregator, ClientUpdate, FederatedAlgorithm, LossFn


def train_b(
  loss: LossFn, client_optimizer: local.ClientOptimizer, weighting: str
) -> ClientUpdate:
  """Builds local work on B and what is in no pair; A comes with the base.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    weighting: "examples", "tokens" or "uniform".

  Returns:
    A `ClientUpdate` for a base of `with_frozen_a`. One A serves all lanes.
  """

  def loss_of_b(trained, base_and_frozen, batch, key):
    base, frozen = base_and_frozen
    return loss(low_rank.join(frozen, trained), base, batch, key)

  return local.local_update(loss_of_b, client_optimizer, weighting=weighting)


def expand(state, delta):
  """Fills a delta of B with zeros for A."""
  return low_rank.join(trees.zeros_like(state.trainable), delta)


# Only B and a head are sent; the frozen A goes to the steps with the base.
SERVER = algorithm.Server(
  broadcast=lambda state: low_rank.select(state.trainable, "b"),
  combine=lambda state, delta, result, cohort: (
    expand(state, delta),
    state.extra,
  ),
  client_base=lambda state, base, heard: (base, state.trainable),
)


def ffa_lora(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  adapter: Adapter,
  server_optimizer: optax.GradientTransformation | None = None,
  aggregator: Aggregator | None = None,
  weighting: str = "examples",
  mechanism: Mechanism | None = None,
  report_error: bool = True,
  **options: Any,
) -> FederatedAlgorithm:
  """Trains and averages B; A stays as the adapter drew it.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    adapter: LoRA.
    server_optimizer: Applied to the pseudo-gradient of B and of a head; default
      `optax.sgd(1.0)`.
    aggregator: Default the weighted mean.
    weighting: "examples", "tokens" or "uniform".
    mechanism: As in `algorithm.federated`.
    report_error: As in `fedit`.
    **options: `seed`, `transforms`, `downlink` and others of
      `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: Another adapter than LoRA.
  """
  low_rank.scale_of(adapter, "ffa_lora")
  server = SERVER
  if report_error and mechanism is None:
    aggregator, server = lora_metrics.reported(aggregator, server, expand)
  return algorithm.federated(
    train_b(loss, client_optimizer, weighting),
    aggregator=aggregator,
    server_optimizer=low_rank.only(server_optimizer or optax.sgd(1.0), "b"),
    mechanism=mechanism,
    server=server,
    **options,
  )
