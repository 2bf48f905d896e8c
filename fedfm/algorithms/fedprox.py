"""FedProx (Li et al. 2020, arXiv 1812.06127): FedAvg with a proximal term.

client i minimises   F_i(w) + mu/2 |w - w_t|^2
"""

import jax

from fedfm.algorithms import algorithm, checks
from fedfm.clients import local
from fedfm.types import FederatedAlgorithm, LossFn


def fedprox(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  mu: float = 0.01,
  weighting: str = "examples",
  **options,
) -> FederatedAlgorithm:
  """Pulls each client to the weights that it was sent.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    mu: Strength of the pull, at least 0; over the trainable only.
    weighting: "examples", "tokens" or "uniform".
    **options: `server_optimizer`, `aggregator`, `seed` and others of
      `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: A negative or non-finite mu.
  """
  checks.check_number("mu", mu)

  def pull(grads, trainable, sent):
    return jax.tree.map(
      lambda g, w, w0: g + mu * (w - w0), grads, trainable, sent
    )

  update = local.local_update(
    loss, client_optimizer, weighting=weighting, correction=pull
  )

  def start(sent, client_state, info):
    del client_state
    return update.start(sent, sent, info)

  return algorithm.federated(update._replace(start=start), **options)
