"""Differential privacy: the mechanism, and what it goes with."""

import functools

import algorithm_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from fedfm import (
  algorithms,
  choices,
  clients,
  errors,
  privacy,
  protection,
  sharding,
)
from fedfm import settings as settings_lib


def messages(count=5, seed=0):
  rng = np.random.default_rng(seed)
  sizes = np.array([0.0, 0.01, 1.0, 30.0, 1e10])[:count]
  return {
    "w": (rng.normal(size=(count, 4, 3)).T * sizes).T.astype(np.float32),
    "b": [(rng.normal(size=count) * sizes).astype(np.float32)],
  }


@functools.cache
def jitted_release(mechanism):
  @jax.jit
  def run(sent, weights, key):
    aggregator = mechanism.aggregator
    state = aggregator.init(jax.tree.map(lambda x: x[0], sent))
    collected = aggregator.collect(state, sent, weights)
    aggregate, state = aggregator.finish(state, collected)
    return mechanism.release(aggregate, state, weights, key)

  return run


def released(mechanism, sent, weights, key=0):
  """What a mechanism lets out of stacked messages."""
  weights = jnp.asarray(weights, jnp.float32)
  return jitted_release(mechanism)(sent, weights, jax.random.key(key))


def vector(tree):
  return np.concatenate(
    [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  )


def rows(tree):
  return np.stack(
    [vector(jax.tree.map(lambda x, i=i: x[i], tree)) for i in range(5)]
  )


def test_mean_of_clipped_deltas_equals_numpy():
  """Over the whole tree, all alike, and over the expected cohort."""
  clip, expected_clients = 2.0, 7
  mechanism = privacy.gaussian(
    clip_norm=clip, noise_multiplier=0, expected_clients=expected_clients
  )
  got = released(mechanism, messages(), [3, 1, 0, 50, 2])
  x = rows(messages())
  norms = np.linalg.norm(x, axis=1, keepdims=True)
  x = x * np.minimum(1, clip / np.maximum(norms, 1e-300))
  want = (x.sum(axis=0) - x[2]) / expected_clients
  np.testing.assert_allclose(vector(got.update), want, rtol=1e-5, atol=1e-6)
  assert float(got.metrics["privacy/clipped"]) == 0.5
  nobody = released(mechanism, messages(), np.zeros(5))
  assert nobody.done and not vector(nobody.update).any()


def test_one_client_changes_the_sum_by_the_clip_norm_at_most():
  clip = 0.3
  mechanism = privacy.gaussian(
    clip_norm=clip, noise_multiplier=0, expected_clients=1
  )
  for seed in range(3):
    sent = messages(seed=seed)
    sent["w"][4] *= 1e20  # Its norm is infinite in float32.
    everyone = vector(released(mechanism, sent, np.ones(5)).update)
    changes = []
    for gone in range(5):
      weights = np.where(np.arange(5) == gone, 0, 1)
      less = vector(released(mechanism, sent, weights).update)
      changes.append(np.linalg.norm(everyone - less))
    assert max(changes) <= clip * (1 + 1e-5)
    # Two of them are clipped: the bound is reached.
    assert max(changes) >= clip * (1 - 1e-5) and min(changes) == 0


def test_bfloat16_is_clipped_and_summed_in_float32():
  """Rounding after the clip would pass the norm; 256 would be the most."""
  rng = np.random.default_rng(0)
  sent = jnp.asarray(rng.normal(9, 1, size=(600, 2)), jnp.bfloat16)
  x = np.asarray(sent, np.float64)
  want = (0.3 * x / np.linalg.norm(x, axis=1, keepdims=True)).sum(axis=0)
  mechanism = privacy.gaussian(
    clip_norm=0.3, noise_multiplier=0, expected_clients=1
  )
  aggregator, weights = mechanism.aggregator, jnp.ones(600)
  total = jax.jit(lambda x: aggregator.collect((), x, weights))(sent)
  np.testing.assert_allclose(total["sum"].tree, want, rtol=1e-4)
  update = mechanism.release(total, (), weights, jax.random.key(0)).update
  assert update.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    update.astype(jnp.float32), want, rtol=float(jnp.finfo("bfloat16").eps)
  )


def test_noise_is_that_of_the_accountant():
  """Its deviation, and its whole distribution; not 2/3 or 3/2 of it."""
  z, clip, expected_clients, d = 1.7, 0.4, 20, 100_000
  mechanism = privacy.gaussian(
    clip_norm=clip, noise_multiplier=z, expected_clients=expected_clients
  )
  sent = {"a": jnp.ones((3, d // 2)), "b": jnp.ones((3, d // 4, 2))}
  update = vector(released(mechanism, sent, np.ones(3)).update)
  noise = update * expected_clients - 3 * clip / np.sqrt(d)
  sigma = z * clip
  assert abs(noise.std() / sigma - 1) < 0.01
  assert abs(noise.mean()) < 5 * sigma / np.sqrt(d)
  assert stats.kstest(noise, stats.norm(0, sigma).cdf).pvalue > 1e-3
  for wrong in (2 / 3, 3 / 2):
    normal = stats.norm(0, wrong * sigma)
    assert stats.kstest(noise, normal.cdf).pvalue < 1e-30
  halves = noise.reshape(2, -1)
  assert abs(np.corrcoef(halves)[0, 1]) < 0.03
  other = vector(released(mechanism, sent, np.ones(3), key=1).update)
  assert abs(np.corrcoef(update, other)[0, 1]) < 0.03


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"clip_norm": 0.0}, "clip_norm: got 0.0"),
    ({"clip_norm": np.inf}, "clip_norm: got inf"),
    ({"clip_norm": 1e39}, "clip_norm: got 1e.39, expected 1e-18 to 1e.18"),
    ({"clip_norm": 1e-46}, "clip_norm: got 1e-46, expected 1e-18 to"),
    (
      {"clip_norm": 1e10, "noise_multiplier": 1e10},
      "noise_multiplier x clip_norm: got 1e.20",
    ),
    ({"noise_multiplier": -0.1}, "noise_multiplier: got -0.1"),
    ({"expected_clients": 0}, "expected_clients: got 0"),
  ],
)
def test_bad_arguments_of_the_mechanism(changes, message):
  good = {"clip_norm": 1.0, "noise_multiplier": 1.0, "expected_clients": 3}
  with pytest.raises(errors.PrivacyError, match=message):
    privacy.gaussian(**(good | changes))


# In a round.


def noisy(noise_multiplier=1.0):
  return privacy.gaussian(
    clip_norm=0.5, noise_multiplier=noise_multiplier, expected_clients=3
  )


def test_a_round_equals_its_clients_clipped():
  """Through the lanes, two rounds, against each client's own round."""
  ids = cases.ROUNDS[1]
  with jax.enable_x64(True):
    alone = cases.build("fedavg")
    private = cases.build("fedavg", mechanism=noisy(0))
    alone_round, private_round = map(jax.jit, (alone.round, private.round))
    state = private.init(cases.linear_start())
    for _ in range(2):
      before, total = cases.flat(state.trainable), 0.0
      for client_id in ids:
        own, _ = alone_round(
          alone.init(state.trainable), 0.0, cases.pack([client_id])
        )
        delta = cases.flat(own.trainable) - before
        total = total + delta * min(1, 0.5 / np.linalg.norm(delta))
      state, _ = private_round(state, 0.0, cases.pack(ids))
      np.testing.assert_allclose(
        cases.flat(state.trainable), before + total / 3, rtol=1e-10
      )


def test_noise_is_the_same_on_every_mesh_and_another_in_every_round():
  still = cases.build(
    "fedavg", client_optimizer=optax.sgd(0.0), mechanism=noisy()
  )
  got = {}
  for count in (1, 8):
    mesh = sharding.make_mesh({"clients": count}, jax.devices()[:count])
    with jax.set_mesh(mesh):
      place = jax.NamedSharding(mesh, jax.P())
      start = still.init(cases.linear_start(jnp.float32))
      state, round_fn = jax.device_put(start, place), jax.jit(still.round)
      for r in range(2):
        cohort = clients.put(cases.pack(cases.ROUNDS[0], lanes=8), mesh)
        before = cases.flat(jax.device_get(state.trainable))
        state, _ = jax.block_until_ready(round_fn(state, 0.0, cohort))
        after = cases.flat(jax.device_get(state.trainable))
        got[count, r] = after
        assert (after != before).all()
  np.testing.assert_array_equal(got[1, 0], got[8, 0])
  np.testing.assert_array_equal(got[1, 1], got[8, 1])
  start = cases.flat(cases.linear_start(jnp.float32))
  first, second = got[1, 0] - start, got[1, 1] - got[1, 0]
  assert (np.abs(first - second) > 1e-4).all()


THIN = ("fedavg", "fedit")


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name in THIN else pytest.mark.slow)
    for name in protection.ALGORITHMS
  ],
)
def test_the_server_sees_nothing_but_what_is_released(name):
  """With a release that says nothing, other clients leave the same server."""
  silent = noisy()._replace(
    release=lambda aggregate, state, weights, key: privacy.Release(
      jax.tree.map(lambda x: jnp.ones_like(x) / 8, aggregate["sum"].tree),
      state,
      jnp.asarray(True),
      {},
    )
  )
  problem = cases.problem_of(name)
  with jax.enable_x64(True):
    algorithm = cases.build(name, mechanism=silent)
    state, servers = algorithm.init(problem.start(jnp.float64)), []
    round_fn = jax.jit(algorithm.round)
    for ids in problem.rounds:
      after, _ = round_fn(state, problem.base, problem.pack(ids))
      servers.append((after.trainable, after.server_optimizer, after.extra))
      servers[-1] += (after.aggregator, after.sent)
  jax.tree.map(np.testing.assert_array_equal, *servers)
  assert (cases.flat(servers[0][0]) != cases.flat(state.trainable)).any()


@functools.cache
def settings_of(name):
  return settings_lib.from_dict(
    {
      "algorithm": name,
      "sampler": "poisson",
      "privacy": {"kind": "gaussian", "noise_multiplier": 1.0},
    }
  )


def test_every_other_algorithm_is_refused_by_name():
  others = set(choices.ALGORITHMS) - set(protection.ALGORITHMS)
  assert set(protection.ALGORITHMS) < set(choices.ALGORITHMS)
  for name in others:
    with pytest.raises(errors.ConfigError, match=f"algorithm: got {name!r}"):
      protection.mechanism(settings_of(name), 100)
  for name in protection.ALGORITHMS:
    assert protection.mechanism(settings_of(name), 100) is not None


def test_nothing_aggregates_beside_a_mechanism():
  with pytest.raises(errors.ConfigError, match="mechanism: got one beside an"):
    algorithms.scaffold(
      cases.linear_loss,
      client_optimizer=optax.sgd(0.1),
      num_clients=4,
      mechanism=noisy(),
    )
