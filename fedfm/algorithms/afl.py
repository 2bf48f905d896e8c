"""Agnostic federated learning (Mohri et al. 2019, arXiv 1902.00146).

min over w, max over mixtures lambda of the N clients, of sum_i lambda_i F_i(w)

  client i   w_i by local steps;  F_i, its loss at w_t
  server     w <- w + sum_S lambda_i (w_i - w_t) / sum_S lambda_i
             lambda <- projection to the simplex of (lambda + rate N/|S| F_S)

F_S is F_i for the clients of the cohort and 0 for others; N/|S| keeps it an
unbiased estimate. With one local step and all clients it is the paper's.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedfm import trees
from fedfm.algorithms import algorithm, checks
from fedfm.algorithms.qfedavg import PASSES, with_sent_loss
from fedfm.clients import engine, local
from fedfm.types import Aggregator, FederatedAlgorithm, LossFn


def project_to_simplex(x: jax.Array) -> jax.Array:
  """Finds the nearest point whose entries are at least 0 and sum to 1.

  Args:
    x: [n].

  Returns:
    [n]. Source: Duchi et al. 2008, figure 1.

  Examples:
    >>> project_to_simplex(jnp.array([1.0, 0.5, -1.0]))
    Array([0.75, 0.25, 0.  ], dtype=float32)
  """
  ordered = jnp.sort(x, descending=True)
  excess = (jnp.cumsum(ordered) - 1) / jnp.arange(1, x.size + 1)
  kept = jnp.sum(ordered > excess)
  return jnp.maximum(x - excess[kept - 1], 0)


def afl(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  mixture_learning_rate: float = 0.01,
  server_optimizer: optax.GradientTransformation | None = None,
  aggregator: Aggregator | None = None,
  downlink: checks.Absent = None,
  weighting: str = "uniform",
  num_clients: int | None = None,
  **options: Any,
) -> FederatedAlgorithm:
  """Minimises the loss of the worst mixture of clients.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    mixture_learning_rate: Of the steps of lambda, at least 0.
    server_optimizer: Applied to the pseudo-gradient; default `optax.sgd(1.0)`.
    aggregator: Of what clients send, lambda_i already in it; default the mean.
    downlink: None: each client is sent a number of its own.
    weighting: Not read: the mixture is the weight.
    num_clients: Size of the population, N.
    **options: `seed`, `transforms` and others of `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm` whose `extra` is lambda, [N], by rows of the
    population; it starts uniform. Clients' losses are known to the server one
    by one: this does not go with secure aggregation.

  Raises:
    ConfigError: A rate below 0, or no `num_clients`.
  """
  del weighting
  checks.check_absent(
    "AFL sends each client its own share of the mixture", downlink=downlink
  )
  checks.check_number("mixture_learning_rate", mixture_learning_rate)
  population = checks.check_num_clients(num_clients)
  client = with_sent_loss(
    loss, local.local_update(loss, client_optimizer, weighting="uniform")
  )

  def start(sent, client_state, info):
    return client.start(sent["trainable"], client_state, info)

  def finish(sent, carry, info):
    delta, weight, client_state, metrics = client.finish(
      sent["trainable"], carry, info
    )
    share = sent["mixture"][info.row]
    message = {"delta": trees.scale(delta, share), "share": share}
    metrics["sent_loss"] = carry[1].value()
    return message, weight, client_state, metrics

  def combine(state, mean, result, cohort):
    share = jnp.where(mean["share"] > 0, mean["share"], 1)
    rows = engine.in_cohort_order(cohort, cohort.row)
    here = result.weights > 0
    step = mixture_learning_rate * population / jnp.maximum(jnp.sum(here), 1)
    losses = result.metrics["sent_loss"]
    rise = jnp.where(here & jnp.isfinite(losses), step * losses, 0)
    mixture = state.extra.at[rows].add(rise.astype(state.extra.dtype))
    return trees.scale(mean["delta"], 1 / share), project_to_simplex(mixture)

  def beside(state):  # Up the loss; down, of the mixture, its own share.
    return (state.extra.dtype.itemsize,) * 2

  return algorithm.federated(
    client._replace(start=start, finish=finish),
    server=algorithm.Server(
      init=lambda trainable: jnp.full(
        (population,), 1 / population, trees.sum_dtype(trainable)
      ),
      broadcast=lambda state: {
        "trainable": state.trainable,
        "mixture": state.extra,
      },
      combine=combine,
      direction=lambda message: message["delta"],
      wire=lambda state, sent, message: (sent["trainable"], message),
      beside=beside,
    ),
    server_optimizer=server_optimizer,
    aggregator=aggregator,
    num_clients=population,
    passes=PASSES,
    **options,
  )
