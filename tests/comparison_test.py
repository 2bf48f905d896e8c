"""Comparisons: seeds share a program and equal runs of their own."""

import json
import os
import pathlib

import numpy as np
import pytest
import tiny

from fedfm import arm_runs, comparison, errors, experiment, metrics

METRIC = "eval/unseen/loss"
TUNED = "eval/seen/finetuned_loss"
EVAL = {"finetune_steps": 1}
ONE = {"seed": 0, "rate": 1.0, "server_rate": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def compared(folder):
  return comparison.from_dict(
    {
      "base": tiny.config(folder, eval=EVAL),
      "arms": {
        "fedavg": {},
        "fedadam": {
          "algorithm": "fedadam",
          "server": {"learning_rate": 0.01},
        },
      },
      "seeds": (3, 4),
      "rates": (1.0, 0.5),
      "metric": METRIC,
      "target": 100.0,
    }
  )


@pytest.fixture(scope="module")
def results(compared, folder):
  with tiny.one_device():
    return comparison.run(compared, folder / "out", parallel=False)


@pytest.mark.slow
def test_a_seed_of_an_arm_equals_a_run_of_its_own(results, folder):
  with tiny.one_device():
    config = tiny.config(folder, seed=4)
    experiment.train(config, folder / "own")
    half = {"learning_rate": 0.25}
    config = tiny.config(folder, seed=3, client=half, eval=EVAL)
    experiment.train(config, folder / "half")
  runs = {(one["seed"], one["rate"]): one for one in results["fedavg"]}
  assert set(runs) == {(3, 1.0), (4, 1.0), (3, 0.5), (4, 0.5)}
  for name, case in (("own", (4, 1.0)), ("half", (3, 0.5))):
    lines = metrics.read(folder / name)
    assert [x["round"] for x in lines] == [0, 1, 2]
    for own, line in zip(lines, runs[case]["lines"], strict=True):
      for key in {METRIC, TUNED, "train/loss", "comm/bytes_up"} & set(own):
        assert line[key] == pytest.approx(own[key], rel=1e-5), (name, key)
  assert runs[3, 1.0]["lines"][-1] != runs[4, 1.0]["lines"][-1]
  assert TUNED in metrics.read(folder / "half")[-1]


@pytest.mark.slow
def test_finished_arms_are_read_back(compared, results, folder, monkeypatch):
  monkeypatch.setattr(arm_runs, "make_runner", None)
  assert comparison.run(compared, folder / "out") == results


@pytest.mark.parametrize("left", ['[{"seed": 3, "ra', '{"seed": 3}', "[3]"])
def test_a_file_that_was_cut_off_is_set_aside(
  left, compared, tmp_path, monkeypatch, caplog
):
  made = []

  def make_runner(settings, seeds, metric, parallel):
    def run(cases):
      made.extend(cases)
      return [{"seed": s, "rate": r, "lines": []} for s, r in cases]

    return run

  monkeypatch.setattr(arm_runs, "make_runner", make_runner)
  arguments = (compared.arms["fedavg"], (3,), METRIC, tmp_path, None)
  runs = arm_runs.kept_runs(*arguments)([(3, 1.0)])
  (file,) = tmp_path.iterdir()
  whole = file.read_text()
  file.write_text(left)
  assert arm_runs.kept_runs(*arguments)([(3, 1.0)]) == runs
  assert made == [(3, 1.0)] * 2 and file.read_text() == whole
  aside = file.with_name(f"{file.name}.damaged")
  assert aside.read_text() == left and set(tmp_path.iterdir()) == {file, aside}
  (warning,) = caplog.messages
  assert str(file) in warning and "set aside" in warning

  # A kill while the file is written leaves the runs before.
  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "replace", full)
  with pytest.raises(errors.SaveError, match="No space left"):
    arm_runs.kept_runs(*arguments)([(4, 1.0)])
  assert file.read_text() == whole


@pytest.mark.slow
def test_tuning_seeds_choose_the_rate_that_all_seeds_run_with(
  compared, results, folder, monkeypatch
):
  made = []

  def make_runner(settings, seeds, metric, parallel):
    def run(cases):
      made.extend(cases)
      # A rate of 2 is the best for seed 3, and the worst for seed 5.
      return [
        {"seed": s, "rate": r, "lines": [{METRIC: r if s == 5 else 9 - r}]}
        for s, r in cases
      ]

    return run

  monkeypatch.setattr(arm_runs, "make_runner", make_runner)
  tuned = compared._replace(
    arms={"fedavg": compared.arms["fedavg"]},
    seeds=(3, 5),
    tuning_seeds=(3,),
    rates=(1.0, 2.0),
    target=None,
  )
  # What the folder holds of seed 3 is not run again.
  ends = {
    (one["seed"], one["rate"]): one["lines"][-1][METRIC]
    for one in results["fedavg"]
  }
  runs = comparison.run(tuned, folder / "out")["fedavg"]
  assert made[0] == (3, 2.0) and (3, 1.0) not in made
  best = 2.0 if ends[3, 1.0] > 7 else 1.0
  assert [case for case in made if case[0] == 5] == [(5, best)]
  (row,) = comparison.summarise(tuned, {"fedavg": runs})
  expected = [7.0 if best == 2 else ends[3, 1.0], best]
  assert row["rate"] == best and row[METRIC] == comparison.spread(expected)


def test_an_arm_may_have_a_metric_of_its_own():
  compared = comparison.from_dict(
    {
      "arms": {"a": {}, "b": {}},
      "seeds": (0,),
      "metric": "personal",
      "own_metrics": {"b": "tuned"},
      "columns": ("global",),
    }
  )
  results = {
    "a": [{**ONE, "lines": [{"round": 0, "personal": 2.0}]}],
    "b": [{**ONE, "lines": [{"round": 0, "tuned": 3, "global": 4}]}],
  }
  rows = comparison.summarise(compared, results)
  assert [row["personal"] for row in rows] == ["2.000", "3.000"]
  assert [row["global"] for row in rows] == [None, "4.000"]
  curves = comparison.curves(compared, results)
  assert curves["a"][1] == [2.0] and curves["b"][1] == [3.0]


def test_an_unknown_metric_ends_a_comparison_before_its_rounds(
  compared, tmp_path, monkeypatch
):
  monkeypatch.setattr(arm_runs, "_one_by_one", lambda first: None)
  wrong = compared._replace(metric="eval/unseen/los")
  message = "arms.fedavg.metric: got 'eval/unseen/los'.*'eval/unseen/loss'"
  with tiny.one_device(), pytest.raises(errors.ConfigError, match=message):
    comparison.run(wrong, tmp_path, parallel=False)


@pytest.mark.slow
def test_one_program_of_all_cases_gives_the_same(compared, results):
  with tiny.one_device():
    settings = compared.arms["fedadam"]
    run = arm_runs.make_runner(settings, (3, 4), METRIC, parallel=True)
    runs = run([(3, 1.0), (4, 0.5)])
  expected = [
    one
    for one in results["fedadam"]
    if (one["seed"], one["rate"]) in ((3, 1.0), (4, 0.5))
  ]
  for got, want in zip(runs, expected, strict=True):
    for a, b in zip(got["lines"], want["lines"], strict=True):
      for key in {METRIC, "train/loss"} & set(a):
        assert a[key] == pytest.approx(b[key], rel=1e-4), key


@pytest.mark.slow
def test_the_summary_is_what_the_lines_say(compared, results):
  rows = comparison.summarise(compared, results)
  assert [row["arm"] for row in rows] == ["fedavg", "fedadam"]
  for row in rows:
    ends = {
      rate: [
        one["lines"][-1][METRIC]
        for one in results[row["arm"]]
        if one["rate"] == rate
      ]
      for rate in (1.0, 0.5)
    }
    best = min(ends, key=lambda rate: np.mean(ends[rate]))
    assert row["rate"] == best
    mean, std = np.mean(ends[best]), np.std(ends[best], ddof=1)
    assert row[METRIC] == f"{mean:.3f} +- {std:.3f}"
    assert row["rounds to target"] == "0.000 +- 0.000"
    assert row["MB up"] > 0


def test_a_diverged_rate_is_never_the_best(compared):
  runs = [
    {**ONE, "seed": 3, "rate": rate, "lines": [{METRIC: value}]}
    for rate, value in ((1.0, float("nan")), (0.5, 9.0))
  ]
  assert comparison.best_rates(compared, runs) == (0.5, 1.0)


def test_server_rates_are_tuned_with_the_clients(
  compared, tmp_path, monkeypatch
):
  def make_runner(settings, seeds, metric, parallel):
    server = settings.server.learning_rate

    def run(cases):  # Best at a client rate of 2 and a server rate of 0.03.
      return [
        {
          "seed": s,
          "rate": r,
          "lines": [{METRIC: abs(r - 2) + abs(server - 0.03)}],
        }
        for s, r in cases
      ]

    return run

  monkeypatch.setattr(arm_runs, "make_runner", make_runner)
  tuned = compared._replace(
    arms={"fedadam": compared.arms["fedadam"]},
    seeds=(3, 4),
    tuning_seeds=(5,),
    rates=(1.0, 2.0),
    server_rates=(0.3, 1.0, 3.0),
    target=None,
  )
  results = comparison.run(tuned, tmp_path)
  (row,) = comparison.summarise(tuned, results)
  assert row["rate"] == 2.0 and row["server rate"] == 3.0
  assert row[METRIC] == "0.000 +- 0.000"
  # Of the tuning seed all six pairs, of the others the best alone.
  assert len(results["fedadam"]) == 6 + 2


def test_curves_count_rounds_and_megabytes(compared, results):
  by_round = comparison.curves(compared, results)["fedavg"]
  by_size = comparison.curves(compared, results, "megabytes")["fedavg"]
  assert by_round[0] == [0, 2] and by_size[0][0] == 0
  assert by_round[1:] == by_size[1:]
  lines = results["fedavg"][0]["lines"]
  sent = sum(x["comm/bytes_up"] + x["comm/bytes_down"] for x in lines[1:])
  assert by_size[0][1] == pytest.approx(sent / 1e6)
  json.dumps(by_size)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"arms": {}}, "^arms: missing"),
    ({"arm": {}}, "^arm: unknown field .*'arms'"),
    ({"arms": {"a": {"round": 1}}}, "^arms.a.round: .*'rounds'"),
    ({"arms": {"a": {"rounds": 0}}}, "^arms.a.rounds: got 0"),
    ({"own_metrics": {"b": METRIC}}, "^own_metrics: got 'b' .*known: a"),
    ({"seeds": ()}, "^seeds: missing"),
    ({"seeds": 5}, "^seeds: got 5, expected a list of integers"),
    ({"seeds": 0}, "^seeds: got 0, expected a list"),
    ({"seeds": ("x",)}, "^seeds: got 'x', expected integers from 0 to"),
    ({"seeds": (0, 1.7)}, "^seeds: got 1.7, expected integers"),
    ({"seeds": (True,)}, "^seeds: got True, expected integers"),
    ({"seeds": (-1,)}, "^seeds: got -1, expected integers from 0"),
    ({"seeds": (0, 0)}, "^seeds: got 0, expected each one once"),
    ({"tuning_seeds": 7}, "^tuning_seeds: got 7, expected a list"),
    ({"own_metrics": 3}, "^own_metrics: got 3, expected {arm"),
    ({"own_metrics": {"a": 3}}, "^own_metrics.a: got 3, expected the name"),
    ({"arms": ["a"]}, r"^arms: got \['a'\], expected for each name"),
    ({"arms": {"a": 3}}, "^arms.a: got 3, expected fields of the settings"),
    ({"base": 3}, "^base: got 3, expected fields of the settings"),
    ({"rates": ()}, r"^rates: got \(\), expected a list of at least one"),
    ({"server_rates": ()}, r"^server_rates: got \(\), expected a list"),
    ({"rates": ("a",)}, "^rates: got 'a', expected finite numbers above 0"),
    ({"rates": (-1.0,)}, "^rates: got -1.0, expected finite numbers above 0"),
    ({"rates": (float("nan"),)}, "^rates: got nan, expected finite numbers"),
    ({"rates": (1.0, 1)}, "^rates: got 1, expected each one once"),
    ({"target": "x"}, "^target: got 'x', expected a finite number, or None"),
    ({"metric": 5}, "^metric: got 5, expected the name of a metric"),
    ({"columns": "abc"}, "^columns: got 'abc', expected a list of names"),
    ({"columns": (1,)}, "^columns: got 1, expected the name of a metric"),
    ({"higher_is_better": "no"}, "^higher_is_better: got 'no', expected True"),
  ],
)
def test_bad_comparisons_are_named(changes, message):
  values = {"arms": {"a": {}}, "seeds": (0,), "metric": METRIC} | changes
  with pytest.raises(errors.ConfigError, match=message):
    comparison.from_dict(values)


@pytest.mark.slow
def test_seeds_that_deal_clients_anew_are_evaluated_on_their_own(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {}
  for part, n in (("train", 80), ("test", 8)):
    y = rng.integers(0, 10, n)
    x = rng.random((n, 28, 28)) + (np.arange(28) // 3 == y[:, None])[:, None]
    arrays |= {f"x_{part}": x.astype(np.float32), f"y_{part}": y}
  np.savez(tmp_path / "images.npz", **arrays)
  cnn = pathlib.Path(__file__).parents[1] / "configs/models/small_cnn"
  config = {
    "rounds": 3,
    "clients_per_round": 4,
    "lanes": 1,
    "algorithm": "fedper",
    "algorithm_options": {"local_parts": ["head", "head_bias"]},
    "model": {"path": str(cnn), "init": "random"},
    "adapter": {"kind": "full"},
    "data": {
      "task": "classification",
      "name": "npz",
      "path": str(tmp_path / "images.npz"),
      "image_key": "x",
      "partition": "dirichlet",
      "alpha": 0.1,
      "num_clients": 4,
      "dealt_heldout_fraction": 0.3,
    },
    "client": {"learning_rate": 0.05, "batch_size": 4, "local_steps": 3},
    "eval": {"every": 3},
  }
  metric = "eval/seen/personal_loss"
  compared = comparison.from_dict(
    {"base": config, "arms": {"a": {}}, "seeds": (3, 4), "metric": metric}
  )
  with tiny.one_device():
    runs = comparison.run(compared, tmp_path / "out", parallel=False)["a"]
    experiment.train(config | {"seed": 4}, tmp_path / "own")
  (of_seed_4,) = (one for one in runs if one["seed"] == 4)
  own = metrics.read(tmp_path / "own")[-1]
  for name in (metric, "eval/seen/loss"):
    assert of_seed_4["lines"][-1][name] == pytest.approx(own[name], rel=1e-4)
