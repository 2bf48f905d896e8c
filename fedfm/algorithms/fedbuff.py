"""FedBuff (Nguyen et al. 2022, arXiv 2106.06639): buffered asynchrony.

Clients arrive when they are done, and the server steps when a buffer of them is
full. A round is one such step, its cohort the buffer:

  client i   started from w_(t - tau_i), the model of tau_i steps ago
             D_i = w_i - w_(t - tau_i)
  server     w <- w + sum_i p_i D_i / sqrt(1 + tau_i)

Arrival is simulated: tau_i is a pure function of (seed, round, client), by
default a half-normal duration, which the paper found in production.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import trees
from fedfm.algorithms import algorithm, checks
from fedfm.clients import local
from fedfm.types import ClientInfo, FederatedAlgorithm, LossFn

_DELAY_KEY = 0x80000000  # Folded into a client's key, apart from its steps'.


def half_normal_delay(mean: float) -> Callable[[ClientInfo], jax.Array]:
  """Draws delays from a half-normal distribution, rounded to whole steps.

  Args:
    mean: Mean delay before rounding, in server steps.

  Returns:
    `delay(info) -> int32 scalar`.
  """

  def delay(info):
    key = jax.random.fold_in(info.key, _DELAY_KEY)
    scale = mean * jnp.sqrt(jnp.pi / 2)
    duration = jnp.abs(jax.random.normal(key)) * scale
    return jnp.round(duration).astype(jnp.int32)

  return delay


def fedbuff(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  mean_delay: float = 2.0,
  max_delay: int = 8,
  delay: Callable[[ClientInfo], jax.Array] | None = None,
  downlink: checks.Absent = None,
  weighting: str = "uniform",
  **options: Any,
) -> FederatedAlgorithm:
  """Averages the deltas of clients that started from models of the past.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    mean_delay: Server steps that a client takes on average, at least 0: the
      clients at work over the size of the buffer.
    max_delay: Longest delay; as many past models are remembered.
    delay: `delay(info) -> int`, another delay model; `mean_delay` is not read.
    downlink: None: clients start from models of different rounds.
    weighting: "examples", "tokens" or "uniform", the paper's.
    **options: `server_optimizer`, `aggregator`, `seed`, `transforms` and others
      of `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm` whose `extra` is the past models, newest first.

  Raises:
    ConfigError: A delay below 0.
  """
  checks.check_absent(
    "FedBuff's clients start from models of different rounds, not from one "
    "that all heard",
    downlink=downlink,
  )
  checks.check_number("mean_delay", mean_delay)
  checks.check_number("max_delay", max_delay)
  delay = delay or half_normal_delay(mean_delay)
  client = local.local_update(loss, client_optimizer, weighting=weighting)

  def broadcast(state):
    models = jax.tree.map(
      lambda w, past: jnp.concatenate([w[None], past]),
      state.trainable,
      state.extra["past"],
    )
    return {"models": models, "steps": state.extra["steps"]}

  def staleness(sent, info):
    return jnp.clip(delay(info), 0, jnp.minimum(sent["steps"], max_delay))

  def started_from(sent, info):
    tau = staleness(sent, info)
    return jax.tree.map(lambda x: x[tau], sent["models"])

  def start(sent, client_state, info):
    return client.start(started_from(sent, info), client_state, info)

  def finish(sent, carry, info):
    delta, weight, client_state, metrics = client.finish(
      started_from(sent, info), carry, info
    )
    discount = 1 / jnp.sqrt(1.0 + staleness(sent, info))
    return trees.scale(delta, discount), weight, client_state, metrics

  def init(trainable):
    past = jax.tree.map(
      lambda w: jnp.broadcast_to(w, (max_delay, *w.shape)), trainable
    )
    return {"past": past, "steps": jnp.zeros((), jnp.int32)}

  def combine(state, mean, result, cohort):
    past = jax.tree.map(
      lambda w, past: jnp.concatenate([w[None], past])[:max_delay],
      state.trainable,
      state.extra["past"],
    )
    return mean, {"past": past, "steps": state.extra["steps"] + 1}

  return algorithm.federated(
    client._replace(start=start, finish=finish),
    server=algorithm.Server(
      init=init,
      broadcast=broadcast,
      combine=combine,
      # One model, of whatever age.
      wire=lambda state, sent, message: (state.trainable, message),
    ),
    **options,
  )
