"""FedDyn (Acar et al. 2021, arXiv 2111.04263): dynamic regularisation.

  client i   minimises F_i(w) - <h_i, w> + alpha/2 |w - w_t|^2, from w_t
             h_i <- h_i - alpha (w_i - w_t)
  server     h   <- h - alpha |S|/N mean_S (w_i - w_t)
             w   <- mean_S w_i - h / alpha

h is the uniform mean of all h_i, whatever the weighting of the deltas.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedfm import aggregators, trees
from fedfm.algorithms import algorithm, checks, round_metrics
from fedfm.clients import local
from fedfm.types import Aggregator, ClientUpdate, FederatedAlgorithm, LossFn


def feddyn(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  alpha: float = 0.1,
  server_optimizer: optax.GradientTransformation | None = None,
  aggregator: Aggregator | None = None,
  weighting: str = "uniform",
  num_clients: int | None = None,
  **options: Any,
) -> FederatedAlgorithm:
  """Bends each client's loss so that its optimum moves to the global one.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    alpha: Strength of the pull to the weights that were sent, above 0; the
      paper's range is 0.001 to 0.1.
    server_optimizer: Applied to the pseudo-gradient; default `optax.sgd(1.0)`,
      the paper's.
    aggregator: Of the deltas; default the weighted mean.
    weighting: Of the deltas: "examples", "tokens" or "uniform".
    num_clients: Size of the population, N.
    **options: `seed`, `transforms` and others of `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm` whose clients keep h_i and whose `extra` is h.

  Raises:
    ConfigError: An alpha that is not above 0, or no `num_clients`.
  """
  checks.check_number("alpha", alpha, open_at=(0, jnp.inf))
  population = checks.check_num_clients(num_clients)

  def bend(grads, trainable, memory):
    return jax.tree.map(
      lambda g, w, w_t, h: g - h + alpha * (w - w_t), grads, trainable, *memory
    )

  client = local.local_update(
    loss, client_optimizer, weighting=weighting, correction=bend
  )

  def start(sent, h_i, info):
    return client.start(sent, (sent, h_i), info)

  def finish(sent, carry, info):
    delta, weight, _, metrics = client.finish(sent, carry, info)
    h_i = trees.sub(carry.memory[1], trees.scale(delta, alpha))
    return delta, weight, h_i, metrics

  def combine(state, mean, result, cohort):
    share = jnp.sum(result.weights > 0) / population
    h = trees.sub(state.extra, trees.scale(mean["uniform"], alpha * share))
    return trees.sub(mean["weighted"], trees.scale(h, 1 / alpha)), h

  def metrics(state, new_state, mean, result, cohort):
    norm = trees.norm(mean["weighted"])  # Of what clients did, without h.
    return round_metrics.drift(result, norm)

  return algorithm.federated(
    ClientUpdate(start, client.step, finish),
    aggregator=aggregators.each(
      weighted=aggregator or aggregators.weighted_mean(),
      uniform=aggregators.uniform_mean(),
    ),
    server_optimizer=server_optimizer,
    server=algorithm.Server(
      init=trees.zeros_like, combine=combine, metrics=metrics
    ),
    client_state=trees.zeros_like,
    num_clients=population,
    **options,
  )
