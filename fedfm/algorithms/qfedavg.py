"""q-FedAvg (Li et al. 2020, arXiv 1905.10497): fairness between clients.

  client i   F_i, its loss at w_t;  L = 1 / eta
             D_i = F_i^q L (w_i - w_t)
             h_i = q F_i^(q-1) |L (w_i - w_t)|^2 + L F_i^q
  server     w <- w + sum_i p_i D_i / sum_i p_i h_i

Clients of a high loss count more as q grows; q = 0 is FedAvg.
"""

from typing import Any

import jax.numpy as jnp

from fedfm import trees
from fedfm.algorithms import algorithm, checks
from fedfm.clients import local, measures
from fedfm.types import ClientUpdate, FederatedAlgorithm, LossFn, Passes

PASSES = Passes(forwards=2)  # One of them `with_sent_loss`.
_LEAST_LOSS = 1e-10  # A loss of 0 has no power of q - 1.


def with_sent_loss(loss: LossFn, update: ClientUpdate) -> ClientUpdate:
  """Measures, beside a local update, the client's loss at the sent weights.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    update: From `local_update`.

  Returns:
    The update, with the carry `(carry of update, mean loss, sent weights)`.
  """

  def start(sent, client_state, info):
    mean = measures.RunningMean.start(jnp.zeros((), trees.sum_dtype(sent)))
    return update.start(sent, client_state, info), mean, sent

  def step(carry, base, batch, key):
    own, mean, sent = carry
    value, aux = loss(sent, base, batch, key)
    mean = mean.add(value, local.batch_count(batch, aux))
    return update.step(own, base, batch, key), mean, sent

  def finish(sent, carry, info):
    return update.finish(sent, carry[0], info)

  return ClientUpdate(start, step, finish)


def qfedavg(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  q: float = 1.0,
  weighting: str = "examples",
  **options: Any,
) -> FederatedAlgorithm:
  """Reweights clients by a power of their loss.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`, not negative.
    client_optimizer: SGD, or a function of the round giving it; 1 / its rate
      stands for the Lipschitz constant L, as in the paper.
    q: Power, at least 0.
    weighting: p_i of the clients: "examples", "tokens" or "uniform".
    **options: `server_optimizer`, `aggregator`, `seed` and others of
      `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: A q below 0, or an optimizer such as Adam.
  """
  checks.check_number("q", q)
  measures.check_sgd(client_optimizer, "qfedavg")
  client = with_sent_loss(
    loss,
    local.local_update(
      loss, measures.measure_rate(client_optimizer), weighting=weighting
    ),
  )

  def finish(sent, carry, info):
    delta, weight, client_state, metrics = client.finish(sent, carry, info)
    own, mean, _ = carry
    f = jnp.maximum(mean.value(), _LEAST_LOSS)
    rate = own.optimizer.total * own.rate / own.optimizer.steps
    lipschitz = 1 / jnp.where(rate, rate, 1)
    gradient = trees.scale(delta, lipschitz)
    h = q * f ** (q - 1) * trees.squared_norm(gradient) + lipschitz * f**q
    message = {"delta": trees.scale(gradient, f**q), "h": h}
    return message, weight, client_state, metrics

  def combine(state, mean, result, cohort):
    h = jnp.where(mean["h"], mean["h"], 1)
    return trees.scale(mean["delta"], 1 / h), state.extra

  return algorithm.federated(
    client._replace(finish=finish),
    server=algorithm.Server(
      combine=combine,
      direction=lambda message: message["delta"],
    ),
    passes=PASSES,
    **options,
  )
