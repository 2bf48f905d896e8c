"""Runs with privacy: epsilon in the metrics, the ledger, stops and resumes."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import reference
import tiny

from fedfm import checkpoint, errors, experiment, metrics, privacy, protection

PRIVATE = {
  "rounds": 4,
  "clients_per_round": 2,
  "client": {"local_steps": 1},
  "checkpoint": {"every": 2},
  "privacy": {
    "kind": "gaussian",
    "clip_norm": 0.1,
    "noise_multiplier": 1.3,
    "delta": 1e-3,
    "accountant": "rdp",
  },
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def built(root):
  return tiny.build(root, **PRIVATE)


@pytest.fixture(scope="module")
def whole(built, root):
  """The folder of a run that was never stopped."""
  experiment.run(built, root / "whole")
  return root / "whole"


def epsilons(folder):
  return [row.get("privacy/epsilon") for row in metrics.read(folder)]


def test_epsilon_of_every_round_is_reported(built, whole):
  rate = 2 / len(built.data.train.ids)
  fixed = {"sampler": "uniform", "sampling_rate": rate, "accountant": "rdp"}
  # Replacing a client changes the sum by up to two clip norms.
  expected = [
    privacy.epsilon(noise_multiplier=1.3 / 2, rounds=r, delta=1e-3, **fixed)
    for r in range(1, 5)
  ]
  assert epsilons(whole) == [None, *expected]
  assert sorted(expected) == expected
  log = (whole / "log.txt").read_text()
  assert f"privacy/epsilon {expected[-1]:.6g}" in log
  assert "metrics are not private" in log


def test_the_ledger_is_in_the_checkpoint(whole, built):
  with checkpoint.Checkpointer(whole / "checkpoints", read_only=True) as reader:
    stored = reader.manifest(4)["extra"]["privacy"]
  event = built.accounting.event._asdict()
  assert stored["spent"] == [{**event, "rounds": 4}]


def test_a_round_that_runs_again_draws_the_same_noise(built, whole, root):
  """Round 3 is done twice, as after a kill that lost its checkpoint."""
  workdir = root / "again"
  experiment.run(tiny.variant(built, rounds=3), workdir)
  assert len(epsilons(workdir)) == 4
  shutil.rmtree(workdir / "checkpoints" / "3")
  experiment.run(built, workdir)
  got, expected = tiny.content(workdir), tiny.content(whole)
  assert got["arrays"] == expected["arrays"]
  assert got["extra"]["privacy"] == expected["extra"]["privacy"]
  assert epsilons(workdir) == epsilons(whole)


def test_a_ledger_of_other_rounds_is_refused(built, root, monkeypatch):
  """Weights whose privacy nobody counted are not trained on."""
  workdir = root / "forged"
  with monkeypatch.context() as patch:
    patch.setattr(privacy.Ledger, "to_json", lambda self: {})
    experiment.run(tiny.variant(built, rounds=2), workdir)
  with pytest.raises(errors.CheckpointError, match="privacy ledger: got 0"):
    experiment.run(built, workdir)


@pytest.mark.parametrize(
  ("field", "value"),
  [("noise_multiplier", 0.5), ("clip_norm", 1.0), ("delta", 1e-4)],
)
def test_another_privacy_is_another_run(built, whole, field, value):
  other = tiny.variant(built, privacy={field: value})
  with pytest.raises(errors.ConfigError, match=f"privacy.*{field}.*{value}"):
    experiment.run(other, whole)


def test_an_epsilon_holds_for_its_rounds(root):
  """Its noise is chosen for them, so that they may not grow later."""
  config = tiny.config(root, **PRIVATE)
  config["privacy"] = {
    "kind": "gaussian",
    "epsilon": 3.0,
    "accountant": "rdp",
  }
  settings = experiment.as_settings(config)
  counted = protection.accounting(settings, 8)
  assert 2.99 < counted.epsilon(4) <= 3.0
  longer = experiment.as_settings(config | {"rounds": 5})
  assert "rounds" in experiment._check_folder(
    experiment.as_settings(tiny.config(root)), root / "none", None
  )
  assert "rounds" not in experiment._check_folder(longer, root / "none", None)


def test_rounds_of_nobody_and_of_bad_clients_release_noise(built):
  """They move the weights by the noise alone, and all of it."""
  cohort, after = built.cohort(0), []
  with jax.set_mesh(built.mesh):
    for changes in (
      {"weight": cohort.weight * 0},
      {"rate": cohort.rate * float("nan")},
    ):
      changed = dataclasses.replace(cohort, **changes)
      state = built.initial_state()
      before = reference.flat(state.trainable)
      state, values = built.run_naming_round(state, built.base, changed)
      assert not int(values["clients/participating"])
      after.append(reference.flat(state.trainable) - before)
  np.testing.assert_array_equal(*after)
  std = 1.3 * 0.1 / 2
  assert abs(after[0].std() / std - 1) < 5 / np.sqrt(2 * len(after[0]))


@pytest.mark.slow
def test_a_run_under_secure_aggregation_with_noise(root, tmp_path):
  """Poisson cohorts, dropouts, rounds that abort; all are charged."""
  config = tiny.config(
    root,
    sampler="poisson",
    rounds=4,
    clients_per_round=2,
    client={"local_steps": 1},
    privacy={
      "kind": "gaussian",
      "noise_multiplier": 1.0,
      "secure_aggregation": {"enabled": True, "threshold": 2, "dropout": 0.4},
    },
  )
  with tiny.one_device():
    experiment.train(config, tmp_path / "run")
  lines = metrics.read(tmp_path / "run")[1:]
  for row in lines:
    assert row["privacy/aborted"] == (row["privacy/survivors"] < 2)
    assert (row["update/norm"] == 0) == row["privacy/aborted"]
  assert {row["privacy/aborted"] for row in lines} == {0, 1}
  assert all(np.diff([row["privacy/epsilon"] for row in lines]) > 0)
