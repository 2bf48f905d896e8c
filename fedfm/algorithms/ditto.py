"""Ditto (Li et al. 2021, arXiv 2012.04221): a private copy near the global.

client i   w_i by local steps on F_i from w_t                 (as FedAvg)
           v_i <- v_i - eta (grad F_i(v_i) + lam (v_i - w_t)) stays with it
server     w <- w + sum_i p_i (w_i - w_t)
"""

from typing import Any

import jax

from fedfm.algorithms import algorithm, checks
from fedfm.clients import local
from fedfm.types import ClientUpdate, FederatedAlgorithm, LossFn, Passes


def ditto(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  lam: float = 1.0,
  weighting: str = "examples",
  num_clients: int | None = None,
  **options: Any,
) -> FederatedAlgorithm:
  """Trains a global model and, on the same batches, one of each client's own.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Of both models, afresh every round; or a function of the
      round giving one.
    lam: Strength of the pull of the private model to the global one, at least
      0; 0 is training alone.
    weighting: Of the global deltas: "examples", "tokens" or "uniform".
    num_clients: Size of the population.
    **options: `server_optimizer`, `aggregator`, `seed` and others of
      `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm` whose clients keep v_i, which starts as the initial
    trainable.

  Raises:
    ConfigError: A negative or non-finite `lam`.
  """
  checks.check_number("lam", lam)

  def pull(grads, trainable, sent):
    return jax.tree.map(
      lambda g, v, w_t: g + lam * (v - w_t), grads, trainable, sent
    )

  shared = local.local_update(loss, client_optimizer, weighting=weighting)
  private = local.local_update(loss, client_optimizer, correction=pull)

  def start(sent, v, info):
    return shared.start(sent, (), info), private.start(v, sent, info)

  def step(carry, base, batch, key):
    w, v = carry
    return shared.step(w, base, batch, key), private.step(v, base, batch, key)

  def finish(sent, carry, info):
    w, v = carry
    delta, weight, _, metrics = shared.finish(sent, w, info)
    return delta, weight, v.trainable, metrics

  return algorithm.federated(
    ClientUpdate(start, step, finish),
    client_state=lambda trainable: trainable,
    personal=lambda state, v: v,
    num_clients=num_clients,
    passes=Passes(forwards=2, backwards=2),
    **options,
  )
