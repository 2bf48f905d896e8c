"""What every round reports of its clients: loss, numbers, drift."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import sums, trees
from fedfm.clients import engine
from fedfm.types import ClientUpdate

PyTree = Any


def measured(
  update: ClientUpdate, direction: Callable[[PyTree], PyTree]
) -> ClientUpdate:
  """Adds `sent_norm` to a client's metrics: how far it pulls the server.

  Args:
    update: What a client does, compression included.
    direction: `direction(message) -> tree`, of `Server`.

  Returns:
    A `ClientUpdate`.
  """

  def finish(broadcast, carry, info):
    message, weight, client_state, metrics = update.finish(
      broadcast, carry, info
    )
    norm = trees.norm(direction(message))
    return message, weight, client_state, metrics | {"sent_norm": norm}

  return update._replace(finish=finish)


def round_metrics(
  result: engine.CohortResult, mean_norm: jax.Array
) -> dict[str, jax.Array]:
  """Summarises the clients of a round into scalars.

  Args:
    result: What the cohort brought back.
    mean_norm: Norm of the mean of what clients sent, as in `drift`.

  Returns:
    `train/loss` (over all tokens or examples trained on, nats; 0 where no
    client takes part), `train/count`, `clients/participating`,
    `clients/nonfinite`, and those of `drift`.
  """
  kept = result.weights > 0
  metrics = {k: jnp.where(kept, v, 0) for k, v in result.metrics.items()}
  count = sums.total(metrics["count"])
  return {
    "train/loss": jnp.where(
      count > 0,
      sums.total(metrics["loss_sum"]) / jnp.where(count > 0, count, 1),
      0,
    ),
    "train/count": count,
    "clients/participating": jnp.sum(kept),
    "clients/nonfinite": jnp.sum(result.nonfinite),
    **drift(result, mean_norm),
  }


def drift(
  result: engine.CohortResult,
  mean_norm: jax.Array,
  sent_norms: jax.Array | None = None,
) -> dict[str, jax.Array]:
  """Says how far the clients went, and how far they agree.

  Args:
    result: What the cohort brought back.
    mean_norm: Norm of D, the mean of what the clients sent, before anything
      else is made of it.
    sent_norms: [clients], of what they sent, d_i; default as `measured`. It is
      the delta where nothing rescaled or compressed that.

  Returns:
    `drift/delta_norm` (of the local work, mean over clients),
    `drift/delta_norm_max`, `drift/cosine` and `drift/diversity`. With p_i the
    clients' shares of the weight, the cosine is |D| / sum_i p_i |d_i|: where D
    is the weighted mean, that is the mean of cos(d_i, D) weighted by p_i |d_i|.
    The diversity is sum_i p_i |d_i|^2 / |D|^2 (arXiv 1706.05699), 1 where all
    clients agree.
  """
  weights = result.weights
  kept = weights > 0
  norms = jnp.where(kept, result.metrics["delta_norm"], 0)
  if sent_norms is None:
    sent_norms = result.metrics["sent_norm"]
  sent = jnp.where(kept, sent_norms, 0)
  total = sums.total(weights)
  shares = weights / jnp.where(total > 0, total, 1)
  moved = mean_norm > 0
  mean_norm = jnp.where(moved, mean_norm, 1)
  longest = jnp.maximum(sums.total(shares * sent), jnp.finfo(sent.dtype).tiny)
  diversity = sums.total(shares * jnp.square(sent)) / jnp.square(mean_norm)
  return {
    "drift/delta_norm": sums.total(norms) / jnp.maximum(jnp.sum(kept), 1),
    "drift/delta_norm_max": jnp.max(norms, initial=0),
    "drift/cosine": jnp.where(moved, mean_norm / longest, 0),
    "drift/diversity": jnp.where(moved, diversity, 0),
  }
