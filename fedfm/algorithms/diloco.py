"""DiLoCo (Douillard et al. 2023, arXiv 2311.08105).

For replica m = 1 .. M, H steps:  w_m <- AdamW(w_m), starting from w
D   = sum_m p_m (w - w_m)                      the outer gradient
buf <- mu buf + D
w   <- w - eta (D + mu buf)                    Nesterov; eta = 0.7, mu = 0.9

The moments of AdamW, and its count of steps, stay with the replica: they are
neither averaged nor started anew. buf starts at 0, so the first outer step is
eta (1 + mu) D. FedAvg, with kept inner moments, is eta = 1, mu = 0; with one
replica that is the plain inner run.

A client is a replica. One that sits out a round keeps its moments; one that
joins later starts with none. H is the number of local steps that the cohort is
packed with.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from fedfm.algorithms import algorithm
from fedfm.clients import local
from fedfm.types import ClientUpdate, FederatedAlgorithm, LossFn

PyTree = Any
OUTER_RATE, OUTER_MOMENTUM = 0.7, 0.9


def outer_optimizer(
  learning_rate: optax.ScalarOrSchedule = OUTER_RATE,
  momentum: float = OUTER_MOMENTUM,
) -> optax.GradientTransformation:
  """The outer optimizer of the paper: SGD with Nesterov momentum.

  Args:
    learning_rate: eta, or a schedule of it over rounds.
    momentum: mu.

  Returns:
    An optax transformation.
  """
  return optax.sgd(learning_rate, momentum, nesterov=True)


def diloco(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  server_optimizer: optax.GradientTransformation | None = None,
  weighting: str = "uniform",
  **options,
) -> FederatedAlgorithm:
  """Averages replicas every H steps; inner optimizers live on.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Inner optimizer, in the paper `optax.adamw`. A schedule
      inside of it goes on over rounds, as its count of steps is kept.
    server_optimizer: Outer optimizer, default `outer_optimizer()`.
    weighting: "examples", "tokens" or, as in the paper, "uniform".
    **options: `num_clients` (needed: inner states are kept for each), `seed`,
      `aggregator` and others of `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm`; pack its cohorts with `aligned=True` where all
    clients are replicas, so that their states stay on their devices.
  """
  update = local.local_update(loss, client_optimizer, weighting=weighting)
  return algorithm.federated(
    keep_optimizer(update),
    server_optimizer=server_optimizer or outer_optimizer(),
    client_state=fresh_optimizer(client_optimizer),
    aligned=True,
    **options,
  )


def keep_optimizer(update: ClientUpdate) -> ClientUpdate:
  """Hands a client's optimizer state from one round to its next.

  Args:
    update: From `local.local_update`.

  Returns:
    A `ClientUpdate` whose client state is the optimizer's.
  """

  def start(broadcast, optimizer_state, info):
    fresh = update.start(broadcast, (), info)
    return fresh._replace(optimizer=optimizer_state)

  def finish(broadcast, carry, info):
    delta, weight, _, metrics = update.finish(broadcast, carry, info)
    return delta, weight, carry.optimizer, metrics

  return update._replace(start=start, finish=finish)


def fresh_optimizer(
  optimizer: local.ClientOptimizer,
) -> Callable[[PyTree], PyTree]:
  """Returns `trainable -> optimizer state` of a replica that takes up work."""

  def fresh(trainable):
    first = jnp.zeros((), jnp.int32)
    return local.as_optimizer(optimizer, first).init(trainable)

  return fresh
