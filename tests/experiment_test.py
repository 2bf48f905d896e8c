"""Whole runs of a tiny federation: files, resuming, meshes, algorithms."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import algorithm_cases
import jax
import ml_collections
import numpy as np
import pytest
import tiny

from fedfm import (
  choices,
  errors,
  experiment,
  metrics,
  participation,
  run_folder,
  settings,
)

ROOT = pathlib.Path(__file__).parent.parent
METRICS = ("loss", "accuracy", "perplexity", "bits_per_byte")
# Dies between writing the metrics of a round and saving its checkpoint.
DYING_CONFIG = """
import os, signal
import ml_collections
from fedfm import metrics

def get_config():
  write = metrics.MetricsWriter.write
  def write_and_die(self, line):
    write(self, line)
    if line["round"] == 3:
      os.kill(os.getpid(), signal.SIGKILL)
  metrics.MetricsWriter.write = write_and_die
  return ml_collections.ConfigDict({config!r})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def finished(folder):
  """(config, folder, summary) of a run of four rounds, never interrupted."""
  config = tiny.config(folder, rounds=4)
  workdir = folder / "finished"
  return config, workdir, experiment.train(config, workdir)


def same_lines(workdir):
  """The metrics that must not depend on when or where the run ran."""
  return [
    {k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))}
    for line in metrics.read(workdir)
  ]


def trainable(workdir, **changes):
  return jax.device_get(experiment.open_run(workdir, changes)[1].trainable)


def assert_same_run(workdir, other):
  assert same_lines(workdir) == same_lines(other)
  jax.tree.map(
    np.testing.assert_array_equal, trainable(workdir), trainable(other)
  )


def relative_distance(tree, other, start):
  """|tree - other| / |other - start|, over all leaves."""
  flat = [
    np.concatenate([x.ravel() for x in jax.tree.leaves(t)])
    for t in (tree, other, start)
  ]
  return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1] - flat[2])


def test_a_run_writes_its_files(finished):
  config, workdir, summary = finished
  stored = json.loads((workdir / "config.json").read_text())
  assert stored == settings.to_dict(experiment.as_settings(config))
  lines = metrics.read(workdir)
  assert [line["round"] for line in lines] == [0, 1, 2, 3, 4]
  populations = [f"eval/{p}/{m}" for p in ("seen", "unseen") for m in METRICS]
  names = {n + s for n in populations for s in ("", "_p10", "_p90")}
  for line in lines:
    got = {k for k in line if k.startswith("eval/")}
    assert got == (names if line["round"] in (0, 2, 4) else set())
    for name in populations if got else ():
      assert line[f"{name}_p10"] <= line[f"{name}_p90"]
    if line["round"]:
      assert line["clients/participating"] == 3
      assert line["comm/bytes_up"] == line["comm/bytes_down"] > 0
      assert line["time/tokens_per_second"] > 0 and line["train/loss"] > 0
  assert json.loads((workdir / "summary.json").read_text()) == summary
  assert summary["rounds"] == 4
  for name, line in (("base", lines[0]), ("final", lines[4])):
    assert summary[name] == {k: line[k] for k in names}
  losses = [summary[k]["eval/unseen/loss"] for k in ("base", "final")]
  assert losses[1] < losses[0]
  assert [p.name for p in (workdir / "tensorboard").iterdir()]
  kept = sorted(p.name for p in (workdir / "checkpoints").iterdir())
  assert kept == ["2", "3", "4"]


def test_two_fresh_runs_are_the_same_bits(finished, folder):
  config, workdir, _ = finished
  experiment.train(ml_collections.ConfigDict(config), folder / "again")
  assert_same_run(folder / "again", workdir)


def test_another_seed_is_another_run(finished, folder):
  config, workdir, _ = finished
  experiment.train(config | {"seed": 1, "rounds": 1}, folder / "seed")
  assert same_lines(folder / "seed")[1] != same_lines(workdir)[1]


@pytest.mark.slow
def test_a_continued_run_has_the_bits_of_an_uninterrupted_one(finished, folder):
  config, workdir, _ = finished
  experiment.train(config | {"rounds": 2}, folder / "continued")
  assert same_lines(folder / "continued") == same_lines(workdir)[:3]
  experiment.train(config, folder / "continued")
  assert_same_run(folder / "continued", workdir)


def test_a_killed_run_has_the_bits_of_an_uninterrupted_one(finished, folder):
  config, workdir, _ = finished
  file = folder / "dying.py"
  file.write_text(DYING_CONFIG.replace("{config!r}", repr(config)))
  killed = folder / "killed"
  process = subprocess.run(
    [
      sys.executable,
      ROOT / "scripts" / "train.py",
      f"--config={file}",
      f"--workdir={killed}",
    ],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == -signal.SIGKILL, process.stderr
  assert metrics.read(killed)[-1]["round"] == 3
  assert not (killed / "summary.json").exists()
  assert not (killed / "checkpoints" / "3").exists()
  experiment.train(config, killed)
  assert_same_run(killed, workdir)


def test_a_finished_run_may_be_run_again(finished):
  config, workdir, summary = finished
  before = (workdir / "metrics.jsonl").read_bytes()
  assert experiment.train(config, workdir) == summary
  assert (workdir / "metrics.jsonl").read_bytes() == before


def test_fewer_rounds_than_done_are_refused(finished):
  config, workdir, _ = finished
  with pytest.raises(errors.ConfigError, match="rounds: got 2, but .* done 4"):
    experiment.train(config | {"rounds": 2}, workdir)
  assert json.loads((workdir / "config.json").read_text())["rounds"] == 4


def test_rounds_are_fixed_where_a_schedule_reads_them(folder):
  config = tiny.config(folder, rounds=1, client={"schedule": "cosine"})
  stored = settings.to_dict(experiment.as_settings(config))
  with run_folder.claim(folder / "cosine", stored) as claimed:
    claimed.commit()
  with pytest.raises(errors.ConfigError, match="rounds: had 1, now 2"):
    experiment.train(config | {"rounds": 2}, folder / "cosine")


def assert_close_run(workdir, other, config):
  start = jax.device_get(experiment.build(config).trainable)
  distance = relative_distance(trainable(workdir), trainable(other), start)
  assert distance < 1e-5
  for line, expected in zip(same_lines(workdir), same_lines(other)):
    assert line == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_another_mesh_gives_the_same_numbers(finished, folder):
  config, workdir, _ = finished
  mesh = {"clients": 2, "fsdp": 2, "tensor": 2}
  experiment.train(config | {"rounds": 2, "mesh": mesh}, folder / "mesh")
  # The run of one mesh goes on with another.
  experiment.train(config, folder / "mesh")
  assert_close_run(folder / "mesh", workdir, config)


@pytest.mark.slow
def test_one_device_gives_the_same_numbers(finished, folder):
  config, workdir, _ = finished
  with tiny.one_device():
    assert experiment.build(config).mesh.size == 1
    experiment.train(config, folder / "one")
  assert_close_run(folder / "one", workdir, config)


_QUICK = ("fedadam", "fedex_lora")  # The others take minutes in sum.


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow)
    for name in choices.ALGORITHMS
  ],
)
def test_every_algorithm_trains(folder, name):
  adapter = {"kind": "lora", "targets": ("q_proj",)}
  changes = {"adapter": adapter} | algorithm_cases.config_of(name)
  config = tiny.config(folder, **changes)
  with tiny.one_device():
    built = experiment.build(config)
  state = built.initial_state()

  def model():
    base = built.algorithm.effective_base(state, built.base)
    return jax.device_get((built.algorithm.effective_trainable(state), base))

  start = model()
  losses = []
  with jax.set_mesh(built.mesh):
    for index in range(2):
      state, got = built.run_round(state, built.base, built.cohort(index))
      losses.append(float(got["train/loss"]))
  end = model()
  assert np.isfinite(losses).all() and int(state.round) == 2
  pairs = list(zip(jax.tree.leaves(start), jax.tree.leaves(end)))
  assert all(np.isfinite(after).all() for _, after in pairs)
  assert any(np.any(before != after) for before, after in pairs)


@pytest.mark.slow
def test_the_server_rate_follows_its_schedule(finished, folder):
  config, _, _ = finished
  results = {}
  for schedule in ("constant", "linear"):
    with tiny.one_device():
      built = experiment.build(
        config | {"rounds": 2, "server": {"schedule": schedule}}
      )
    state, steps = built.initial_state(), []
    with jax.set_mesh(built.mesh):
      for index in range(2):
        before = jax.device_get(state.trainable)
        state, _ = built.run_round(state, built.base, built.cohort(index))
        steps.append(
          jax.tree.map(np.subtract, jax.device_get(state.trainable), before)
        )
    results[schedule] = steps
  for factor, got, full in zip(
    (1, 0.5), results["linear"], results["constant"]
  ):
    jax.tree.map(
      lambda x, y, f=factor: np.testing.assert_allclose(
        x, f * y, rtol=1e-4, atol=1e-7
      ),
      got,
      full,
    )


def test_a_round_without_clients_changes_nothing(folder):
  def config(seed):
    return tiny.config(
      folder,
      seed=seed,
      clients_per_round=1,
      sampler="poisson",
      algorithm="fedavgm",
      rounds=3,
      eval={"every": 1},
    )

  ids = experiment.build(config(0)).data.train.ids

  def sizes(seed):
    sampler = participation.sampler(
      experiment.as_settings(config(seed)), ids, len
    )
    return [len(sampler.sample(r)) for r in range(3)]

  seed = next(s for s in range(1000) if sizes(s) == [1, 0, 1])
  with tiny.one_device():
    experiment.train(config(seed), folder / "poisson")
  lines = same_lines(folder / "poisson")
  participating = [line["clients/participating"] for line in lines[1:]]
  assert participating == [1, 0, 1]
  assert lines[2]["comm/bytes_up"] == lines[2]["update/norm"] == 0
  losses = [line["eval/unseen/loss"] for line in lines]
  assert losses[1] == losses[2] != losses[3]


def test_a_run_that_holds_nothing_out_evaluates_nothing(folder, tmp_path):
  nothing = {"unseen_fraction": 0.0, "heldout_fraction": 0.0}
  config = tiny.config(folder, rounds=1, lanes=1, data=nothing)
  best = config | {"checkpoint": {"keep_best": "eval/seen/loss"}}
  with tiny.one_device():
    with pytest.raises(
      errors.ConfigError, match="keep_best: .* nothing is held"
    ):
      experiment.build(best)
    summary = experiment.train(config, tmp_path / "run")
    opened, state = experiment.open_run(tmp_path / "run")
  assert summary["base"] == summary["final"] == {}
  assert (
    "WARNING: nothing is evaluated"
    in (tmp_path / "run" / "log.txt").read_text()
  )
  assert opened.evaluate_clients(state.trainable) == {}


def test_a_run_opens_with_changes(finished):
  _, workdir, summary = finished
  opened, state = experiment.open_run(workdir)
  assert int(state.round) == 4
  assert opened.evaluate(state.trainable) == summary["final"]
  opened, _ = experiment.open_run(workdir, {"eval": {"max_examples": 1}})
  assert opened.settings.eval.max_examples == 1
  assert opened.settings.eval.batch_size == 2
  with pytest.raises(errors.ConfigError, match="max_example: unknown field"):
    experiment.open_run(workdir, {"eval": {"max_example": 1}})


def test_a_folder_without_a_run_is_not_opened(tmp_path):
  with pytest.raises(errors.CheckpointError, match="no config.json"):
    experiment.open_run(tmp_path)
