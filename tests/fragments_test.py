"""Fragments of a model, and when they are exchanged."""

import jax
import jax.numpy as jnp
import numpy as np

from fedfm.algorithms import fragment_schedule, fragments


def test_fragments_of_a_tree():
  shapes = {
    "embed": jnp.zeros((7, 3)),
    "layers": {"k": jnp.zeros((5, 2, 2)), "n": jnp.zeros((5, 2))},
    "norm": jnp.zeros(3),
  }
  rows = fragments.split(shapes, 2)
  # Layers 0, 2, 4 weigh 18 and 1, 3 weigh 12: the table, of 21, goes to the
  # second, and the norm to the first.
  tree = jax.tree.map(
    lambda x: jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape), shapes
  )
  first, second = (fragments.take(rows, tree, jnp.asarray(p)) for p in (0, 1))
  np.testing.assert_array_equal(first["layers"]["n"], tree["layers"]["n"][::2])
  np.testing.assert_array_equal(second["layers"]["n"], [[2, 3], [6, 7], [0, 0]])
  assert not np.any(first["embed"]) and np.any(second["embed"])
  assert np.any(first["norm"]) and not np.any(second["norm"])
  # Together they are the whole, and nothing twice.
  whole = jax.tree.map(jnp.zeros_like, tree)
  for p, part in enumerate((first, second)):
    whole = fragments.put(rows, whole, part, jnp.asarray(p))
  jax.tree.map(np.testing.assert_array_equal, whole, tree)
  flags = jnp.asarray([True, False])
  chosen = jax.tree.map(lambda r, x: r.select(flags, x, -x), rows, tree)
  only = fragments.put(
    rows, jax.tree.map(jnp.negative, tree), first, jnp.asarray(0)
  )
  jax.tree.map(np.testing.assert_array_equal, chosen, only)


def test_exchanges_of_a_cycle():
  times = fragment_schedule.schedule(10, 3, (7, 0, 3))
  assert times.order == (2, 0, 1)
  steps = [times.local_steps(r) for r in range(7)]
  assert steps == [3, 4, 3, 3, 4, 3, 3]
  assert sum(fragment_schedule.schedule(7, 3).gaps) == 7
