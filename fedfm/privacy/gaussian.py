"""Central DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963).

  D = (sum_i clip(d_i, C) + N(0, (z C)^2 I)) / q N

over the clients i of a cohort, all alike. q N is the cohort that is expected,
a constant: the size of the cohort that came would tell who is in it. A round
without clients releases its noise all the same.

Floats have gaps, and noise that is drawn in them has too (Mironov 2012): the
guarantee is that of the real numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedfm import sums
from fedfm.privacy.clip import check_count, check_norm, check_positive, clip
from fedfm.privacy.mechanism import Mechanism, Release
from fedfm.types import Aggregator

PyTree = Any


def gaussian(
  *, clip_norm: float, noise_multiplier: float, expected_clients: int
) -> Mechanism:
  """Clips, sums, adds noise, and divides by the expected cohort.

  Args:
    clip_norm: C, the largest norm of a client's delta.
    noise_multiplier: z, the noise's standard deviation over C; 0 for none.
    expected_clients: q N.

  Returns:
    A streaming `Mechanism`. Its noise is a function of the key alone, the same
    on any mesh.

  Raises:
    PrivacyError: A number out of range.

  Examples:
    >>> mean = gaussian(clip_norm=1.0, noise_multiplier=0, expected_clients=4)
    >>> sent, weights = jnp.array([[3.0, 4.0]]), jnp.ones(1)
    >>> mean.aggregator.aggregate(sent, weights)["sum"].tree
    Array([0.6, 0.8], dtype=float32)
  """
  check_norm("clip_norm", clip_norm)
  check_positive("noise_multiplier", noise_multiplier, zero=True)
  if noise_multiplier:
    check_norm("noise_multiplier x clip_norm", noise_multiplier * clip_norm)
  check_count("expected_clients", expected_clients)

  def add(state, message, weight):
    del state
    there = weight > 0
    # Clipped wide: rounding to bfloat16 after it could pass the clip norm.
    wide, clipped = clip(sums.widen(message), clip_norm)
    # As a float: a sum of flags is a count.
    return {
      "sum": wide.map(lambda m: m * there.astype(m.dtype)),
      "clipped": (there & clipped).astype(jnp.float32),
    }

  def release(total, state, weights, key):
    noise = normal_like(key, total["sum"])
    update = jax.tree.map(
      lambda s, n: (s + noise_multiplier * clip_norm * n) / expected_clients,
      total["sum"],
      noise,
    ).narrow()
    count = jnp.maximum(jnp.sum(weights > 0), 1)
    metrics = {"privacy/clipped": total["clipped"] / count}
    return Release(update, state, jnp.asarray(True), metrics)

  aggregator = Aggregator(
    init=lambda message: (),
    add=add,
    finish=lambda state, collected: (collected, state),
    min_clients=0,
  )
  return Mechanism(aggregator, release)


def normal_like(key: jax.Array, tree: PyTree) -> PyTree:
  """Draws standard normal noise, a key for each leaf.

  Args:
    key: Typed key.
    tree: Floats.

  Returns:
    Noise of the same shapes and dtypes, drawn in at least float32.
  """
  leaves, treedef = jax.tree.flatten(tree)
  drawn = []
  for index, x in enumerate(leaves):
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    own = jax.random.fold_in(key, index)
    drawn.append(jax.random.normal(own, x.shape, dtype).astype(x.dtype))
  return treedef.unflatten(drawn)
