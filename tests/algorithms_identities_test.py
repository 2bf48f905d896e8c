"""What algorithms become in special cases, and what single ones promise."""

import dataclasses
import functools

import algorithm_cases as cases
import algorithm_numpy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedfm import aggregators, algorithms, compression
from fedfm.algorithms.afl import project_to_simplex
from fedfm.algorithms.fedbuff import half_normal_delay
from fedfm.types import ClientInfo

ROUNDS = cases.ROUNDS
_FAST = {"xla_backend_optimization_level": "0"}


def jit(algorithm):
  return jax.jit(algorithm.round, compiler_options=_FAST)


def w_b(tree):
  """[w, b] of a trainable, or [k, 4] of k of them."""
  return np.concatenate([tree["w"], tree["b"][..., None]], axis=-1)


def rounds(algorithm, cohorts):
  """States after each round."""
  with jax.enable_x64(True):
    state, round_fn = algorithm.init(cases.linear_start()), jit(algorithm)
    for cohort in cohorts:
      state, _ = round_fn(state, 0.0, cohort)
      yield state


def packed():
  return [cases.pack(ids) for ids in ROUNDS]


def bytes_of(algorithm):
  """Bytes up and down of a client, in float32."""
  state = algorithm.init(cases.linear_start(jnp.float32))
  return algorithm.bytes_per_client(state)


def no_delay(info):
  return jnp.zeros((), jnp.int32)


# Each is FedAvg, its clients weighted by examples or alike.
IS_FEDAVG = {
  "qfedavg": ({"q": 0.0}, "examples"),
  "mimelite": ({"client_optimizer": optax.sgd(cases.RATE)}, "examples"),
  "ifca": ({"num_clusters": 1}, "examples"),
  "fedbuff": ({"delay": no_delay}, "uniform"),
  "afl": ({"mixture_learning_rate": 0.0}, "uniform"),
  "ditto": ({"lam": 0.0}, "examples"),
}


@pytest.mark.parametrize("name", IS_FEDAVG)
def test_special_cases_are_fedavg(name):
  options, weighting = IS_FEDAVG[name]
  weigh = {
    "examples": algorithm_numpy.shares,
    "uniform": algorithm_numpy.uniform,
  }[weighting]
  algorithm = cases.build(name, **options)
  expected = algorithm_numpy.fedavg(weigh=weigh)
  for state, want in zip(rounds(algorithm, packed()), expected):
    got = w_b(algorithm.effective_trainable(state))
    np.testing.assert_allclose(got, want["w"], rtol=1e-9)
  if name == "ditto":  # Without the pull, private models train alone.
    own = {i: algorithm_numpy.START for i in cases.IDS}
    for ids in ROUNDS:
      own |= {i: algorithm_numpy.descend(own[i], i)[0] for i in ids}
    np.testing.assert_allclose(w_b(state.clients), [*own.values()], rtol=1e-9)


@pytest.mark.parametrize("name", ["scaffold", "fednova"])
def test_the_first_round_is_fedavgs_where_nothing_is_to_be_corrected(name):
  # SCAFFOLD's control variates are 0; FedNova's clients do one step each.
  cohort = cases.pack(ROUNDS[0], local_steps=1)
  algorithm = cases.build(name, weighting="examples")
  (state,) = rounds(algorithm, [cohort])
  start = algorithm_numpy.START
  deltas = [
    -cases.RATE
    * algorithm_numpy.gradient(start, *next(algorithm_numpy.batches(i)))
    for i in ROUNDS[0]
  ]
  # Weighted by the examples that were used: one batch.
  used = [min(cases.LINEAR.size(i), cases.BATCH) for i in ROUNDS[0]]
  expected = start + np.average(deltas, axis=0, weights=used)
  np.testing.assert_allclose(w_b(state.trainable), expected, rtol=1e-10)


def test_scaffold_stays_at_the_optimum_where_fedavg_drifts():
  """At the uniform mean's optimum, with c_i the clients' own gradients."""
  x, y = zip(*(algorithm_numpy.examples(i) for i in cases.IDS))
  hessian = np.mean([2 * a.T @ a / len(a) for a in x], axis=0)
  optimum = np.linalg.solve(
    hessian, np.mean([2 * a.T @ b / len(a) for a, b in zip(x, y)], axis=0)
  )
  gradients = np.stack(
    [algorithm_numpy.gradient(optimum, a, b) for a, b in zip(x, y)]
  )
  assert np.abs(gradients).max() > 1 and np.abs(gradients.mean(0)).max() < 1e-9
  # Full batches, several steps: the gradient is the client's own.
  cohort = cases.pack(cases.IDS[:3], batch_size=7, epochs=5)
  moved = {}
  for name in ("scaffold", "fedavg"):
    algorithm = cases.build(name, weighting="uniform")
    with jax.enable_x64(True):
      as_tree = {"w": jnp.asarray(optimum[:3]), "b": jnp.asarray(optimum[3])}
      state = algorithm.init(as_tree)
      if name == "scaffold":
        clients = {
          "w": jnp.asarray(gradients[:, :3]),
          "b": jnp.asarray(gradients[:, 3]),
        }
        state = dataclasses.replace(state, clients=clients)
      after, _ = jit(algorithm)(state, 0.0, cohort)
    moved[name] = np.abs(w_b(after.trainable) - optimum).max()
  assert moved["scaffold"] < 1e-12 and moved["fedavg"] > 1e-3


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "qfedavg"])
def test_drift_is_of_what_compression_leaves(name):
  """Of one client's cohort the cosine is 1, whatever was owed from before."""
  top = compression.uplink(compression.top_k(0.3))
  algorithm = cases.build(name, transforms=(top,))
  with jax.enable_x64(True):
    state, round_fn = algorithm.init(cases.linear_start()), jit(algorithm)
    for _ in range(3):
      state, metrics = round_fn(state, 0.0, cases.pack(cases.IDS[:1]))
  np.testing.assert_allclose(metrics["drift/cosine"], 1, rtol=1e-6)
  np.testing.assert_allclose(metrics["drift/diversity"], 1, rtol=1e-6)


def test_scaffold_takes_a_client_rate_of_0_and_a_robust_aggregator():
  cohort = cases.pack(ROUNDS[0])
  rate = np.array(cohort.rate)
  rate.reshape(-1)[cohort.order[0]] = 0
  cohort = dataclasses.replace(cohort, rate=rate)
  (state,) = rounds(
    cases.build("scaffold", aggregator=aggregators.median()), [cohort]
  )
  start = algorithm_numpy.START
  ends = [algorithm_numpy.descend(start, i) for i in ROUNDS[0]]
  deltas = np.stack([np.zeros(4), *(end - start for end, _ in ends[1:])])
  expected = start + np.median(deltas, axis=0)
  np.testing.assert_allclose(w_b(state.trainable), expected, rtol=1e-10)
  controls = np.zeros((5, 4))
  for client, (end, k) in zip(ROUNDS[0][1:], ends[1:]):
    controls[cases.IDS.index(client)] = (start - end) / (k * cases.RATE)
  np.testing.assert_allclose(w_b(state.clients), controls, rtol=1e-10)
  mean = controls.sum(axis=0) / 5
  np.testing.assert_allclose(w_b(state.extra), mean, rtol=1e-10)


def test_a_clients_rate_multiplies_its_learning_rate_in_fednova():
  """A client at half the rate went half as far, and is normalised by it."""
  cohort = cases.pack(ROUNDS[0])
  rate = np.array(cohort.rate)
  rate.reshape(-1)[cohort.order[1]] = 0.5
  (state,) = rounds(
    cases.build("fednova"), [dataclasses.replace(cohort, rate=rate)]
  )
  start, p = algorithm_numpy.START, algorithm_numpy.shares(ROUNDS[0])
  lengths, directions = [], []
  for i, factor in zip(ROUNDS[0], (1, 0.5, 1)):
    end, k = algorithm_numpy.descend(start, i, lambda g, w, f=factor: f * g)
    lengths.append(k * factor * cases.RATE)
    directions.append((start - end) / lengths[-1])
  expected = start - p @ np.array(lengths) * (p @ np.stack(directions))
  np.testing.assert_allclose(w_b(state.trainable), expected, rtol=1e-10)


def test_fedbuff_remembers_no_more_than_its_longest_delay():
  many = [ROUNDS[r % 2] for r in range(5)]
  algorithm = cases.build("fedbuff", max_delay=2)
  states = rounds(algorithm, [cases.pack(ids) for ids in many])
  expected = algorithm_numpy.fedbuff(many, max_delay=2)
  for state, want in zip(states, expected):
    np.testing.assert_allclose(w_b(state.trainable), want["w"], rtol=1e-10)
  assert state.extra["past"]["w"].shape == (2, 3)
  assert bytes_of(algorithm) == (16, 16)


def test_delays_are_half_normal_and_a_function_of_the_clients_key():
  delay = half_normal_delay(3.0)

  def of_key(key):
    zero = jnp.zeros((), jnp.int32)
    return delay(
      ClientInfo(
        key=key,
        round=zero,
        row=zero,
        num_examples=zero,
        num_steps=zero,
        weight=zero,
        rate=zero,
      )
    )

  keys = jax.random.split(jax.random.key(0), 20000)
  delays = np.asarray(jax.jit(jax.vmap(of_key))(keys))
  np.testing.assert_array_equal(delays[:3], [of_key(key) for key in keys[:3]])
  assert delays.dtype == np.int32 and delays.min() == 0
  # E|N| = sigma sqrt(2/pi); the standard error of the mean is 0.016.
  np.testing.assert_allclose(delays.mean(), 3.0, atol=0.07)
  np.testing.assert_allclose(
    delays.std(), 3 * np.sqrt(np.pi / 2 - 1), atol=0.07
  )


def test_afl_raises_the_shares_of_the_worst_clients():
  algorithm = cases.build("afl", mixture_learning_rate=0.01)
  (state,) = rounds(algorithm, [cases.pack(cases.IDS)])
  losses = [algorithm_numpy.loss(algorithm_numpy.START, i) for i in cases.IDS]
  assert np.min(state.extra) > 0
  np.testing.assert_array_equal(np.argsort(state.extra), np.argsort(losses))
  np.testing.assert_allclose(np.sum(state.extra), 1, rtol=1e-12)
  # A client's bytes: the model, its loss and its share; not the whole mixture.
  assert bytes_of(algorithm) == (16 + 8, 16 + 4)


def test_projection_to_the_simplex():
  rng = np.random.default_rng(0)
  for scale in (0.1, 1.0, 30.0):
    x = rng.normal(size=9) * scale
    with jax.enable_x64(True):
      got = project_to_simplex(jnp.asarray(x))
    expected = algorithm_numpy.nearest_in_simplex(x)
    np.testing.assert_allclose(got, expected, atol=1e-12)


@functools.cache
def two_clusters():
  """IFCA on the linear problem, from two models: (algorithm, states)."""
  algorithm = cases.build("ifca", spread=1.0, seed=5)
  with jax.enable_x64(True):
    first = algorithm.init(cases.linear_start())
  return algorithm, [first, *rounds(algorithm, packed())]


def test_ifca_equals_numpy():
  algorithm, states = two_clusters()
  models = w_b(states[0].trainable)
  np.testing.assert_allclose(models[0], algorithm_numpy.START)
  assert np.abs(models[1] - models[0]).min() > 0
  chosen = set()
  for state, want in zip(states[1:], algorithm_numpy.ifca(models)):
    np.testing.assert_allclose(w_b(state.trainable), want["w"], rtol=1e-10)
    np.testing.assert_array_equal(state.clients, want["clients"])
    np.testing.assert_array_equal(state.extra, want["extra"])
    chosen |= set(want["clients"]) - {-1}
  assert chosen == {0, 1}  # Else this shows little.
  last = states[-1]
  heaviest = int(np.argmax(last.extra))
  for cluster, expected in ((0, 0), (1, 1), (-1, heaviest)):
    with jax.enable_x64(True):
      got = algorithm.personal(last, jnp.asarray(cluster))
    np.testing.assert_array_equal(w_b(got), w_b(last.trainable)[expected])


def test_ifca_sends_all_models_and_gets_one():
  assert bytes_of(two_clusters()[0]) == (16 + 4, 2 * 16)


def test_private_parts_are_not_sent():
  algorithm = cases.build("fedper")
  state = algorithm.init(cases.linear_start(jnp.float32))
  assert bytes_of(algorithm) == (12, 12)
  own = algorithm.personal(state, {"w": None, "b": jnp.asarray(7.0)})
  np.testing.assert_array_equal(w_b(own)[:3], state.trainable["w"])
  assert own["b"] == 7


def test_the_server_evaluates_an_average_of_its_models():
  decay = 0.75
  inner = cases.build("scaffold")  # With a memory of its own.
  algorithm = algorithms.averaged(inner, decay)
  empty = cases.pack([])
  mean = algorithm_numpy.START
  cohorts = [*packed(), empty]
  states = list(rounds(algorithm, cohorts))
  for state, want in zip(states, algorithm_numpy.scaffold()):
    mean = decay * mean + (1 - decay) * want["w"]
    np.testing.assert_allclose(w_b(state.trainable), want["w"], rtol=1e-10)
    got = w_b(algorithm.effective_trainable(state))
    np.testing.assert_allclose(got, mean, rtol=1e-10)
  # A round without clients leaves the average alone.
  np.testing.assert_array_equal(
    w_b(algorithm.effective_trainable(states[2])), got
  )
  assert bytes_of(algorithm) == (32, 32)  # With control variates.
