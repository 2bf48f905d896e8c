"""FedProx (Li et al. 2020, arXiv 1812.06127): FedAvg with a proximal term.

client i minimises   F_i(w) + mu/2 |w - w_t|^2
"""

from fedfm import errors
from fedfm.algorithms.fedavg import fedavg
from fedfm.clients import local
from fedfm.types import FederatedAlgorithm, LossFn


def fedprox(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  mu: float = 0.01,
  **options,
) -> FederatedAlgorithm:
  """Pulls each client to the weights that it was sent.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    mu: Strength of the pull, at least 0; over the trainable only.
    **options: Those of `fedavg`.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: A negative or non-finite mu.
  """
  if not 0 <= mu < float("inf"):
    raise errors.ConfigError(
      f"mu: got {mu}, expected a finite number of at least 0"
    )
  return fedavg(loss, client_optimizer=client_optimizer, proximal=mu, **options)
