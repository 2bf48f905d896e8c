"""Runs whose clients' states on the host are damaged, and go on."""

import dataclasses
import logging
import pathlib
import shutil
from typing import Any

import pytest
import tiny

from fedfm import assembly, checkpoint, errors, experiment, hosting
from fedfm.clients.host_store import HostStore

pytestmark = pytest.mark.slow
COPIES = ("first", "second")
ROUNDS = 4


@pytest.fixture(scope="module", autouse=True)
def one_device():
  with tiny.one_device():
    yield


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  return tiny.build(
    tmp_path_factory.mktemp("tiny"),
    rounds=ROUNDS,
    algorithm="ditto",
    client={"store": "host"},
    checkpoint={"every": 1, "keep_last": 2},
    eval={"every": ROUNDS},
  )


@pytest.fixture(scope="module")
def train(built):
  """Runs so many rounds in a folder, all with the programs of the first."""
  jitted: list[Any] = []
  real = assembly.blueprint.jit_round

  def jit_round(mesh, round_fn, shardings):
    if not jitted:
      jitted.append(real(mesh, round_fn, shardings))
    return jitted[0]

  def run(workdir, count=ROUNDS):
    settings = dataclasses.replace(built.settings, rounds=count)
    other = dataclasses.replace(built, settings=settings)
    for name in ("run_evaluation", "run_own_evaluation", "_init_state"):
      other.__dict__[name] = getattr(built, name)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(assembly.blueprint, "jit_round", jit_round)
      experiment.run(other, workdir)

  return run


def result(workdir):
  """Bits of a finished run, and of its clients."""
  states, damaged = hosting.verify(workdir, ROUNDS)
  assert damaged == []
  content = tiny.content(workdir)
  # Where a run is stopped, its last round is evaluated, others are not.
  content["metrics"] = [
    {k: v for k, v in line.items() if not k.startswith("eval/")}
    for line in content["metrics"]
  ] + [content["summary"]["final"]]
  return states, content


@pytest.fixture(scope="module")
def stopped(train, tmp_path_factory):
  """A run after three rounds, the first in the store's rows."""
  workdir = tmp_path_factory.mktemp("runs") / "stopped"
  train(workdir, 2)
  train(workdir, 3)
  assert (workdir / "checkpoints" / "2").exists()
  for copy in COPIES:
    logs = (workdir / "clients" / copy / "logs").iterdir()
    assert sorted(p.name for p in logs) == ["2", "3"]
  return workdir


@pytest.fixture(scope="module")
def whole(train, stopped):
  """The same run, going on undisturbed."""
  workdir = shutil.copytree(stopped, stopped.with_name("whole"))
  train(workdir)
  return result(workdir)


def flip(path: pathlib.Path):
  """One bit of the first row that is written, or of a log's."""
  content = bytearray(path.read_bytes())
  at = len(content) - 20
  if path.name == "rows":
    at = next(i for i, byte in enumerate(content) if byte) + 20
  content[at] ^= 1
  with open(path, "r+b") as file:
    file.write(content)


def cut(path: pathlib.Path):
  with open(path, "r+b") as file:
    file.truncate(path.stat().st_size - 30)


def delete(path: pathlib.Path):
  path.unlink()


def scratch(stopped, tmp_path):
  return pathlib.Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.mark.parametrize(
  ("fault", "name"),
  [
    (fault, name)
    for fault in (flip, cut, delete)
    for name in ("rows", "logs/2", "logs/3", "store.json")
  ],
)
def test_one_copy_is_mended_when_the_run_goes_on(
  train, stopped, whole, tmp_path, fault, name
):
  workdir = scratch(stopped, tmp_path)
  fault(workdir / "clients" / "first" / name)
  train(workdir)
  assert result(workdir) == whole
  assert not list((workdir / "checkpoints").glob("*damaged*"))


@pytest.mark.parametrize("fault", [flip, cut, delete])
def test_the_checkpoint_before_is_used_where_both_copies_are_damaged(
  train, stopped, whole, tmp_path, fault, caplog
):
  workdir = scratch(stopped, tmp_path)
  for copy in COPIES:
    fault(workdir / "clients" / copy / "logs" / "3")
  with pytest.raises(errors.CheckpointError, match="both copies"):
    hosting.verify(workdir, 3)
  hosting.verify(workdir, 2)
  with caplog.at_level(logging.WARNING):
    train(workdir)
  assert "set aside as 3.damaged" in caplog.text and "logs/3: is" in caplog.text
  assert (workdir / "checkpoints" / "3.damaged").exists()
  assert result(workdir) == whole
  with checkpoint.Checkpointer(workdir / "checkpoints") as checkpointer:
    assert checkpointer.all_rounds() == [3, 4]  # It saves again.


@pytest.mark.parametrize("fault", [flip, cut, delete])
@pytest.mark.parametrize("copies", [COPIES[:1], COPIES])
@pytest.mark.parametrize("name", ["rows", "logs/2", "logs/3"])
def test_damage_while_it_runs(
  train, stopped, whole, tmp_path, monkeypatch, fault, copies, name
):
  """One copy is mended under way; of two it stops, and goes back if it can."""
  if name == "rows" and len(copies) == 2:
    pytest.skip("no checkpoint is older than both files of rows")
  workdir, real = scratch(stopped, tmp_path), HostStore.read

  def read(self, rows, version=None):
    with monkeypatch.context() as patch:
      patch.setattr(HostStore, "read", real)
      for copy in copies:
        fault(workdir / "clients" / copy / name)
    # Of all clients: whose rows are damaged may not be in the cohort.
    monkeypatch.setattr(HostStore, "read", real)
    real(self, range(self.num_clients), version)
    return real(self, rows, version)

  monkeypatch.setattr(HostStore, "read", read)
  if len(copies) == 2:
    with pytest.raises(
      errors.CheckpointError, match="damaged|missing"
    ) as error:
      train(workdir)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
  if len(copies) == 2 and name == "logs/2":
    # No checkpoint is older than that.
    with pytest.raises(errors.CheckpointError, match="no intact checkpoint"):
      train(workdir)
    return
  train(workdir)
  train(workdir)  # Nothing is left to do, but a deleted file's copy to make.
  assert result(workdir) == whole


def test_a_store_that_is_gone_is_refused(train, stopped, tmp_path):
  """Not made anew: clients would forget what they learnt."""
  workdir = scratch(stopped, tmp_path)
  shutil.move(workdir / "clients", tmp_path / "away")
  with pytest.raises(errors.CheckpointError, match="clients: is missing"):
    train(workdir)
  assert not (workdir / "clients").exists()
  names = {p.name for p in (workdir / "checkpoints").iterdir()}
  assert names == {"2", "3"}


def test_a_reader_takes_the_newest_whole_checkpoint(built, stopped, tmp_path):
  workdir = scratch(stopped, tmp_path)
  for copy in COPIES:
    cut(workdir / "clients" / copy / "logs" / "3")
  before = sorted(workdir.rglob("*"))
  opened, state = experiment.open_run(workdir)
  assert int(state.round) == 2
  assert opened.host is not None
  opened.host.read(range(opened.host.num_clients), 2)
  assert sorted(workdir.rglob("*")) == before
