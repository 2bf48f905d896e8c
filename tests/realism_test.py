"""Availability, dropout, stragglers, partial work; the ledger of a round."""

import jax
import numpy as np
import pytest
import tiny

from fedfm import (
  adapters,
  data,
  errors,
  experiment,
  ledger,
  metrics,
  model_flops,
  models,
  planning,
  types,
)
from fedfm.data import continual
from fedfm.data.realism import Costs, Devices, Realism

IDS = [f"client {i}" for i in range(4000)]
COSTS = Costs(flops_per_step=2e9, bytes_up=1e6, bytes_down=4e6)


def test_the_defaults_are_ideal():
  ideal = Realism()
  assert ideal.online(IDS, 3) == IDS
  got = ideal.attend(IDS[:5], 0, [3, 1, 4, 1, 5], COSTS)
  assert got.reports.all() and got.steps.tolist() == [3, 1, 4, 1, 5]
  np.testing.assert_array_equal(ideal.rates(IDS[:5]), 1)


def test_draws_depend_on_seed_round_and_client_only():
  real = Realism(
    seed=3, availability=0.5, dropout=0.3, least_work=0.2, rate_spread=1.0
  )
  steps = np.full(len(IDS), 10)
  whole = real.attend(IDS, 7, steps, COSTS)
  some = real.attend(IDS[::-3], 7, steps[::-3], COSTS)
  for x, y in zip(whole, some):
    np.testing.assert_array_equal(x[::-3], y)
  there = set(real.online(IDS, 7))
  assert set(real.online(IDS[::-3], 7)) == there & set(IDS[::-3])
  np.testing.assert_array_equal(real.rates(IDS)[::-3], real.rates(IDS[::-3]))
  for seed, round_index in ((4, 7), (3, 8)):
    other = Realism(seed=seed, availability=0.5)
    assert set(other.online(IDS, round_index)) != there


def test_shares_are_those_asked_for():
  real = Realism(availability=0.3, dropout=0.2, least_work=0.5, rate_spread=0.4)
  got = real.attend(IDS, 0, [1000] * len(IDS), COSTS)
  # Within five standard errors of the shares.
  for value, expected, deviation in (
    (len(real.online(IDS, 0)) / len(IDS), 0.3, np.sqrt(0.3 * 0.7)),
    (got.reports.mean(), 0.8, np.sqrt(0.2 * 0.8)),
    (got.steps.mean() / 1000, 0.75, 0.5 / np.sqrt(12)),
    (np.log(real.rates(IDS)).mean(), 0, 0.4),
  ):
    assert abs(value - expected) < 5 * deviation / np.sqrt(len(IDS)) + 1e-3
  assert got.steps.min() >= 500 and got.steps.max() <= 1000
  assert abs(np.log(real.rates(IDS)).std() - 0.4) < 0.03
  # A cycle keeps the mean, and moves clients together within it.
  daily = Realism(availability=0.5, period=8)
  online = np.array(
    [np.isin(IDS, daily.online(IDS, r)) for r in range(16)], float
  )
  assert abs(online.mean() - 0.5) < 0.02
  same_time = np.mean(online[0] * online[8]) / np.mean(online[0])
  other_time = np.mean(online[0] * online[4]) / np.mean(online[0])
  assert same_time > 0.7 and other_time < 0.3


def test_seconds_and_deadlines_by_hand():
  alike = Devices(
    flops_per_second=1e9,
    up_bytes_per_second=5e5,
    down_bytes_per_second=2e6,
    latency_seconds=0.5,
    spread=0.0,
  )
  # 0.5 + 1e6 / 5e5 + 4e6 / 2e6 = 4.5 s on the way, and 2 s a step.
  steps = [1, 4, 10]
  waits = Realism(devices=alike).attend(IDS[:3], 0, steps, COSTS)
  np.testing.assert_allclose(waits.seconds, [6.5, 12.5, 24.5])
  drops = Realism(devices=alike, deadline=12.5)
  got = drops.attend(IDS[:3], 0, steps, COSTS)
  np.testing.assert_array_equal(got.reports, [True, True, False])
  partial = Realism(devices=alike, deadline=11.0, late="partial")
  got = partial.attend(IDS[:3], 0, steps, COSTS)
  assert got.reports.all() and got.steps.tolist() == [1, 3, 3]
  np.testing.assert_allclose(got.seconds, [6.5, 10.5, 10.5])
  too_short = Realism(devices=alike, deadline=5.0, late="partial")
  assert not too_short.attend(IDS[:3], 0, steps, COSTS).reports.any()


def test_a_profile_has_the_spread_asked_for():
  devices = Devices(spread=0.5, latency_seconds=0.0)
  only_up = Costs(0.0, 1.25e6, 0.0)
  seconds, _ = devices.seconds(0, IDS, only_up)
  assert abs(np.median(seconds) - 1) < 0.05
  assert abs(np.log(seconds).std() - 0.5) < 0.03
  _, speed = devices.seconds(0, IDS, Costs(1e12, 0, 0))
  assert abs(np.corrcoef(np.log(seconds), np.log(speed))[0, 1]) < 0.08
  assert not np.allclose(seconds, devices.seconds(1, IDS, only_up)[0])


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Realism(availability=0), r"^availability: got 0, .* \(0, 1\]"),
    (lambda: Realism(availability=1.1), "^availability: got 1.1"),
    (lambda: Realism(dropout=1.0), r"^dropout: got 1.0, expected in \[0, 1\)"),
    (lambda: Realism(least_work=0.0), "^least_work: got 0.0"),
    (lambda: Realism(deadline=-1.0), "^deadline: got -1"),
    (lambda: Realism(deadline=np.nan), "^deadline: got nan"),
    (lambda: Realism(late="dropp"), "^late: .*did you mean 'drop'"),
    (lambda: Devices(flops_per_second=0.0), "^flops_per_second: got 0"),
    (lambda: Devices(spread=np.inf), "^spread: got inf"),
  ],
)
def test_bad_options_are_named(make, message):
  with pytest.raises(errors.ConfigError, match=message):
    make()


# The ledger.


def model(**sizes):
  return models.decoder(
    models.DecoderConfig(
      vocab_size=50, width=8, num_layers=3, num_heads=2, mlp_width=16, **sizes
    )
  )


def test_flops_by_hand():
  # A layer: q, k, v, o of 8 x 8 and three of 8 x 16; a head of 8 x 50.
  kernels, head = 3 * (4 * 64 + 3 * 128), 400
  attention = 4 * 3 * 8 * 20  # 4 x layers x (heads x head size) x sequence.
  for tied in (True, False):
    one = model(tie_embeddings=tied)
    got = model_flops.flops_per_token(one, "full", one.shapes, 20)
    assert got == (0, 6 * (kernels + head), 3 * attention)
  adapter = adapters.lora(model(), rank=2, targets=["q_proj"])
  shapes = {
    "layers/q_proj": {"a": np.zeros((3, 8, 2)), "b": np.zeros((3, 2, 8))}
  }
  got = model_flops.flops_per_token(model(), adapter.kind, shapes, 20)
  assert got == (4 * (kernels + head), 6 * 3 * 2 * 16, 3 * attention)
  trained = {"final_norm": np.zeros(8), "lm_head": np.zeros((8, 50))}
  got = model_flops.flops_per_token(model(), "head", trained, 20)
  assert got == (2 * kernels, 6 * head, attention)
  assert got.total == 2 * kernels + 6 * head + attention
  last = adapters.last_layers(model())
  shapes = jax.eval_shape(last.init, jax.random.key(0), model().shapes)
  got = model_flops.flops_per_token(model(), last.kind, shapes, 20)
  # Of three layers two go forward only; the last has gradients, as the head.
  assert got.frozen == 2 * kernels * 2 / 3 + 4 * head
  assert got.trainable == 6 * kernels / 3
  assert got.attention == pytest.approx(attention * (2 + 3) / 3)


def test_a_line_of_the_ledger_by_hand():
  alike = Devices(
    flops_per_second=1e9,
    up_bytes_per_second=1e6,
    down_bytes_per_second=1e6,
    latency_seconds=0.0,
    spread=0.0,
  )
  work = planning.Work(["a", "b"], [3, 5], [1.0, 1.0], contacted=4)
  line = ledger.Ledger(1e9, Realism(devices=alike)).line(work, 10**6, 2 * 10**6)
  assert line == {
    "comm/bytes_up": 2 * 10**6,
    "comm/bytes_down": 8 * 10**6,
    "compute/flops": 8e9,
    "clients/contacted": 4,
    "simulated/seconds": 3 + 5.0,
  }
  before = ledger.Ledger(1e9, Realism(devices=alike), flops_at_start=2e9)
  begun = before.line(work, 10**6, 2 * 10**6)
  assert begun["compute/flops"] == 8e9 + 2 * 2e9
  assert begun["simulated/seconds"] == 3 + 2 + 5.0
  # Of 9.5 s, 5 are over before the first step.
  deadline = Realism(devices=alike, deadline=9.5, late="partial")
  costs = Costs(1e9, 10**6, 2 * 10**6, flops_at_start=2e9)
  assert deadline.attend(["a", "b"], 0, [3, 5], costs).steps.tolist() == [3, 4]
  late = ledger.Ledger(1e9, Realism(devices=alike, deadline=9.0, dropout=0.5))
  assert late.line(work, 10**6, 0)["simulated/seconds"] == 9.0
  nobody = planning.Work([], [], [], contacted=0)
  assert late.line(nobody, 1, 1)["simulated/seconds"] == 0


def test_a_run_counts_the_passes_of_its_algorithm(tmp_path):
  built = tiny.build(
    tmp_path,
    adapter={"kind": "full"},
    algorithm="ifca",
    algorithm_options={"num_clusters": 3},
  )
  costs = built.ledger.planned_costs(built.trainable, None, None)
  # Three forwards are as much as a training step of all weights.
  assert costs.flops_at_start == costs.flops_per_step > 0
  arguments = (built.settings, built.model, "full", built.trainable)
  twice = types.Passes(forwards=2, backwards=2)
  double = ledger.make_ledger(*arguments, twice, built.ledger.realism)
  assert double.flops_per_step == 2 * costs.flops_per_step
  assert double.flops_at_start == 0


# Populations that change, and whole runs.


def test_clients_arrive_and_stay():
  source = data.from_arrays({f"c{i}": {"x": np.ones(2)} for i in range(10)})
  schedule = continual.arrivals(source, rounds=5, seed=1)
  there = [schedule.present(r) for r in range(7)]
  assert [len(x) for x in there] == [1, 3, 5, 7, 9, 10, 10]
  for before, after in zip(there, there[1:]):
    assert set(before) <= set(after)
  assert there[0] != continual.arrivals(source, rounds=5, seed=3).present(0)
  with pytest.raises(errors.ConfigError, match="rounds: got 0"):
    continual.arrivals(source, rounds=0)


def test_phases_show_every_example_once():
  source = data.from_arrays(
    {"a": {"x": np.arange(7)}, "b": {"x": np.arange(100, 102)}}
  )
  schedule = continual.phases(source, num_phases=3, rounds_each=2)
  seen = {"a": [], "b": []}
  for r in (0, 2, 4):
    now = schedule.source(r)
    assert now.ids == source.ids  # Rows of a client store stay.
    for i in schedule.present(r):
      assert now.size(i) == len(now.read(i)["x"]) > 0
      seen[i] += now.read(i)["x"].tolist()
  assert seen == {"a": list(range(7)), "b": [100, 101]}
  assert schedule.present(0) == ["a"]  # Two examples for three parts.
  evals = schedule.evals({"seen": source, "unseen": source})
  assert list(evals) == ["seen", "unseen", "phase_0", "phase_1", "phase_2"]
  assert evals["phase_0"].ids == ("a",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tiny")


REAL = {
  "rounds": 6,
  "clients_per_round": 4,
  "realism": {
    "availability": 0.8,
    "dropout": 0.4,
    "least_work": 0.3,
    "rate_spread": 0.5,
  },
  "communication": {"up": "top_k", "up_options": {"fraction": 0.25}},
  "eval": {"every": 3},
  "checkpoint": {"every": 3},
}


def real_config(folder):
  config = tiny.config(folder, **REAL)
  config["data"] |= {
    "schedule": "phases",
    "schedule_options": {"num_phases": 2, "rounds_each": 3},
  }
  return config


def test_cohorts_are_packed_as_planned(folder):
  with tiny.one_device():
    built = experiment.build(real_config(folder))
  plans = [built.plan(r) for r in range(6)]
  assert any(len(work.ids) < work.contacted for work in plans)
  assert len({rate for work in plans for rate in work.rates}) > 3
  shapes = set()
  for r, work in enumerate(plans):
    cohort, now = built.cohort(r), built.schedule.source(r)
    there = np.asarray(cohort.order[: len(work.ids)])
    for name, expected in (
      ("num_steps", work.local_steps),
      ("rate", np.float32(work.rates)),
      ("row", [built.data.train.index(i) for i in work.ids]),
      ("weight", 1),
    ):
      got = np.asarray(getattr(cohort, name)).reshape(-1)[there]
      np.testing.assert_array_equal(got, expected)
    # Few clients, steps or arrivals change no shape: two, for long and short.
    shapes.add(str([x.shape for x in (cohort.slot, cohort.row, cohort.order)]))
    assert all(now.size(i) for i in work.ids)
  assert len(shapes) <= 2


@pytest.mark.slow
def test_a_run_of_real_clients_on_drifting_data(folder):
  config = real_config(folder)

  def without_time(line):
    aside = ("time", "memory")
    return {k: x for k, x in line.items() if k.split("/")[0] not in aside}

  with tiny.one_device():
    built = experiment.build(config)
    summary, _ = experiment.run(built, folder / "real")
    assert 1 <= built.run_naming_round._cache_size() <= 2
    experiment.train(config | {"rounds": 3}, folder / "stopped")
    experiment.train(config, folder / "stopped")
  lines, resumed = (
    [without_time(x) for x in metrics.read(folder / name)]
    for name in ("real", "stopped")
  )
  assert lines == resumed
  up, down = built.algorithm.bytes_per_client(built.initial_state())
  assert up < down / 1.9  # A quarter of the values, with their places.
  for r, line in enumerate(lines[1:]):
    work = built.plan(r)
    assert line["clients/participating"] == len(work.ids)
    assert line["clients/contacted"] == work.contacted
    assert line["comm/bytes_up"] == up * len(work.ids)
    assert line["comm/bytes_down"] == down * work.contacted
    assert line["simulated/seconds"] > 0
    steps = sum(work.local_steps)
    assert line["compute/flops"] == steps * built.ledger.flops_per_step
  assert {"forgetting/phase_0", "forgetting/unseen"} <= set(summary)
  assert summary["forgetting/phase_0"] >= 0
