"""Streaming means: sums that a lane keeps while its clients go by."""

import jax
import jax.numpy as jnp

from fedfm import trees
from fedfm.types import Aggregator


def weighted_mean() -> Aggregator:
  """Averages messages by weight; the mean over no clients is zero.

  Returns:
    A streaming `Aggregator`. Source: FedAvg, arXiv 1602.05629.

  Examples:
    >>> weighted_mean().aggregate(jnp.array([1.0, 4.0]), jnp.array([2.0, 1.0]))
    Array(2., dtype=float32)
  """

  def add(state, message, weight):
    del state
    weighted = jax.tree.map(lambda m: m * weight.astype(m.dtype), message)
    return weighted, weight

  def finish(state, collected):
    total, weight = collected
    weight = jnp.where(weight > 0, weight, 1)
    return jax.tree.map(lambda t: t / weight.astype(t.dtype), total), state

  return Aggregator(init=lambda message: (), add=add, finish=finish)


def none() -> Aggregator:
  """Keeps nothing, for cohorts that are run for their metrics only."""
  return Aggregator(
    init=lambda message: (),
    add=lambda state, message, weight: trees.zeros_like(weight),
    finish=lambda state, collected: ((), state),
  )
