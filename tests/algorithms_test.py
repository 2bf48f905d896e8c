"""The seams that algorithms share: servers, weights, schedules, options."""

import functools

import algorithm_cases as cases
import algorithm_numpy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from fedfm import algorithms, errors, optimizers, settings
from fedfm.clients import measures

ROUNDS, SGD, SOURCE = cases.ROUNDS, optax.sgd(cases.RATE), cases.LINEAR
_FAST = {"xla_backend_optimization_level": "0"}


def jit(algorithm):
  return jax.jit(algorithm.round, compiler_options=_FAST)


@functools.cache
def fedavg():
  algorithm = cases.build("fedavg")
  return algorithm, jit(algorithm)


def flat(state):
  """[w, b]."""
  return np.append(state.trainable["w"], state.trainable["b"])


def two_rounds(algorithm):
  """[w, b] after each of the two rounds."""
  state, round_fn = algorithm.init(cases.linear_start()), jit(algorithm)
  for ids in ROUNDS:
    state, _ = round_fn(state, 0.0, cases.pack(ids))
    yield flat(state)


def by_hand(rounds):
  return [result["w"] for result in rounds]


def mean_delta(weights):
  """The mean of what the first cohort brings, by given weights."""
  start = algorithm_numpy.START
  deltas = [algorithm_numpy.descend(start, i)[0] - start for i in ROUNDS[0]]
  return np.asarray(weights) @ np.stack(deltas) / np.sum(weights)


@pytest.mark.parametrize(
  ("server_optimizer", "step"),
  [
    (optax.adagrad(0.1), algorithm_numpy.adagrad_of_optax),
    (optax.yogi(0.1), algorithm_numpy.yogi_of_optax),
  ],
)
def test_optax_servers_in_numpy(server_optimizer, step):
  with jax.enable_x64(True):
    algorithm = cases.build("fedopt", server_optimizer=server_optimizer)
    got = list(two_rounds(algorithm))
  expected = by_hand(algorithm_numpy.server(step))
  np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_any_optax_server_sees_the_negative_mean_delta():
  optimizer = optax.chain(
    optax.clip_by_global_norm(0.1),
    optax.sgd(optax.linear_schedule(1.0, 0.0, 2), momentum=0.5),
  )
  with jax.enable_x64(True):
    algorithm = cases.build("fedopt", server_optimizer=optimizer)
    w = algorithm_numpy.START
    opt = optimizer.init(jnp.asarray(w))
    for ids, got in zip(ROUNDS, two_rounds(algorithm)):
      deltas = [algorithm_numpy.descend(w, i)[0] - w for i in ids]
      mean = algorithm_numpy.shares(ids) @ np.stack(deltas)
      updates, opt = optimizer.update(jnp.asarray(-mean), opt, jnp.asarray(w))
      w = np.asarray(w + updates)
      np.testing.assert_allclose(got, w, rtol=1e-10)


@pytest.mark.parametrize("weighting", ["tokens", "uniform"])
def test_weighting(weighting):
  with jax.enable_x64(True):
    got = next(two_rounds(cases.build("fedavg", weighting=weighting)))
  sizes = [10 * SOURCE.size(i) for i in ROUNDS[0]]
  weights = np.ones(3) if weighting == "uniform" else sizes
  expected = algorithm_numpy.START + mean_delta(weights)
  np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_cohort_weights_multiply_the_clients_own():
  with jax.enable_x64(True):
    algorithm, round_fn = fedavg()
    cohort = reference.with_weights(cases.pack(ROUNDS[0]), {0: 0.5, 1: 3.0})
    state = algorithm.init(cases.linear_start())
    state, metrics = round_fn(state, 0.0, cohort)
  weights = np.array([SOURCE.size(i) for i in ROUNDS[0]]) * [0.5, 3, 1]
  expected = algorithm_numpy.START + mean_delta(weights)
  np.testing.assert_allclose(flat(state), expected, rtol=1e-7)
  total = sum(SOURCE.size(i) for i in ROUNDS[0])
  assert metrics["train/count"] == 10 * cases.EPOCHS * total
  assert metrics["clients/participating"] == 3


def test_client_optimizer_may_depend_on_the_round():
  with jax.enable_x64(True):
    first, second = two_rounds(
      cases.build(
        "fedavg", client_optimizer=lambda r: optax.sgd(cases.RATE * (1.0 - r))
      )
    )
  expected = by_hand(algorithm_numpy.fedavg())[0]
  np.testing.assert_allclose(first, expected, rtol=1e-10)
  np.testing.assert_array_equal(second, first)  # A rate of 0.


def test_schedules_of_configs_on_either_side_in_numpy():
  """Linear over 4 rounds on the clients, cosine on the server."""
  config = settings.from_dict(
    {
      "rounds": 4,
      "algorithm": "fedopt",
      "client": {"learning_rate": cases.RATE, "schedule": "linear"},
      "server": {"learning_rate": 0.8, "schedule": "cosine"},
    }
  )
  with jax.enable_x64(True):
    got = list(
      two_rounds(
        cases.build(
          "fedopt",
          client_optimizer=optimizers.client_optimizer(config.client, 4),
          server_optimizer=optimizers.server_optimizer(config),
        )
      )
    )
  w = algorithm_numpy.START
  for r, ids in enumerate(ROUNDS):
    local = 1 - r / 4  # Of the gradient, as the rate in NumPy is fixed.
    ends = [
      algorithm_numpy.descend(w, i, lambda g, v, k=local: k * g)[0] for i in ids
    ]
    mean = algorithm_numpy.shares(ids) @ (np.stack(ends) - w)
    w = w + 0.8 * (1 + np.cos(np.pi * r / 4)) / 2 * mean
    # Rates are float32, to 6e-8 of updates below 1.
    np.testing.assert_allclose(got[r], w, rtol=0, atol=6e-8)


def test_server_step_trains_on_the_servers_own_batch():
  def server_step(trainable, base, batch, key):
    del base, key
    return jax.tree.map(lambda x: x + batch, trainable)

  with jax.enable_x64(True):
    algorithm = cases.build("fedavg", server_step=server_step)
    state = algorithm.init(cases.linear_start())
    state, _ = jit(algorithm)(state, 0.0, cases.pack(ROUNDS[0]), 2.0)
  expected = by_hand(algorithm_numpy.fedavg())[0] + 2
  np.testing.assert_allclose(flat(state), expected, rtol=1e-10)


def test_a_measured_rate_is_how_far_a_gradient_of_1_goes():
  rho, eta = 0.9, 0.1
  schedule = optax.linear_schedule(eta, 0.0, 4)
  k = np.arange(1, 5)
  for optimizer, expected in (
    (optax.sgd(eta), 4 * eta),
    (optax.sgd(schedule), eta * (4 + 3 + 2 + 1) / 4),
    # |a|_1 of FedNova, section 4.1.
    (optax.sgd(eta, rho), eta * np.sum((1 - rho**k) / (1 - rho))),
    (lambda r: optax.sgd(eta * r), 4 * eta * 3),
    (optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(eta)), 4 * eta),
  ):
    measured = measures.measure_rate(optimizer)(jnp.asarray(3))
    w = {"w": jnp.ones(2)}
    state = measured.init(w)
    for _ in range(4):
      _, state = measured.update({"w": jnp.full(2, 7.0)}, state, w)
    np.testing.assert_allclose(state.total, expected, rtol=1e-6)
    assert state.steps == 4


ADAM = optax.adamw(0.1)
BAD = [
  ("fedavg", {"weighting": "token"}, ["weighting", "token", "tokens"]),
  ("fedavg", {"seed": -1}, ["seed", "-1"]),
  ("fedadam", {"seed": 2**32}, ["seed", str(2**32)]),
  ("fedavg", {"seed": 0.5}, ["seed", "0.5"]),
  ("fedprox", {"mu": -0.1}, ["mu: got -0.1", "[0, inf)"]),
  ("fedprox", {"mu": float("nan")}, ["mu: got nan"]),
  ("scaffold", {"client_optimizer": ADAM}, ["client_optimizer", "scaffold"]),
  ("scaffold", {"num_clients": None}, ["num_clients: got None"]),
  ("feddyn", {"alpha": 0.0}, ["alpha: got 0.0", "(0, inf)"]),
  ("feddyn", {"num_clients": 0}, ["num_clients: got 0"]),
  ("qfedavg", {"q": -1.0}, ["q: got -1.0"]),
  (
    "qfedavg",
    {"client_optimizer": lambda r: ADAM},
    ["client_optimizer", "SGD"],
  ),
  ("afl", {"mixture_learning_rate": -1.0}, ["mixture_learning_rate: got -1.0"]),
  ("afl", {"num_clients": None}, ["num_clients: got None"]),
  ("fedbuff", {"mean_delay": float("inf")}, ["mean_delay: got inf"]),
  ("fedbuff", {"max_delay": -1}, ["max_delay: got -1"]),
  ("fedper", {"num_clients": None}, ["num_clients: got None"]),
  ("fedrep", {"local_share": 1.0}, ["local_share: got 1.0", "[0, 1)"]),
  ("ditto", {"lam": -1.0}, ["lam: got -1.0"]),
  ("per_fedavg", {"inner_learning_rate": -1.0}, ["inner_learning_rate: got"]),
  ("ifca", {"num_clusters": 0}, ["num_clusters: got 0"]),
  ("ifca", {"spread": -1.0}, ["spread: got -1.0"]),
]


@pytest.mark.parametrize(("name", "options", "words"), BAD)
def test_bad_options_are_named(name, options, words):
  with pytest.raises(errors.ConfigError) as raised:
    cases.build(name, **options)
  reference.check_message(raised.value, words)


@pytest.mark.parametrize(
  ("local_parts", "words"),
  [
    ((), ["local_parts: got ()"]),
    ("w", ["local_parts: got 'w'", "list"]),
    (("head",), ["local_parts: the trainable has no 'head'", "b, w"]),
    (("b", "w"), ["local_parts: got ['b', 'w']", "nothing to share"]),
  ],
)
def test_local_parts_that_do_not_fit(local_parts, words):
  with pytest.raises(errors.ConfigError) as raised:
    cases.build("fedper", local_parts=local_parts).init(
      cases.linear_start(jnp.float32)
    )
  reference.check_message(raised.value, words)


def test_momentum_is_no_adam():
  for optimizer in (
    optax.sgd(0.1),
    optax.sgd(optax.linear_schedule(1.0, 0.0, 9), momentum=0.9),
    optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    lambda r: optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9),
  ):
    measures.check_sgd(optimizer, "scaffold")


def test_averaging_refuses_a_decay_of_1():
  with pytest.raises(errors.ConfigError) as raised:
    algorithms.averaged(fedavg()[0], 1.0)
  reference.check_message(raised.value, ["decay: got 1.0", "[0, 1)"])
