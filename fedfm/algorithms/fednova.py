"""FedNova (Wang et al. 2020, arXiv 2007.07481): normalised averaging.

  client i   d_i = (w_t - w_i) / (tau_i eta)
  server     w <- w - (sum_i p_i tau_i eta) sum_i p_i d_i

so that a client of many local steps does not pull the objective to its own.
tau_i eta is |a_i|_1 eta of the paper: what the client's own steps add up to
(`measures.measure_rate`), right for SGD with momentum too.
"""

from typing import Any

import jax.numpy as jnp

from fedfm import trees
from fedfm.algorithms import algorithm
from fedfm.clients import local, measures
from fedfm.types import FederatedAlgorithm, LossFn


def fednova(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  weighting: str = "examples",
  **options: Any,
) -> FederatedAlgorithm:
  """Averages directions, and goes as far as the mean client went.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one;
      under an adaptive one tau_i eta is what its steps would add up to on a
      constant gradient, which is no longer the paper's.
    weighting: "examples", "tokens" or "uniform".
    **options: `server_optimizer`, `aggregator`, `seed` and others of
      `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm`.
  """
  client = local.local_update(
    loss, measures.measure_rate(client_optimizer), weighting=weighting
  )

  def finish(sent, carry, info):
    delta, weight, client_state, metrics = client.finish(sent, carry, info)
    length = carry.optimizer.total * carry.rate  # tau_i eta
    direction = trees.scale(delta, 1 / jnp.where(length, length, 1))
    message = {"direction": direction, "length": length}
    return message, weight, client_state, metrics

  def combine(state, mean, result, cohort):
    return trees.scale(mean["direction"], mean["length"]), state.extra

  return algorithm.federated(
    client._replace(finish=finish),
    server=algorithm.Server(
      combine=combine,
      direction=lambda message: message["direction"],
    ),
    **options,
  )
