"""States of a client store that tell whose they are, and its versions."""

import jax
import jax.numpy as jnp
import numpy as np

from fedfm.clients.host_store import HostStore

N = 6
STATE = {
  "a": np.arange(6, dtype=np.float32).reshape(2, 3),
  "count": np.int32(7),
  "half": np.ones(3, jnp.bfloat16),
  "none": np.zeros((0, 4), np.float32),
}


def states_of(rows, version=0):
  """States that tell their row and version."""
  return jax.tree.map(
    lambda x: np.stack(
      [x + np.asarray(10 * r + version, x.dtype) for r in rows]
    ),
    STATE,
  )


def assert_equal(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.float32(x), np.float32(y))


def initial(count):
  return jax.tree.map(lambda x: np.stack([x] * count), STATE)


def written(folder, oldest=0):
  """A store of three versions; the last row is never written."""
  made = again_of(folder, oldest)
  for version, rows in ((1, [0, 3]), (2, [3, 4]), (3, [0, 1, 3])):
    made.write(rows, states_of(rows, version), version)
  return made


def again_of(folder, oldest=0):
  """The store as the next process finds it."""
  return HostStore(folder, STATE, N, oldest=lambda: oldest)


# The version in which each row was written last, as of each version.
HISTORY = {
  3: {0: 3, 1: 3, 3: 3, 4: 2},
  2: {0: 1, 3: 2, 4: 2},
  1: {0: 1, 3: 1},
  0: {},
}


def assert_is(read, version):
  for row in range(N):
    last = HISTORY[version].get(row)
    expected = initial(1) if last is None else states_of([row], last)
    assert_equal(read(np.array([row])), expected)
