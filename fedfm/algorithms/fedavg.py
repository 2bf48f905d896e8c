"""FedAvg (McMahan et al. 2017, arXiv 1602.05629).

w <- w + sum_i p_i (w_i - w),   p_i = n_i / sum_j n_j over the cohort
"""

import optax

from fedfm.algorithms import algorithm
from fedfm.clients import local
from fedfm.types import FederatedAlgorithm, LossFn


def fedavg(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  server_optimizer: optax.GradientTransformation | None = None,
  weighting: str = "examples",
  seed: int = 0,
  **federated_options,
) -> FederatedAlgorithm:
  """Averages the clients' deltas and adds the mean to the weights.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    server_optimizer: Applied to the pseudo-gradient; default `optax.sgd(1.0)`.
    weighting: "examples", "tokens" or "uniform".
    seed: Seed in [0, 2**32).
    **federated_options: `aggregator`, `transforms`, `downlink` and others of
      `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm`.
  """
  update = local.local_update(loss, client_optimizer, weighting=weighting)
  return algorithm.federated(
    update, server_optimizer=server_optimizer, seed=seed, **federated_options
  )
