"""Reptile (Nichol et al. 2018, arXiv 1803.02999), batched over clients.

  client i   w_i by local steps from w_t
  server     w <- w + epsilon mean_S (w_i - w_t)

FedAvg that does not go all the way, with clients alike; epsilon is the rate of
the server optimizer. As of Per-FedAvg, evaluate it after local fine-tuning.
"""

from typing import Any

import optax

from fedfm.algorithms.fedavg import fedavg
from fedfm.clients import local
from fedfm.types import FederatedAlgorithm, LossFn


def reptile(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  server_optimizer: optax.GradientTransformation | None = None,
  weighting: str = "uniform",
  **options: Any,
) -> FederatedAlgorithm:
  """Moves a part of the way to the mean of the clients' weights.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    server_optimizer: Default `optax.sgd(0.5)`, an epsilon of 0.5.
    weighting: "examples", "tokens" or "uniform", the paper's.
    **options: Those of `fedavg`.

  Returns:
    A `FederatedAlgorithm`.
  """
  return fedavg(
    loss,
    client_optimizer=client_optimizer,
    server_optimizer=server_optimizer or optax.sgd(0.5),
    weighting=weighting,
    **options,
  )
