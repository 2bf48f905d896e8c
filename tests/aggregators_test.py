"""Aggregators alone, against NumPy and under attack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from fedfm import aggregators, errors

N, F = 9, 2
BULYAN_F = 1
MAKERS = {
  "weighted_mean": aggregators.weighted_mean,
  "median": aggregators.median,
  "trimmed_mean": lambda: aggregators.trimmed_mean(F),
  "krum": lambda: aggregators.krum(F),
  "bulyan": lambda: aggregators.bulyan(BULYAN_F),
  "geometric_median": aggregators.geometric_median,
}
ROBUST = [name for name in MAKERS if name != "weighted_mean"]
ALIKE = (
  "median",
  "trimmed_mean",
  "krum",
  "bulyan",
)  # These do not read weights.


@functools.cache
def aggregate(name):
  return jax.jit(MAKERS[name]().aggregate)


def messages(n=N, seed=0):
  """A tree of float32 messages, each [n, ...]."""
  rng = np.random.default_rng(seed)
  return {
    "w": rng.normal(size=(n, 3, 2)).astype(np.float32),
    "b": [1 + rng.normal(size=n).astype(np.float32)],
  }


def weights(n=N, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(1, 20, n).astype(np.float32)


def matrix(tree):
  """[n, ...] leaves as one float64 matrix [n, dim]."""
  return np.concatenate(
      [np.asarray(x, np.float64).reshape(len(x), -1) for x in
       jax.tree.leaves(tree)],
      axis=1,
  )  # fmt: skip


def vector(tree):
  return np.concatenate(
    [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  )


def numpy_krum(x, f):
  """Which row is nearest to its n - f - 2 (at least one) nearest ones."""
  n, distances = len(x), ((x[:, None] - x[None]) ** 2).sum(-1)
  return np.argmin(
    [
      np.sort(np.delete(distances[i], i))[: max(n - f - 2, 1)].sum()
      for i in range(n)
    ]
  )


def numpy_rule(name, x, w):
  """The rule in NumPy, float64: x [n, dim], w [n], all of them present."""
  n = len(x)
  if name == "weighted_mean":
    return w @ x / w.sum()
  if name == "median":
    return np.median(x, axis=0)
  if name == "trimmed_mean":
    return np.sort(x, axis=0)[F : n - F].mean(axis=0)
  if name == "krum":
    return x[numpy_krum(x, F)]
  if name == "bulyan":
    picked, left = [], list(range(n))
    while len(picked) < n - 2 * BULYAN_F:
      picked.append(left.pop(numpy_krum(x[left], BULYAN_F)))
    near = x[picked]
    away = np.abs(near - np.median(near, axis=0))
    order = np.argsort(away, axis=0)[: len(near) - 2 * BULYAN_F]
    return np.take_along_axis(near, order, axis=0).mean(axis=0)
  centre = w @ x / w.sum()
  for _ in range(2000):
    share = w / np.maximum(np.linalg.norm(x - centre, axis=1), 1e-12)
    centre = share @ x / share.sum()
  return centre


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("n", [N, 8])
def test_equals_numpy(name, n):
  for seed in range(3):
    x, w = messages(n, seed), weights(n, seed).astype(np.float64)
    got = vector(aggregate(name)(x, jnp.asarray(w, jnp.float32)))
    expected = numpy_rule(name, matrix(x), w)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_keeps_structure_shapes_and_dtypes(name):
  got = aggregate(name)(messages(), weights())
  expected = jax.tree.map(lambda x: x[0], messages())
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    assert a.shape == b.shape
    assert a.dtype == b.dtype


@pytest.mark.parametrize("name", MAKERS)
def test_ignores_absent_and_nonfinite_clients(name):
  x, w = messages(), weights()
  expected = numpy_rule(name, matrix(x), w.astype(np.float64))
  # Between the rows, so that position is no help.
  places = np.array([0, 1, 2, 5, 6, 7, 8, 10, 11])
  wide = jax.tree.map(
    lambda leaf: np.full((12, *leaf.shape[1:]), 1e4, np.float32), x
  )
  for target, leaf in zip(jax.tree.leaves(wide), jax.tree.leaves(x)):
    target[places] = leaf
  wide_weights = np.zeros(12, np.float32)
  wide_weights[places] = w
  absent = vector(aggregate(name)(wide, wide_weights))
  np.testing.assert_allclose(absent, expected, rtol=1e-4, atol=1e-5)
  # Contents of absent rows, and rows with one bad element, weigh nothing.
  wide["w"][3] = np.nan
  wide["b"][0][4] = np.inf
  wide["w"][9, 0, 0] = -np.inf
  wide_weights[[4, 9]] = 5
  np.testing.assert_array_equal(
    vector(aggregate(name)(wide, wide_weights)), absent
  )
  wide["b"][0][4] = 0
  wide_weights[4] = np.nan
  np.testing.assert_array_equal(
    vector(aggregate(name)(wide, wide_weights)), absent
  )


@pytest.mark.parametrize("name", MAKERS)
def test_nobody_aggregates_to_zero(name):
  got = vector(aggregate(name)(messages(), np.zeros(N, np.float32)))
  np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize("name", MAKERS)
def test_permutation_of_clients_changes_nothing(name):
  x, w = messages(), weights()
  order = np.random.default_rng(1).permutation(N)
  got = aggregate(name)(jax.tree.map(lambda a: a[order], x), w[order])
  np.testing.assert_allclose(
    vector(got), vector(aggregate(name)(x, w)), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize("name", MAKERS)
def test_translation_and_scale_go_through(name):
  x, w = messages(), weights()
  got = aggregate(name)(jax.tree.map(lambda a: 4 * a + 2, x), w)
  expected = 4 * vector(aggregate(name)(x, w)) + 2
  np.testing.assert_allclose(vector(got), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MAKERS)
def test_equal_messages_aggregate_to_themselves(name):
  one = jax.tree.map(lambda a: np.repeat(a[:1], N, axis=0), messages())
  got = vector(aggregate(name)(one, weights()))
  np.testing.assert_allclose(got, matrix(one)[0], rtol=1e-5)


@pytest.mark.parametrize("name", ALIKE)
def test_weights_only_say_who_is_there(name):
  x = messages()
  got = vector(aggregate(name)(x, weights()))
  np.testing.assert_array_equal(
    got, vector(aggregate(name)(x, np.ones(N, np.float32)))
  )


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("size", [1e3, 1e15, 1e20, 1e30, -1e30, 3e38])
def test_byzantine_rows_stay_bounded(name, size):
  x, w = messages(), np.ones(N, np.float32)
  honest = matrix(x)[F:]
  for leaf in jax.tree.leaves(x):
    leaf[:F] = size
  got = vector(aggregate(name)(x, w))
  # The geometric median stays within a few radii of the honest ones.
  radius = np.abs(honest - np.median(honest, axis=0)).max()
  slack = 2 * radius if name == "geometric_median" else 1e-5
  assert (got >= honest.min(axis=0) - slack).all()
  assert (got <= honest.max(axis=0) + slack).all()


def test_opposite_giants_stay_bounded():
  x = messages()
  for leaf in jax.tree.leaves(x):
    leaf[0], leaf[1] = 1e30, -1e30
  for name in ROBUST:
    got = vector(aggregate(name)(x, np.ones(N, np.float32)))
    assert np.abs(got).max() < 10, name


def test_no_trimming_is_the_plain_mean():
  x = messages()
  got = jax.jit(aggregators.trimmed_mean(0).aggregate)(x, np.ones(N))
  np.testing.assert_allclose(vector(got), matrix(x).mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize(
  ("name", "needed"),
  [
    ("trimmed_mean", 2 * F + 1),
    ("krum", 2 * F + 3),
    ("bulyan", 4 * BULYAN_F + 3),
  ],
)
def test_too_few_clients_aggregate_to_zero(name, needed):
  w = np.zeros(N, np.float32)
  w[: needed - 1] = 1
  assert not vector(aggregate(name)(messages(), w)).any()
  w[needed - 1] = 1
  assert vector(aggregate(name)(messages(), w)).any()
  assert MAKERS[name]().min_clients == needed


def test_krum_returns_a_message():
  x, w = messages(), np.ones(N, np.float32)
  for seed in range(3):
    x = messages(seed=seed)
    got = vector(aggregate("krum")(x, w))
    assert (matrix(x) == got).all(axis=1).sum() == 1


def test_float64_stays_float64():
  with jax.enable_x64(True):
    x = np.random.default_rng(0).normal(size=(N, 4))
    for name in MAKERS:
      got = aggregate(name)(x, np.ones(N))
      assert got.dtype == jnp.float64
      expected = numpy_rule(name, x, np.ones(N))
      limit = 1e-6 if name == "geometric_median" else 1e-12
      np.testing.assert_allclose(got, expected, rtol=limit, err_msg=name)


def test_small_floats_are_averaged_in_float32():
  """A bfloat16 stops counting at 256; the mean of 300 is exact."""
  narrow = jnp.concatenate([jnp.ones((299, 2)), jnp.full((1, 2), 301.0)])
  x = {"w": narrow.astype(jnp.bfloat16), "b": jnp.ones(300)}
  for maker in (
    aggregators.weighted_mean,
    aggregators.uniform_mean,
    lambda: aggregators.trimmed_mean(0),
    lambda: aggregators.apart(
      w=aggregators.weighted_mean(), b=aggregators.uniform_mean()
    ),
  ):
    for weights in (jnp.ones(300), jnp.ones(300, jnp.bfloat16)):
      got = maker().aggregate(x, weights)
      assert got["w"].dtype == jnp.bfloat16 and got["b"].dtype == jnp.float32
      np.testing.assert_array_equal(got["w"], 2)
      np.testing.assert_array_equal(got["b"], 1)
  kept = aggregators.keep().aggregate(x, jnp.ones(300))
  np.testing.assert_array_equal(kept.update["w"], 2)
  ones = jnp.ones((300, 2), jnp.bfloat16)
  got = aggregators.geometric_median().aggregate(ones, jnp.ones(300))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, 1)


def test_integers_have_a_mean_of_fractions():
  got = aggregators.weighted_mean().aggregate(jnp.arange(4), jnp.ones(4) / 2)
  assert got == 1.5


def test_the_mean_of_large_values_does_not_overflow():
  x = jnp.array([2e38, 3e38])
  for rule in (aggregators.median(), aggregators.trimmed_mean(0)):
    np.testing.assert_allclose(rule.aggregate(x, jnp.ones(2)), 2.5e38)


def test_an_integer_of_numpy_is_one():
  assert aggregators.krum(np.int64(1)).min_clients == 5


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: aggregators.geometric_median(1e-6, 2.5), ["iterations", "2.5"]),
    (
      lambda: aggregators.median().aggregate(jnp.ones((3, 2)), jnp.ones(4)),
      ["messages", "(3, 2)", "4", "weights"],
    ),
    (
      lambda: aggregators.weighted_mean().aggregate(
        {"a": jnp.ones(3), "b": jnp.ones(())}, jnp.ones(3)
      ),
      ["messages", "'b'", "3", "weights"],
    ),
    (
      lambda: aggregators.median().aggregate(jnp.ones(3), jnp.ones((3, 1))),
      ["weights", "(3, 1)"],
    ),
    (lambda: aggregators.trimmed_mean(-1), ["num_byzantine", "-1"]),
    (lambda: aggregators.krum(-3), ["num_byzantine", "-3"]),
    (lambda: aggregators.bulyan(-1), ["num_byzantine", "-1"]),
    (lambda: aggregators.krum(1.5), ["num_byzantine", "1.5"]),
    (lambda: aggregators.trimmed_mean(True), ["num_byzantine", "True"]),
    (lambda: aggregators.geometric_median(0.0), ["smoothing", "0.0"]),
    (lambda: aggregators.geometric_median(1e-6, 0), ["iterations", "0"]),
    (
      lambda: aggregators.trimmed_mean(2).aggregate(jnp.ones(4), jnp.ones(4)),
      ["messages", "4", "5"],
    ),
    (
      lambda: aggregators.krum(2).aggregate(jnp.ones(6), jnp.ones(6)),
      ["messages", "6", "7"],
    ),
  ],
)
def test_bounds_are_checked(make, words):
  with pytest.raises(errors.ConfigError) as raised:
    make()
  reference.check_message(raised.value, words)
