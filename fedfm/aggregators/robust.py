"""Stacking aggregators that bound what a few bad clients can do.

Each sees all messages of the cohort, [clients, ...]; clients of weight 0 are
absent and weights count for nothing else, as robust rules treat clients alike
(the geometric median excepted). Distances are over the whole pytree.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedfm import errors, sums, trees
from fedfm.types import Aggregator

PyTree = Any


def _rows(flags: jax.Array, x: jax.Array) -> jax.Array:
  """Reshapes [clients] to broadcast against x [clients, ...]."""
  return flags.reshape(flags.shape + (1,) * (x.ndim - flags.ndim))


def _integer(name: str, value: Any, least: int) -> int:
  integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
  if not integer or value < least:
    raise errors.ConfigError(
      f"{name}: got {value!r}, expected an integer of at least {least}"
    )
  return int(value)


def _stacking(rule, min_clients: int = 1) -> Aggregator:
  return Aggregator(
    init=lambda message: (),
    add=None,
    finish=lambda state, collected: (rule(*collected), state),
    stacking=True,
    min_clients=min_clients,
  )


def _mean(x: jax.Array, count: jax.Array) -> jax.Array:
  """Sums x [clients, ...] over `count`, in float32; large values too."""
  # By a power of two first, which changes no digit: the sum can't overflow.
  size = 1 << len(x).bit_length()
  share = jnp.maximum(count, 1) / size
  return sums.widen(x).map(lambda x: jnp.sum(x / size, axis=0) / share).narrow()


def _mean_of_sorted(x: jax.Array, present: jax.Array, low, high) -> jax.Array:
  """Mean of the sorted values at ranks [low, high) among present clients."""
  ordered = jnp.sort(jnp.where(_rows(present, x), x, jnp.inf), axis=0)
  ranks = _rows(jnp.arange(x.shape[0]), x)
  inside = (ranks >= low) & (ranks < high)
  return _mean(jnp.where(inside, ordered, 0), high - low)


def median() -> Aggregator:
  """Takes the median of each coordinate. Source: arXiv 1803.01498.

  Examples:
    >>> median().aggregate(jnp.array([1.0, 2.0, 1e30]), jnp.ones(3))
    Array(2., dtype=float32)
  """

  def rule(messages, weights):
    present = weights > 0
    count = jnp.sum(present)
    low, high = jnp.maximum(count - 1, 0) // 2, count // 2 + 1
    high = jnp.where(count > 0, high, 0)
    return jax.tree.map(
      lambda x: _mean_of_sorted(x, present, low, high), messages
    )

  return _stacking(rule)


def trimmed_mean(num_byzantine: int) -> Aggregator:
  """Drops the f smallest and f largest of each coordinate, averages the rest.

  Args:
    num_byzantine: f; needs 2f + 1 clients, fewer aggregate to zero.

  Returns:
    A stacking `Aggregator`. Source: arXiv 1803.01498.

  Raises:
    ConfigError: f below 0, or no integer.
  """
  num_byzantine = _integer("num_byzantine", num_byzantine, 0)

  def rule(messages, weights):
    present = weights > 0
    count = jnp.sum(present)
    return jax.tree.map(
      lambda x: _mean_of_sorted(
        x, present, num_byzantine, count - num_byzantine
      ),
      messages,
    )

  return _stacking(rule, 2 * num_byzantine + 1)


def squared_distances(messages: PyTree) -> jax.Array:
  """Squared distances between clients over the whole tree.

  Args:
    messages: Leaves [clients, ...].

  Returns:
    [clients, clients].
  """

  def to_all(one):
    return jax.lax.map(
      lambda other: trees.squared_norm(trees.sub(one, other)), messages
    )

  return jax.lax.map(to_all, messages)


def _krum_scores(
  distances: jax.Array, present: jax.Array, num_byzantine: int
) -> jax.Array:
  """Sums of squared distances to the n - f - 2 nearest; inf for the absent."""
  n = len(present)
  others = present[None, :] & ~jnp.eye(n, dtype=bool)
  distances = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
  # Overflow to inf must not tie with absence: rank by finite values.
  distances = jnp.minimum(distances, jnp.finfo(distances.dtype).max / n)
  nearest = jnp.sum(present) - num_byzantine - 2
  counted = jnp.arange(n)[None, :] < jnp.maximum(nearest, 1)
  scores = jnp.sum(jnp.where(counted, distances, 0), axis=1)
  return jnp.where(present, scores, jnp.inf)


def krum(num_byzantine: int) -> Aggregator:
  """Picks the message nearest to its n - f - 2 nearest neighbours.

  Args:
    num_byzantine: f; needs 2f + 3 clients, fewer aggregate to zero.

  Returns:
    A stacking `Aggregator`. Source: Blanchard et al., arXiv 1703.02757.

  Raises:
    ConfigError: f below 0, or no integer.
  """
  num_byzantine = _integer("num_byzantine", num_byzantine, 0)

  def rule(messages, weights):
    distances = squared_distances(messages)
    best = jnp.argmin(_krum_scores(distances, weights > 0, num_byzantine))
    return jax.tree.map(lambda x: x[best], messages)

  return _stacking(rule, 2 * num_byzantine + 3)


def bulyan(num_byzantine: int) -> Aggregator:
  """Averages what lies nearest to the median, of messages that Krum picked.

  Krum picks n - 2f messages, one after the other, each of those that are left;
  of every coordinate of these, the n - 4f values nearest to their median are
  averaged. The last picks have less than f + 3 messages left to be near to, and
  then count the nearest one.

  Args:
    num_byzantine: f; needs 4f + 3 clients, fewer aggregate to zero.

  Returns:
    A stacking `Aggregator`. Source: El Mhamdi et al., arXiv 1802.07927.

  Raises:
    ConfigError: f below 0, or no integer.
  """
  num_byzantine = _integer("num_byzantine", num_byzantine, 0)

  def rule(messages, weights):
    present = weights > 0
    count = jnp.sum(present)
    distances = squared_distances(messages)

    def pick(index, left_and_chosen):
      left, chosen = left_and_chosen
      best = jnp.argmin(_krum_scores(distances, left, num_byzantine))
      picks = index < count - 2 * num_byzantine
      return (
        left.at[best].set(left[best] & ~picks),
        chosen.at[best].set(chosen[best] | (picks & left[best])),
      )

    nobody = jnp.zeros_like(present)
    _, chosen = jax.lax.fori_loop(0, len(present), pick, (present, nobody))
    picked = jnp.sum(chosen)
    low, high = jnp.maximum(picked - 1, 0) // 2, picked // 2 + 1
    kept = picked - 2 * num_byzantine

    def nearest_to_median(x):
      middle = _mean_of_sorted(x, chosen, low, high)
      away = jnp.where(_rows(chosen, x), jnp.abs(x - middle), jnp.inf)
      order = jnp.argsort(away, axis=0)
      inside = _rows(jnp.arange(len(x)) < kept, x)
      near = jnp.where(inside, jnp.take_along_axis(x, order, axis=0), 0)
      return _mean(near, kept)

    return jax.tree.map(nearest_to_median, messages)

  return _stacking(rule, 4 * num_byzantine + 3)


def geometric_median(
  smoothing: float = 1e-6, iterations: int = 100
) -> Aggregator:
  """Finds the point of least weighted distance to all messages.

  Args:
    smoothing: Least distance that Weiszfeld's step divides by.
    iterations: Weiszfeld steps.

  Returns:
    A stacking `Aggregator`. Source: RFA, arXiv 1912.13445.

  Raises:
    ConfigError: A smoothing that is not above 0, or iterations that are no
      integer of at least 1.
  """
  if not smoothing > 0:
    raise errors.ConfigError(f"smoothing: got {smoothing}, expected above 0")
  iterations = _integer("iterations", iterations, 1)

  def mean(messages, weights):
    total = jnp.sum(weights)
    # Normalised first: huge messages times large weights would overflow.
    shares = weights / jnp.where(total > 0, total, 1)
    return sums.weighted(shares, messages)

  def rule(messages, weights):
    wide = sums.widen(messages)
    messages = wide.tree
    weights = weights.astype(jnp.result_type(*jax.tree.leaves(messages)))

    def step(_, centre):
      distance = jax.lax.map(
        lambda m: trees.norm(trees.sub(m, centre)), messages
      )
      return mean(messages, weights / jnp.maximum(distance, smoothing))

    centre = jax.lax.fori_loop(0, iterations, step, mean(messages, weights))
    return dataclasses.replace(wide, tree=centre).narrow()

  return _stacking(rule)
