"""Optimizers by config: the algorithms' own defaults, clocks, what is read."""

import algorithm_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedfm import choices, errors, settings

# Each with a server rate, momentum or weighting that is not FedAvg's.
OTHER_DEFAULTS = (
  "fedadagrad",
  "fedavgm",
  "fedyogi",
  "diloco",
  "photon",
  "scaffold",
  "fedbuff",
)


@pytest.mark.parametrize(
  "name",
  [
    "fedadam",
    "reptile",
    *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_DEFAULTS),
  ],
)
def test_a_config_leaves_algorithms_their_defaults(name):
  problem = cases.problem_of(name)
  config = settings.from_dict(
    {"algorithm": name, "client": {"learning_rate": cases.RATE}}
  )
  by_config = choices.algorithm(config, problem.loss, None, problem.num_clients)
  by_hand = getattr(choices.algorithms, name)(
    problem.loss,
    client_optimizer=optax.sgd(cases.RATE),
    num_clients=problem.num_clients,
  )
  start = problem.start(jnp.float32)
  cohort = jax.tree.map(
    lambda x: np.float32(x) if np.asarray(x).dtype == np.float64 else x,
    problem.pack(problem.rounds[0]),
  )
  ends = [
    jax.jit(one.round)(one.init(start), problem.base, cohort)[0].trainable
    for one in (by_config, by_hand)
  ]
  np.testing.assert_allclose(*map(cases.flat, ends), rtol=1e-6)
  assert (cases.flat(ends[0]) != cases.flat(start)).any()


@pytest.mark.parametrize("name", ["rolora", "streaming_diloco"])
def test_schedules_go_on_in_rounds_of_other_parts(name):
  """A server rate of 0 in the second round, which has another part's turn."""
  rate = optax.piecewise_constant_schedule(1.0, {1: 0.0})
  algorithm = cases.build(name, server_optimizer=optax.sgd(rate))
  problem = cases.problem_of(name)
  with jax.enable_x64(True):
    states = [algorithm.init(problem.start(jnp.float64))]
    round_fn = jax.jit(algorithm.round)
    for ids in problem.rounds:
      state, _ = round_fn(states[-1], problem.base, problem.pack(ids))
      states.append(state)
  start, first, second = (cases.flat(state.trainable) for state in states)
  assert (first != start).any()
  np.testing.assert_array_equal(second, first)


@pytest.mark.parametrize(
  "config, message",
  [
    (
      {"algorithm": "diloco", "server": {"optimizer": "adam"}},
      "^server.optimizer: got 'adam', but algorithm 'diloco' expects 'sgd'",
    ),
    (
      {"algorithm": "fedadam", "server": {"momentum": 0.3}},
      "^server.momentum: got 0.3, but algorithm 'fedadam' expects 0.9",
    ),
    (
      {"server": {"tau": 0.1}},
      "^server.tau: got 0.1, but server.optimizer 'sgd' expects 0.001",
    ),
    (
      {"algorithm": "fedkseed", "client": {"momentum": 0.5}},
      "^client.momentum: got 0.5, but client.optimizer 'sgd' expects 0.9",
    ),
    (
      {"client": {"optimizer": "adam", "weight_decay": 0.1}},
      "^client.weight_decay: got 0.1, but client.optimizer 'adam' expects 0.0",
    ),
    (
      {"algorithm": "afl", "client": {"weighting": "tokens"}},
      "^client.weighting: got 'tokens', but algorithm 'afl' expects 'auto'",
    ),
  ],
)
def test_settings_that_nothing_reads_are_refused(config, message):
  with pytest.raises(errors.ConfigError, match=message):
    choices.algorithm(settings.from_dict(config), cases.linear_loss, None, 5)


@pytest.mark.parametrize("name", ["momentum", "adam", "adagrad", "yogi"])
def test_settings_that_are_read_pass(name):
  server = {"optimizer": name, "learning_rate": 0.5}
  server |= {"momentum": 0.3} if name == "momentum" else {"tau": 0.1}
  client = {"optimizer": "momentum", "momentum": 0.5}
  config = settings.from_dict({"client": client, "server": server})
  choices.algorithm(config, cases.linear_loss, None, 5)
