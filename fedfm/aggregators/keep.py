"""Keeping every client's message beside what an aggregator makes of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedfm.aggregators.mean import weighted_mean
from fedfm.types import Aggregator

PyTree = Any


class Kept(NamedTuple):
  """An aggregate, and what it was made of.

  Attributes:
    update: What the aggregator returns.
    messages: Leaves [clients, ...], zero for absent clients.
    shares: [clients], weights over their sum; all 0 without a client.
  """

  update: PyTree
  messages: PyTree
  shares: jax.Array


def keep(aggregator: Aggregator | None = None) -> Aggregator:
  """Keeps all messages of a cohort, for servers that need each of them.

  Args:
    aggregator: Default the weighted mean.

  Returns:
    A stacking `Aggregator` whose update is a `Kept`.

  Examples:
    >>> messages, weights = jnp.array([1.0, 4.0]), jnp.array([2.0, 1.0])
    >>> kept = keep().aggregate(messages, weights)
    >>> kept.update, kept.shares
    (Array(2., dtype=float32), Array([0.6666667 , 0.33333334], dtype=float32))
  """
  inner = weighted_mean() if aggregator is None else aggregator

  def finish(state, collected):
    messages, weights = collected
    collected = inner.collect(state, messages, weights)
    update, state = inner.finish(state, collected)
    # At the messages' own precision: weights are float32.
    dtypes = [x.dtype for x in jax.tree.leaves(messages)]
    weights = weights.astype(jnp.result_type(jnp.float32, *dtypes))
    total = jnp.sum(weights)
    shares = weights / jnp.where(total > 0, total, 1)
    return Kept(update, messages, shares), state

  return Aggregator(
    init=inner.init,
    add=None,
    finish=finish,
    stacking=True,
    min_clients=inner.min_clients,
  )
