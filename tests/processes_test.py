"""Two processes of four devices against one of eight: the same numbers."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import tiny

ROOT = pathlib.Path(__file__).parent.parent


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def _start(config, workdir, devices, *flags):
  env = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }
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


def test_two_processes_equal_one(tmp_path):
  values = tiny.config(
    tmp_path, lanes=8, clients_per_round=8, eval={"batch_size": 2}
  )
  config = tmp_path / "config.py"
  config.write_text(
    "import ml_collections\n"
    f"def get_config():\n  return ml_collections.ConfigDict({values!r})\n"
  )
  one, two = tmp_path / "one", tmp_path / "two"
  port = _free_port()
  running = [
    _start(
      config,
      two,
      4,
      f"--coordinator=localhost:{port}",
      "--num_processes=2",
      f"--process_id={i}",
    )
    for i in range(2)
  ]
  for process in running:
    _finish(process)
  _finish(_start(config, one, 8))
  expected, got = _lines(one), _lines(two)
  assert [line["round"] for line in got] == [0, 1, 2]
  for a, b in zip(expected, got, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      if not name.startswith(("time/", "memory/")):
        np.testing.assert_allclose(b[name], a[name], rtol=1e-5, err_msg=name)
  summary = json.loads((two / "summary.json").read_text())
  assert summary["rounds"] == 2


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
