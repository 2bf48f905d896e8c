"""A run says where its time and memory go, in numbers and in words."""

import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
import tiny

from fedfm import errors, experiment, goodput, metrics, run_log

ROOT = pathlib.Path(__file__).parent.parent
PARTS = (*goodput.SPANS, "compile", "other")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  return tiny.build(tmp_path_factory.mktemp("tiny"), rounds=3)


@pytest.fixture(scope="module")
def run(built, tmp_path_factory):
  """(folder, summary) of a run whose second round was profiled."""
  folder = tmp_path_factory.mktemp("run")
  return folder, experiment.run(built, folder, profile_round=2)[0]


def test_the_parts_of_the_time_are_all_of_it(run):
  folder, summary = run
  for line in metrics.read(folder):
    parts = [line[f"time/{part}_seconds"] for part in PARTS]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(line["time/elapsed_seconds"], abs=0.05)
    assert 0 <= line["time/goodput"] <= 1
    assert line["memory/host_peak_bytes"] > 1e8
  first, later = metrics.read(folder)[1], metrics.read(folder)[3]
  assert first["time/compilations"] >= 1 and first["time/compile_seconds"] > 0
  assert later["time/compilations"] == 0
  for part in PARTS:
    name = f"time/{part}_seconds"
    total = sum(line[name] for line in metrics.read(folder))
    assert summary[name] == pytest.approx(total)
  assert summary["time/compilations"] >= first["time/compilations"]
  assert summary["memory/host_peak_bytes"] == max(
    line["memory/host_peak_bytes"] for line in metrics.read(folder)
  )


def test_a_chosen_round_is_profiled(run, built):
  folder, _ = run
  traces = list((folder / "profile" / "round_2").rglob("*.xplane.pb"))
  assert traces and traces[0].stat().st_size > 1000
  with pytest.raises(errors.ConfigError, match="profile_round: got 4, .* 3"):
    experiment.run(built, folder, profile_round=4)
  experiment.run(built, folder, profile_round=2)
  said = (folder / run_log.FILE).read_text().splitlines()
  assert any("round 2 was done before, not traced now" in x for x in said)


def test_the_log_can_be_read(run):
  folder, _ = run
  text = (folder / run_log.FILE).read_text().splitlines()
  assert "devices of 1 processes, mesh clients 1" in text[0]
  assert "round 0: eval/seen/loss" in text[1]
  assert any("round 2: train/loss" in line for line in text)
  assert any("profile of round 2 written" in line for line in text)
  assert "done: 3 rounds in" in text[-1] and "compile" in text[-1]
  for line in text:
    time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")


def test_the_log_outlives_a_full_disk(tmp_path):
  os.symlink("/dev/full", tmp_path / run_log.FILE)
  with run_log.RunLog(tmp_path) as log:
    log.say("nobody will know")
    log.line("nor this")


def test_the_clock_tells_compiling_apart():
  with goodput.Clock() as clock:
    clock.take()
    x = jnp.arange(3.0)
    clock.take()
    with clock.measure("round"):
      # Traced within a trace: counted once.
      jax.jit(lambda x: jax.jit(jnp.sin)(x) + jnp.tan(x))(x)
      time.sleep(0.05)
    with clock.measure("evaluation"):
      time.sleep(0.05)
    got = clock.take()
    assert got["time/compilations"] == 1
    assert 0 < got["time/compile_seconds"] < got["time/elapsed_seconds"] - 0.09
    assert got["time/round_seconds"] >= 0.05
    assert got["time/evaluation_seconds"] >= 0.05
    parts = sum(got[f"time/{part}_seconds"] for part in PARTS)
    assert parts == pytest.approx(got["time/elapsed_seconds"], rel=1e-3)
    assert clock.take()["time/round_seconds"] == 0
  before = clock.take()["time/compilations"]
  jax.jit(lambda x: x * 3)(x)
  assert clock.take()["time/compilations"] == before == 0  # No longer heard.


def test_closed_streams_are_no_reason_to_fail(tmp_path):
  """What is printed goes nowhere, and into no file that is opened later."""
  script = (
    "import os, sys\n"
    f"sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
    "from absl import flags\n"
    "import command_line\n"
    "def main():\n"
    f"  file = os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_WRONLY)\n"
    "  os.write(file, b'mine')\n"
    "  command_line.show('yours')\n"
    "  os.write(2, b'libraries write here')\n"
    "command_line.run(main)\n"
  )
  closed = 'exec "$0" -c "$1" <&- >&- 2>&-'
  process = subprocess.run(
    ["bash", "-c", closed, sys.executable, script],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    check=False,
  )
  assert process.returncode == 0, process.stderr
  assert (tmp_path / "file").read_bytes() == b"mine"
