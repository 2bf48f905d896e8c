"""Two processes: the numbers of one, stopped together, and never waiting."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

from absl import flags
import numpy as np
import pytest
import script_runs
import tiny
import train  # noqa: F401 - its flags are those of every test here.

import command_line

ROOT = pathlib.Path(__file__).parent.parent


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def _start(config, workdir, devices, *flags):
  env = script_runs.environment(devices)
  command = [sys.executable, str(ROOT / "scripts" / "train.py")]
  command += [f"--config={config}", f"--workdir={workdir}", *flags]
  return subprocess.Popen(
    command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
  )


def _finish(process, timeout=240):
  output = process.communicate(timeout=timeout)[0].decode()
  assert process.returncode == 0, output
  return output


def _lines(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
  "in_parts", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_two_processes_equal_one(tmp_path, in_parts):
  """In parts: microbatches, chunks, tiles, and two rounds a dispatch."""
  make = tiny.config_in_parts if in_parts else tiny.config
  values = make(tmp_path, lanes=8, clients_per_round=8, eval={"batch_size": 2})
  if in_parts:
    values |= {"rounds_per_dispatch": 2, "checkpoint": {"every": 2}}
    values["data"] |= {"resident": True}
  config = _write(tmp_path / "config.py", values)
  one, two = tmp_path / "one", tmp_path / "two"
  for process in _start_two(config, two, devices=4):
    _finish(process)
  _finish(_start(config, one, 8))
  _check_equal(one, two, rounds=2)


@pytest.mark.slow
def test_fsdp_across_two_processes_equals_one(tmp_path):
  """Of one lane: a large model's, which all devices share."""
  values = tiny.config(tmp_path, lanes=1, mesh={"clients": 1, "fsdp": 2})
  config = _write(tmp_path / "config.py", values)
  one, two = tmp_path / "one", tmp_path / "two"
  for process in _start_two(config, two):
    _finish(process)
  _finish(_start(config, one, 2))
  _check_equal(one, two, rounds=2)


@pytest.mark.slow
def test_models_of_ones_own_across_two_processes_equal_those_of_one(tmp_path):
  """With client states; saved, restored and evaluated where axes cross."""
  values = tiny.config(
    tmp_path,
    lanes=4,
    mesh={"clients": 1, "fsdp": 4, "tensor": 2},
    algorithm="ditto",
    client={"batch_size": 4},
    eval={"batch_size": 4, "every": 1, "finetune_steps": 2},
    data={"heldout_fraction": 0.3},
  )
  config = _write(tmp_path / "config.py", values)
  one, two = tmp_path / "one", tmp_path / "two"
  for rounds in (1, 2):  # The second is restored.
    flag = f"--config.rounds={rounds}"
    for process in _start_two(config, two, None, 4, flag):
      _finish(process)
  _finish(_start(config, one, 8))
  _check_equal(one, two, rounds=2)


def _check_equal(one, two, rounds):
  """Checks that two runs have the same numbers, in all of their rounds."""
  expected, got = _lines(one), _lines(two)
  assert [line["round"] for line in got] == list(range(rounds + 1))
  for a, b in zip(expected, got, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      if not name.startswith(("time/", "memory/")):
        np.testing.assert_allclose(b[name], a[name], rtol=1e-5, err_msg=name)
  summary = json.loads((two / "summary.json").read_text())
  assert summary["rounds"] == rounds


def test_a_process_id_out_of_range_is_one_line(tmp_path):
  process = _start(
    tmp_path / "none.py",
    tmp_path,
    1,
    "--coordinator=localhost:1",
    "--num_processes=2",
    "--process_id=2",
  )
  output = process.communicate(timeout=120)[0].decode()
  assert process.returncode == 2
  assert output.strip().splitlines() == [
    "error: --process_id: got 2, expected 0 to 1"
  ]


def test_a_process_that_waits_in_vain_is_told_within_the_time_out(tmp_path):
  """The other one is missing, or was given this one's id."""
  port, began = _free_port(), time.monotonic()
  process = _start(
    tmp_path / "none.py",
    tmp_path,
    1,
    f"--coordinator=localhost:{port}",
    "--num_processes=2",
    "--process_id=0",
    "--initialization_timeout=2",
  )
  output = process.communicate(timeout=120)[0].decode()
  assert time.monotonic() - began < 60
  assert process.returncode == 2
  joins, error = output.strip().splitlines()
  assert joins == f"process 0 of 2 joins the others at localhost:{port}"
  assert error.startswith(
    f"error: --process_id: process 0 of 2 at localhost:{port} waited 2 s for "
    "the others: one is missing, or two have the same id"
  )


def _write_config(folder, name="config.py", **changes):
  values = tiny.config(
    folder,
    **(
      {
        "rounds": 200,
        "lanes": 2,
        "clients_per_round": 4,
        "deterministic": True,
        "adapter": {"rank": 2, "targets": ("q_proj",)},
        "eval": {"every": 100, "max_examples": 1},
        "checkpoint": {"every": 50},
      }
      | changes
    ),
  )
  return _write(folder / name, values)


def _write(file, values):
  """Writes values as a file of a config."""
  file.write_text(
    "import ml_collections\n"
    f"def get_config():\n  return ml_collections.ConfigDict({values!r})\n"
  )
  return file


def _start_two(config, workdir, second_config=None, devices=1, *flags):
  """Two processes of one device each, or more."""
  port = _free_port()
  return [
    _start(
      second_config if i and second_config else config,
      workdir,
      devices,
      f"--coordinator=localhost:{port}",
      "--num_processes=2",
      f"--process_id={i}",
      *flags,
    )
    for i in range(2)
  ]


def _wait_for_rounds(workdir, count, processes, timeout=300):
  deadline = time.monotonic() + timeout
  while time.monotonic() < deadline:
    assert all(p.poll() is None for p in processes), [
      p.communicate()[0].decode() for p in processes if p.poll() is not None
    ]
    path = workdir / "metrics.jsonl"
    if path.exists() and path.read_bytes().count(b"\n") > count:
      return
    time.sleep(0.01)
  pytest.fail(f"no {count} rounds within {timeout} s")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_stops_both(tmp_path, signum):
  """And one process, or two, go on with the bits of a run never stopped."""
  config, workdir = _write_config(tmp_path), tmp_path / "run"
  running = _start_two(config, workdir)
  _wait_for_rounds(workdir, 3, running)
  running[1].send_signal(signum)
  time.sleep(0.3)
  running[1].send_signal(signum)  # Nor does a second one hurt.
  outputs = [p.communicate(timeout=120)[0].decode() for p in running]
  assert [p.returncode for p in running] == [
    128 + signal.SIGTERM,
    128 + signum,
  ], outputs
  assert all("which is saved" in o.splitlines()[-1] for o in outputs), outputs
  assert "Traceback" not in outputs[0] + outputs[1]
  stopped = _lines(workdir)[-1]["round"]
  assert 3 <= stopped < 200
  assert (workdir / "checkpoints" / str(stopped)).is_dir()
  running = _start_two(config, workdir)  # The same command.
  _wait_for_rounds(workdir, stopped + 1, running)
  running[0].send_signal(signal.SIGTERM)
  for process in running:
    assert process.wait(120) == 143
  _finish(_start(config, workdir, 2))  # Another number of processes.
  _finish(_start(config, tmp_path / "whole", 1))
  assert tiny.content(workdir) == tiny.content(tmp_path / "whole")


@pytest.mark.slow
def test_a_deterministic_base_that_changes_has_the_bits_of_one_process(
  tmp_path,
):
  changes = {"algorithm": "fedex_lora", "rounds": 3, "eval": {"every": 3}}
  config = _write_config(tmp_path, **changes)
  for process in _start_two(config, tmp_path / "two"):
    _finish(process)
  _finish(_start(config, tmp_path / "one", 1))
  assert tiny.content(tmp_path / "two") == tiny.content(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_one_dead_process_ends_the_other(tmp_path, killed):
  config, workdir = _write_config(tmp_path, rounds=100_000), tmp_path / "run"
  running = _start_two(config, workdir)
  _wait_for_rounds(workdir, 2, running)
  running[killed].kill()
  began = time.monotonic()
  output = running[1 - killed].communicate(timeout=100)[0].decode()
  assert time.monotonic() - began < 60
  assert running[1 - killed].returncode not in (0, 2), output
  assert running[killed].wait() == -signal.SIGKILL
  lines = _lines(workdir)
  assert [line["round"] for line in lines] == list(range(len(lines)))


@pytest.mark.slow
def test_different_configs_are_named_by_both(tmp_path):
  config = _write_config(tmp_path)
  other = _write_config(tmp_path, "other.py", seed=3)
  running = _start_two(config, tmp_path / "run", other)
  for index, process in enumerate(running):
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 2, output
    line = output.strip().splitlines()[-1]
    assert line == (
      f"error: seed: process {index} has {3 * index}, another one has not; "
      "expected one config for all processes"
    )
  assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_required_flags")
@pytest.mark.parametrize("is_first", [True, False])
def test_a_coordinator_that_is_not_there(monkeypatch, capsys, is_first):
  """A port that is taken, or that nobody listens at."""
  monkeypatch.setattr(command_line, "_OVERRIDES", [])
  with socket.socket() as s:
    s.bind(("", 0))
    if is_first:
      s.listen()
    port = s.getsockname()[1]
    arguments = [
      "train.py",
      "--config=none.py",
      "--workdir=none",
      f"--coordinator=localhost:{port}",
      "--num_processes=2",
      f"--process_id={0 if is_first else 1}",
      "--initialization_timeout=1",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
      command_line.run(pytest.fail)
  flags.FLAGS.unparse_flags()
  assert ended.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  expected = {
    True: f"error: --coordinator: port {port} cannot be opened here: Address "
    "already in use",
    False: "error: --coordinator: nothing answers at "
    f"localhost:{port} within 1 s: Connection refused",
  }[is_first]
  assert line == expected
