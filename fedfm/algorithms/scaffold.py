"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378), option II.

  client i, K steps   w_i <- w_i - eta (g - c_i + c)
                      c_i+ = c_i - c + (w_t - w_i) / (K eta)
  server              w <- w + mean_S (w_i - w)
                      c <- c + |S|/N mean_S (c_i+ - c_i)

K eta is what the client's own steps add up to (`measures.measure_rate`), so
unequal clients, schedules and momentum are right; under Adam the difference of
weights is no gradient, and it is refused. The mean of the control variates is
uniform, whatever the weighting of the deltas: the fixed point is that of the
uniform mean of the clients' losses.
"""

from typing import Any

import jax.numpy as jnp
import optax

from fedfm import aggregators, trees
from fedfm.algorithms import algorithm, checks
from fedfm.clients import local, measures
from fedfm.types import Aggregator, ClientUpdate, FederatedAlgorithm, LossFn


def scaffold(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  server_optimizer: optax.GradientTransformation | None = None,
  aggregator: Aggregator | None = None,
  weighting: str = "uniform",
  num_clients: int | None = None,
  **options: Any,
) -> FederatedAlgorithm:
  """Corrects each client's drift by the difference of control variates.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: SGD, plain or with momentum, or a function of the round
      giving it.
    server_optimizer: Applied to the pseudo-gradient; default `optax.sgd(1.0)`.
    aggregator: Of the deltas; default the weighted mean.
    weighting: Of the deltas: "examples", "tokens" or "uniform".
    num_clients: Size of the population, N.
    **options: `seed`, `transforms` and others of `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm` whose clients keep c_i and whose `extra` is c.

  Raises:
    ConfigError: An optimizer such as Adam, or no `num_clients`.
  """
  measures.check_sgd(client_optimizer, "scaffold")
  population = checks.check_num_clients(num_clients)
  client = local.local_update(
    loss,
    measures.measure_rate(client_optimizer),
    weighting=weighting,
    correction=lambda grads, w, shift: trees.add(grads, shift),
  )

  def start(sent, c_i, info):
    shift = trees.sub(sent["control"], c_i)
    return client.start(sent["trainable"], shift, info)

  def finish(sent, carry, info):
    delta, weight, _, metrics = client.finish(sent["trainable"], carry, info)
    k_eta = carry.optimizer.total * carry.rate
    moved = k_eta != 0  # At a rate of 0, c_i stays.
    gradient = trees.select(
      moved,
      trees.scale(delta, -1 / jnp.where(moved, k_eta, 1)),
      sent["control"],
    )
    c_i = trees.sub(gradient, carry.memory)
    message = {"delta": delta, "control": trees.sub(gradient, sent["control"])}
    return message, weight, c_i, metrics

  def combine(state, mean, result, cohort):
    share = jnp.sum(result.weights > 0) / population
    control = trees.add(state.extra, trees.scale(mean["control"], share))
    return mean["delta"], control

  return algorithm.federated(
    ClientUpdate(start, client.step, finish),
    aggregator=aggregators.apart(
      delta=aggregator or aggregators.weighted_mean(),
      control=aggregators.uniform_mean(),
    ),
    server_optimizer=server_optimizer,
    server=algorithm.Server(
      init=trees.zeros_like,
      broadcast=lambda state: {
        "trainable": state.trainable,
        "control": state.extra,
      },
      combine=combine,
      direction=lambda message: message["delta"],
    ),
    client_state=trees.zeros_like,
    num_clients=population,
    **options,
  )
