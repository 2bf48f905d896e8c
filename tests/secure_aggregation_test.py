"""Secure aggregation, simulated: exact sums, dropouts, bounds, no-ops."""

import functools

import algorithm_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from fedfm import errors, privacy, sharding
from fedfm.privacy import secure_sum

N, BITS, LEVELS = 6, 20, 1000
AGREED = np.array([True, True, False, True, True, True])
SURVIVED = np.array([True, False, False, True, True, False])


@functools.cache
def jitted(fn, bits):
  return jax.jit(functools.partial(fn, bits=bits))


def integers(levels=LEVELS, n=N, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "w": rng.integers(-levels, levels + 1, (n, 3, 2), dtype=np.int32),
    "b": [rng.integers(-levels, levels + 1, n, dtype=np.int32)],
  }


def masked_sum(x, agreed, survived, bits, key=3):
  key = jax.random.key(key)
  agreed, survived = jnp.asarray(agreed), jnp.asarray(survived)
  uploads = jitted(secure_sum.mask, bits)(x, agreed, key)
  total = jitted(secure_sum.unmask, bits)(uploads, agreed, survived, key)
  return uploads, secure_sum.decode(total, bits, 1.0)


@pytest.mark.parametrize("bits", [BITS, 32])
def test_masked_sum_is_the_sum_of_integers(bits):
  for survived in (AGREED, SURVIVED, np.zeros(N, bool)):
    x = integers()
    uploads, got = masked_sum(x, AGREED, survived, bits)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(x)):
      np.testing.assert_array_equal(a, b[survived].sum(axis=0))
  # What is sent is no integer of a client, and below the modulus.
  for a, b in zip(jax.tree.leaves(uploads), jax.tree.leaves(x)):
    assert a.dtype == jnp.uint32 and int(a.max()) < 2**bits
    assert (np.asarray(a)[AGREED] != b[AGREED].astype(np.uint32)).all()


def test_masks_look_uniform_and_are_of_the_round():
  zeros = {"w": np.zeros((N, 2000), np.int32)}
  uploads, _ = masked_sum(zeros, AGREED, AGREED, 8)
  counts = np.bincount(np.asarray(uploads["w"][0]), minlength=256)
  # Chi-squared of 255 degrees: 255 +- 5 deviations of 22.6.
  assert abs(((counts - 2000 / 256) ** 2 / (2000 / 256)).sum() - 255) < 113
  again, _ = masked_sum(zeros, AGREED, AGREED, 8, key=4)
  assert (np.asarray(again["w"][0]) != np.asarray(uploads["w"][0])).mean() > 0.9


@pytest.mark.parametrize("sign", [1, -1])
def test_the_least_modulus_holds_the_largest_sum(sign):
  bits = next(
    b for b in range(2, 33) if _fits(clip_norm=1.0, max_clients=N, bits=b)
  )
  assert bits == int(np.ceil(np.log2(2 * N * 100 + 1)))
  x = {"w": np.full((N, 4), sign * 100, np.int32)}
  everyone = np.ones(N, bool)
  _, got = masked_sum(x, everyone, everyone, bits)
  np.testing.assert_array_equal(got["w"], sign * N * 100)
  with pytest.raises(errors.PrivacyError, match=f"bits: .* at least {bits}"):
    secure_sum.check(clip_norm=1.0, max_clients=N, bits=bits - 1, scale=100.0)


def _fits(**arguments):
  try:
    return secure_sum.check(scale=100.0, **arguments) == 100
  except errors.PrivacyError:
    return False


def secure(**options):
  return privacy.secure_aggregation(
    **({"clip_norm": 1.0, "max_clients": 8, "scale": 500.0} | options)
  )


def messages(n=N, size=0.4, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "w": (size * rng.normal(size=(n, 3, 2))).astype(np.float32),
    "b": [(size * rng.normal(size=n)).astype(np.float32)],
  }


@functools.cache
def jitted_release(mechanism):
  return jax.jit(
    lambda sent, weights, key: mechanism.release(
      (sent, weights), (), weights, key
    )
  )


def release(mechanism, sent, weights, key=0):
  weights = jnp.asarray(weights, jnp.float32)
  return jitted_release(mechanism)(sent, weights, jax.random.key(key))


def clipped_rows(sent, clip):
  x = np.stack(
    [reference.flat(jax.tree.map(lambda x, i=i: x[i], sent)) for i in range(N)]
  )
  norms = np.linalg.norm(x, axis=1, keepdims=True)
  return x * np.minimum(1, clip / norms)


def test_decoded_sum_is_close_to_the_clipped_one():
  """Within n / (2 scale) to the nearest; unbiased where stochastic."""
  sent, there = messages(), AGREED
  want = clipped_rows(sent, 1.0)[there].sum(axis=0)
  nearest = release(secure(rounding="nearest"), sent, there)
  count = there.sum()
  got = reference.flat(nearest.update) * count
  assert np.abs(got - want).max() <= count / (2 * 500) + 1e-5
  assert np.abs(got - want).max() > 1e-5  # It was rounded.
  assert nearest.done and int(nearest.metrics["privacy/survivors"]) == count
  stochastic = secure()
  draws = [
    reference.flat(release(stochastic, sent, there, key).update) * count
    for key in range(5)
  ]
  assert np.abs(np.array(draws) - want).max() <= count / 500 + 1e-5
  x = {"w": jnp.full((20_000,), 0.3)}  # Rounds to 0 or 1.
  rounded = secure_sum.quantise(x, 1.0, 1, "stochastic", jax.random.key(0))["w"]
  assert abs(float(rounded.mean()) - 0.3) < 5 * 0.46 / np.sqrt(20_000)


def test_who_drops_out_after_masking_is_in_no_sum():
  sent, mechanism = messages(), secure(dropout=0.5, rounding="nearest")
  rows, seen = clipped_rows(sent, 1.0), set()
  for key in range(6):
    got = release(mechanism, sent, np.ones(N), key)
    count = int(got.metrics["privacy/survivors"])
    seen.add(count)
    total = reference.flat(got.update) * count
    subsets = [
      [i for i in range(N) if bits >> i & 1]
      for bits in range(2**N)
      if bits.bit_count() == count
    ]
    errors_of = [np.abs(rows[s].sum(axis=0) - total).max() for s in subsets]
    assert min(errors_of) <= max(count, 1) / (2 * 500) + 1e-5
  assert len(seen) > 1


@pytest.mark.parametrize(
  "rounding",
  [pytest.param("nearest", marks=pytest.mark.slow), "stochastic"],
)
def test_rounding_keeps_to_the_sensitivity_of_the_noise(rounding):
  """A rounded message is no longer than the clip norm, nor is its change."""
  noise = privacy.gaussian(
    clip_norm=1.0, noise_multiplier=0, expected_clients=1
  )
  sent = messages(size=30.0)
  mechanism = secure(mechanism=noise, rounding=rounding)
  for one in range(N):
    weights = np.arange(N) == one
    got = reference.flat(release(mechanism, sent, weights).update)
    assert 0.9 < np.linalg.norm(got) <= 1.0
  coarse = secure(mechanism=noise, scale=4.0)
  with pytest.raises(errors.PrivacyError, match="scale: got 4, .* 7 values"):
    coarse.aggregator.init(jax.tree.map(lambda x: x[0], sent))


@pytest.mark.slow
def test_noise_is_added_to_the_decoded_sum():
  noisy = privacy.gaussian(
    clip_norm=1.0, noise_multiplier=2.0, expected_clients=4
  )
  calm = privacy.gaussian(clip_norm=1.0, noise_multiplier=0, expected_clients=4)
  sent = {"w": np.zeros((N, 20_000), np.float32)}
  sent["w"][:, 0] = 0.4
  options = {"scale": 2.0**16, "rounding": "nearest"}
  got, plain = (
    release(secure(mechanism=m, **options), sent, np.ones(N)).update["w"]
    for m in (noisy, calm)
  )
  assert abs(float((got - plain).std()) / (2.0 / 4) - 1) < 0.03
  assert float(plain[0]) == pytest.approx(N * 0.4 / 4, abs=1e-4)


@pytest.mark.slow
def test_the_same_bits_on_any_mesh():
  sent, weights = messages(n=8), np.ones(8)
  mechanism = secure(dropout=0.5)
  got = [reference.flat(release(mechanism, sent, weights).update)]
  mesh = sharding.make_mesh({"clients": 8})
  with jax.set_mesh(mesh):
    place = jax.NamedSharding(mesh, jax.P("clients"))
    update = release(mechanism, jax.device_put(sent, place), weights).update
    got.append(reference.flat(jax.device_get(update)))
  np.testing.assert_array_equal(*got)


@pytest.mark.slow
def test_rounds_below_the_threshold_change_nothing():
  """And those above it are federated averaging, to the rounding."""
  mechanism = secure(threshold=2, clip_norm=3.0, scale=2.0**18)
  with jax.enable_x64(True):
    algorithm = cases.build("fedavgm", mechanism=mechanism)
    plain = cases.build("fedavgm", weighting="uniform")
    round_fn, start = jax.jit(algorithm.round), cases.linear_start()
    cohort = cases.pack(cases.ROUNDS[0])
    after, metrics = round_fn(algorithm.init(start), 0.0, cohort)
    expected, _ = jax.jit(plain.round)(plain.init(start), 0.0, cohort)
    np.testing.assert_allclose(
      cases.flat(after.trainable), cases.flat(expected.trainable), atol=1e-5
    )
    assert int(metrics["privacy/survivors"]) == 3
    alone = reference.with_weights(cohort, {0: 0, 1: 0})
    still, metrics = round_fn(after, 0.0, alone)
  assert int(metrics["privacy/aborted"]) == 1
  assert int(still.round) == 2
  for name in ("trainable", "server_optimizer", "extra", "aggregator"):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(still, name), getattr(after, name)
    )


def test_bytes_are_those_of_the_integers():
  algorithm = cases.build("fedavg", mechanism=secure(bits=24))
  state = algorithm.init(cases.linear_start(jnp.float32))
  assert algorithm.bytes_per_client(state) == (4 * 3, 4 * 4)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"bits": 33}, "bits: got 33, expected 2 to 32"),
    ({"bits": 8}, "bits: got 8, but sums of 8 clients, .* at least 13"),
    ({"scale": 0.0}, "scale: got 0.0"),
    ({"scale": 1e9}, "scale: got 1e"),
    ({"clip_norm": 0.0}, "clip_norm: got 0.0"),
    ({"threshold": 9}, "threshold: got 9, expected 1 to the 8 clients"),
    ({"dropout": 1.0}, "dropout: got 1.0"),
    ({"rounding": "floor"}, "rounding: got 'floor'"),
  ],
)
def test_bad_arguments(changes, message):
  with pytest.raises(errors.PrivacyError, match=message):
    secure(**changes)
