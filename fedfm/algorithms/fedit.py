"""FedIT (Zhang et al. 2023, arXiv 2305.05644): FedAvg on both LoRA factors.

  A <- sum_i p_i A_i        B <- sum_i p_i B_i

The mean of products is not the product of means. What is missed is
sum_i p_i (A_i - A)(B_i - B), a covariance: none where all A_i or all B_i are
equal, second order in how far the clients drift apart.
"""

from typing import Any

from fedfm.adapters import Adapter
from fedfm.algorithms import algorithm, lora_metrics, low_rank
from fedfm.clients import local
from fedfm.privacy import Mechanism
from fedfm.types import Aggregator, FederatedAlgorithm, LossFn


def fedit(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  adapter: Adapter,
  aggregator: Aggregator | None = None,
  weighting: str = "examples",
  mechanism: Mechanism | None = None,
  report_error: bool = True,
  **options: Any,
) -> FederatedAlgorithm:
  """Averages the factors A and B of the clients apart.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    adapter: LoRA.
    aggregator: Default the weighted mean.
    weighting: "examples", "tokens" or "uniform".
    mechanism: As in `algorithm.federated`.
    report_error: Report `lora/aggregation_error`; the server then holds every
      client's factors at once rather than their sum, so not with a mechanism.
    **options: `server_optimizer`, `seed`, `transforms`, `downlink` and others
      of `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: Another adapter than LoRA.
  """
  low_rank.scale_of(adapter, "fedit")
  server = algorithm.Server()
  if report_error and mechanism is None:
    aggregator, server = lora_metrics.reported(
      aggregator, server, lambda state, delta: delta
    )
  return algorithm.federated(
    local.local_update(loss, client_optimizer, weighting=weighting),
    aggregator=aggregator,
    mechanism=mechanism,
    server=server,
    **options,
  )
