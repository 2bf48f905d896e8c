"""Streaming means: sums that a lane keeps while its clients go by."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from fedfm import sums, trees
from fedfm.types import Aggregator

PyTree = Any


def weighted_mean() -> Aggregator:
  """Averages messages by weight; the mean over no clients is zero.

  Sums are taken in at least float32, whatever the messages are.

  Returns:
    A streaming `Aggregator`. Source: FedAvg, arXiv 1602.05629.

  Examples:
    >>> weighted_mean().aggregate(jnp.array([1.0, 4.0]), jnp.array([2.0, 1.0]))
    Array(2., dtype=float32)
  """

  def add(state, message, weight):
    del state
    wide = sums.widen(message)
    return wide.map(lambda m: m * weight.astype(m.dtype)), weight

  def finish(state, collected):
    total, weight = collected
    weight = jnp.where(weight > 0, weight, 1)
    return total.map(lambda t: t / weight.astype(t.dtype)).narrow(), state

  return Aggregator(init=lambda message: (), add=add, finish=finish)


def none() -> Aggregator:
  """Keeps nothing, for cohorts that are run for their metrics only."""
  return Aggregator(
    init=lambda message: (),
    add=lambda state, message, weight: trees.zeros_like(weight),
    finish=lambda state, collected: ((), state),
  )


def uniform_mean() -> Aggregator:
  """Averages messages, all clients alike; the mean over no clients is zero.

  Returns:
    A streaming `Aggregator`.

  Examples:
    >>> uniform_mean().aggregate(jnp.array([1.0, 4.0]), jnp.array([2.0, 1.0]))
    Array(2.5, dtype=float32)
  """
  mean = weighted_mean()

  def add(state, message, weight):
    assert mean.add is not None
    return mean.add(state, message, (weight > 0).astype(weight.dtype))

  return mean._replace(add=add)


def apart(**parts: Aggregator) -> Aggregator:
  """Aggregates each part of a message with an aggregator of its own.

  Args:
    **parts: For each name of the message, a dict, its aggregator.

  Returns:
    An `Aggregator` of the same names; it stacks where any part does.

  Examples:
    >>> apart(x=weighted_mean(), y=uniform_mean()).aggregate(
    ...   {"x": jnp.array([1.0, 4.0]), "y": jnp.array([1.0, 4.0])},
    ...   jnp.array([2.0, 1.0]),
    ... )
    {'x': Array(2., dtype=float32), 'y': Array(2.5, dtype=float32)}
  """
  return _side_by_side(parts, lambda message, name: message[name])


def each(**parts: Aggregator) -> Aggregator:
  """Aggregates the same message, sent once, in several ways.

  Args:
    **parts: The aggregators, by a name of what they give.

  Returns:
    An `Aggregator` whose update is a dict of these names; it stacks where any
    part does.

  Examples:
    >>> each(x=weighted_mean(), y=uniform_mean()).aggregate(
    ...   jnp.array([1.0, 4.0]), jnp.array([2.0, 1.0])
    ... )
    {'x': Array(2., dtype=float32), 'y': Array(2.5, dtype=float32)}
  """
  return _side_by_side(parts, lambda message, name: message)


def _side_by_side(
  parts: dict[str, Aggregator], pick: Callable[[PyTree, str], PyTree]
) -> Aggregator:
  stacking = any(part.stacking for part in parts.values())

  def init(message):
    return {k: part.init(pick(message, k)) for k, part in parts.items()}

  def add(state, message, weight):
    return {
      k: part.add(state[k], pick(message, k), weight)
      for k, part in parts.items()
      if part.add is not None
    }

  def finish(state, collected):
    update, new_state = {}, {}
    for k, part in parts.items():
      if not stacking:
        own = collected[k]
      else:
        messages, weights = collected
        own = part.collect(state[k], pick(messages, k), weights)
      update[k], new_state[k] = part.finish(state[k], own)
    return update, new_state

  return Aggregator(
    init=init,
    add=None if stacking else add,
    finish=finish,
    stacking=stacking,
    min_clients=max(part.min_clients for part in parts.values()),
  )
