"""What can happen to a run: signals, a full disk, another run, another base."""

import json
import logging
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import script_runs
import tiny

from fedfm import (
  checkpoint,
  errors,
  experiment,
  interruption,
  metrics,
  run_folder,
)
from fedfm.clients.host_store import HostStore

ROOT = pathlib.Path(__file__).parent.parent
ROUNDS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def built(folder):
  """A run that saves after round 3 and at the end."""
  return tiny.build(folder, rounds=ROUNDS, checkpoint={"every": 3})


@pytest.fixture(scope="module")
def whole(folder, built):
  """The content of a run that nothing happened to."""
  experiment.run(built, folder / "whole")
  return tiny.content(folder / "whole")


def saved(workdir):
  with checkpoint.Checkpointer(
    workdir / "checkpoints", read_only=True
  ) as reader:
    return reader.all_rounds()


def at_round(monkeypatch, round, action):
  """Does something in the main thread when a round's metrics are written."""
  write = metrics.MetricsWriter.write

  def write_and_act(self, line):
    write(self, line)
    if line["round"] == round:
      action()

  monkeypatch.setattr(metrics.MetricsWriter, "write", write_and_act)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_that_round(
  built, whole, tmp_path, monkeypatch, capfd, signum
):
  handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  with monkeypatch.context() as patch:
    at_round(patch, 2, lambda: signal.raise_signal(signum))
    with pytest.raises(interruption.Stopped, match="stopped at round 2") as e:
      experiment.run(built, tmp_path)
  assert e.value.signum == signum
  assert handlers == [
    signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)
  ]
  assert saved(tmp_path) == [0, 2]
  assert not (tmp_path / "summary.json").exists()
  assert "saving this round" in capfd.readouterr().err
  assert "stopped at round 2" in (tmp_path / "log.txt").read_text()
  experiment.run(built, tmp_path)
  assert tiny.content(tmp_path) == whole


def test_a_second_ctrl_c_during_the_save_does_not_hurt_it(
  built, whole, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    at_round(patch, 1, lambda: signal.raise_signal(signal.SIGINT))
    real, count = checkpoint.Checkpointer.wait, []

    def wait(self):
      if self._pending is not None and self._pending[0] == 1:
        count.append(signal.raise_signal(signal.SIGINT))
      real(self)

    patch.setattr(checkpoint.Checkpointer, "wait", wait)
    with pytest.raises(interruption.Stopped):
      experiment.run(built, tmp_path)
  assert count and saved(tmp_path) == [0, 1]
  experiment.run(built, tmp_path)
  assert tiny.content(tmp_path) == whole


def test_a_signal_in_the_last_round_changes_nothing(
  built, whole, tmp_path, monkeypatch
):
  at_round(monkeypatch, ROUNDS, lambda: signal.raise_signal(signal.SIGTERM))
  assert experiment.run(built, tmp_path)[0]["rounds"] == ROUNDS
  assert tiny.content(tmp_path) == whole


def test_a_run_outside_of_the_main_thread_leaves_signals_alone(
  built, whole, tmp_path
):
  thread = threading.Thread(target=experiment.run, args=(built, tmp_path))
  thread.start()
  thread.join()
  assert tiny.content(tmp_path) == whole


def test_a_process_ends_with_the_code_of_its_signal(folder, whole, tmp_path):
  """The command itself, which signals itself in the second round."""
  values = tiny.config(
    folder,
    rounds=ROUNDS,
    lanes=1,
    checkpoint={"every": 3},
    adapter={"rank": 2, "targets": ("q_proj",)},
  )
  file = tmp_path / "config.py"
  file.write_text(
    "import os, signal, ml_collections\nfrom fedfm import metrics\n"
    "write = metrics.MetricsWriter.write\n"
    "def write_and_stop(self, line):\n  write(self, line)\n"
    "  if line['round'] == 2:\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    "metrics.MetricsWriter.write = write_and_stop\n"
    f"def get_config():\n  return ml_collections.ConfigDict({values!r})\n"
  )
  process = subprocess.run(
    [
      sys.executable,
      ROOT / "scripts" / "train.py",
      f"--config={file}",
      f"--workdir={tmp_path / 'run'}",
    ],
    env=script_runs.environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 143, process.stderr
  assert not process.stdout and "Traceback" not in process.stderr
  assert process.stderr.splitlines()[-1] == (
    "SIGTERM: stopped at round 2, which is saved; the same command goes on "
    "from there"
  )
  assert saved(tmp_path / "run") == [0, 2]


@pytest.fixture
def small_disk(tmp_path):
  """A file system of two megabytes."""
  place = tmp_path / "disk"
  place.mkdir()
  command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
  if subprocess.run(command, capture_output=True, check=False).returncode:
    pytest.skip("this needs the right to mount a tmpfs")
  yield place
  subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("left", [0, 16, 40])
def test_a_full_disk_keeps_what_was_there(built, whole, small_disk, left):
  """Lines of metrics do not fit any more, or a part of a checkpoint."""
  workdir = small_disk / "run"
  experiment.run(tiny.variant(built, rounds=2), workdir)
  before = saved(workdir)
  with open(small_disk / "filler", "wb") as filler:
    free = shutil.disk_usage(small_disk).free
    filler.write(b"x" * (free - left * 1024))
  with pytest.raises(errors.SaveError) as error:
    experiment.run(built, workdir)
  assert "\n" not in str(error.value) and error.value.exit_code == 3
  assert saved(workdir) == before == [0, 2]
  assert not list((workdir / "checkpoints").glob("*tmp*"))
  os.unlink(small_disk / "filler")
  experiment.run(built, workdir)
  assert tiny.content(workdir) == whole


def test_a_full_disk_keeps_the_states_of_clients(small_disk):
  """What is overwritten fits beside them, what is new does not any more."""
  shape, folder = (60_000,), small_disk / "clients"  # Twice 240 kB a client.
  store = HostStore(folder, {"x": np.zeros(shape, np.float32)}, 4)
  store.write([0], {"x": np.full((1, *shape), 1, np.float32)}, 1)
  with open(small_disk / "filler", "wb") as filler:
    free = shutil.disk_usage(small_disk).free
    filler.write(b"x" * (free - 300 * 1024))
  with pytest.raises(errors.SaveError, match="No space left") as error:
    store.write([1], {"x": np.full((1, *shape), 2, np.float32)}, 2)
  assert "\n" not in str(error.value) and error.value.exit_code == 3
  store.close()
  os.unlink(small_disk / "filler")
  store = HostStore(folder, {"x": np.zeros(shape, np.float32)}, 4)
  store.roll_back(1)
  for version, values in ((1, [1, 0, 0, 0]), (2, [1, 2, 0, 0])):
    found = store.read(np.arange(4), version)["x"]
    np.testing.assert_array_equal(found, np.outer(values, np.ones(shape)))
    store.write([1], {"x": np.full((1, *shape), 2, np.float32)}, 2)
  store.close()


def test_a_limit_of_file_size_keeps_what_was_there(built, whole, tmp_path):
  experiment.run(tiny.variant(built, rounds=2), tmp_path)
  before = saved(tmp_path)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  size = (tmp_path / "metrics.jsonl").stat().st_size
  resource.setrlimit(resource.RLIMIT_FSIZE, (size + 200, limits[1]))
  try:
    with pytest.raises(errors.SaveError) as error:
      experiment.run(built, tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert "\n" not in str(error.value) and error.value.exit_code == 3
  assert saved(tmp_path) == before == [0, 2]
  assert not list((tmp_path / "checkpoints").glob("*tmp*"))
  experiment.run(built, tmp_path)
  assert tiny.content(tmp_path) == whole


def test_a_live_run_is_found_before_anything_is_built(
  built, tmp_path, monkeypatch
):
  config = json.loads(json.dumps(experiment.default_config().to_dict()))
  with run_folder.claim(tmp_path, config) as claimed:
    claimed.commit()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(experiment, "build", pytest.fail)
    with pytest.raises(errors.CheckpointError, match="is being written by pro"):
      experiment.train({}, tmp_path)
  assert sorted(tmp_path.iterdir()) == before


def test_a_run_goes_on_from_its_own_base_only(folder, built, tmp_path, caplog):
  """The base is not in the checkpoint, but its digest is."""
  model = pathlib.Path(shutil.copytree(folder / "model", tmp_path / "model"))
  started = tiny.build(folder, rounds=1, model={"path": str(model)})
  workdir = tmp_path / "run"
  experiment.run(started, workdir)
  megabytes = sum(
    p.stat().st_size for p in (workdir / "checkpoints" / "1").rglob("*")
  )
  assert 0 < megabytes < 1e5
  weights = safetensors_numpy.load_file(model / "model.safetensors")
  name = sorted(weights)[0]
  weights[name] = np.nextafter(weights[name], np.float32(np.inf))
  safetensors_numpy.save_file(weights, model / "model.safetensors")
  other = tiny.build(folder, rounds=2, model={"path": str(model)})
  before = json.loads((workdir / "config.json").read_text())
  with pytest.raises(errors.CheckpointError, match="model.path: .* digest"):
    experiment.run(other, workdir)
  with (
    tiny.one_device(),
    pytest.raises(errors.CheckpointError, match="model.path: .* digest"),
  ):
    experiment.open_run(workdir)
  assert json.loads((workdir / "config.json").read_text()) == before
  assert saved(workdir) == [0, 1]


def test_other_versions_are_warned_of(built, tmp_path, caplog, monkeypatch):
  short = tiny.variant(built, rounds=1)
  with monkeypatch.context() as patch:
    patch.setattr(
      checkpoint.manifest.importlib.metadata, "version", lambda name: "0.1"
    )
    experiment.run(short, tmp_path)
  with caplog.at_level(logging.WARNING, logger="fedfm"):
    experiment.run(short, tmp_path)
  assert "other versions than the checkpoint's" in caplog.text
  assert f"jax 0.1, now {jax.__version__}" in caplog.text
