"""Benchmarks with tiny sizes: their figures are consistent, counted by hand."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import jax
import optax
import pytest
import script_runs

from fedfm import errors, models, sharding
from fedfm.scaling import chips, dispatches, measure, workloads

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = models.DecoderConfig(
  vocab_size=16, width=8, num_layers=2, num_heads=2, mlp_width=12
)


def tiny(**changes):
  options = {
    "config": CONFIG,
    "batch_size": 2,
    "length": 6,
    "local_steps": 3,
    "num_clients": 4,
    "client_optimizer": optax.sgd(0.1),
    "rank": 1,
  }
  return workloads.decoder_workload("tiny", **options | changes)


def test_flops_are_those_of_the_products():
  # q, k, v, o of 8 x 8 and three of 8 x 12 in each layer; the head of 8 x 16.
  matmuls = 2 * (4 * 64 + 3 * 96) + 128
  attention = 2 * (2 * 8 * 3 + 2 * 8 * 3)  # Layers, scores and values, 3 of 6.
  low_rank = 2 * 2 * (8 + 8)  # Layers, q and v, A and B.
  assert tiny().flops_per_unit == 4 * matmuls + 6 * low_rank + 3 * attention
  assert tiny(rank=None).flops_per_unit == 6 * matmuls + 3 * attention


@pytest.mark.slow
def test_a_row_agrees_with_itself():
  mesh = sharding.make_mesh({"clients": 2}, jax.devices()[:2])
  row = measure.measure(tiny(), mesh, lanes=2, repeats=2)
  tokens = 4 * 3 * 2 * 6  # Clients, steps, batch, length.
  assert row["units_per_round"] == tokens
  assert row["units_per_second"] == pytest.approx(
    tokens * row["rounds_per_second"]
  )
  assert row["client_steps_per_second"] == pytest.approx(
    12 * row["rounds_per_second"]
  )
  assert row["flops_per_second"] == pytest.approx(
    row["units_per_second"] * tiny().flops_per_unit
  )
  assert row["packing_efficiency"] == 1
  assert 0 <= row["idle_gap"] < 1
  assert row["program_bytes"] > row["temp_bytes"] > 0
  assert min(row["ratio_to_plain"], row["compile_seconds"]) > 0


@pytest.mark.parametrize(
  ("kind", "dtype", "teraflops"),
  [
    ("TPU v5 lite", "bfloat16", 197),
    ("TPU v5", "bfloat16", 459),
    ("TPU v5p", "bfloat16", 459),
    ("TPU v6 lite", "bfloat16", 918),
    ("TPU v6 lite", "float32", None),
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
    ("NVIDIA H200", "float32", 67),
    ("cpu", "float32", None),
  ],
)
def test_peaks_are_known_by_the_name_that_jax_gives(kind, dtype, teraflops):
  got = chips.peak_flops(kind, dtype)
  assert got == (None if teraflops is None else teraflops * 1e12)


def test_an_unknown_workload_is_named():
  with pytest.raises(errors.ConfigError, match="--workloads: .*'lora_llama'"):
    workloads.workload("lora_lama")


def benchmark(folder, *arguments):
  return subprocess.run(
    [
      sys.executable,
      ROOT / "scripts" / "benchmark.py",
      f"--output={folder}",
      "--repeats=1",
      "--clients=2",
      "--batch=1",
      "--steps=1",
      "--host_devices=2",
      *arguments,
    ],
    env=script_runs.environment(),
    capture_output=True,
    text=True,
    check=False,
  )


def test_bad_flags_end_with_a_line(tmp_path):
  process = benchmark(tmp_path / "out", "--workloads=emnist", "--lanes=2")
  assert process.returncode == 2
  assert process.stderr.startswith("error: --workloads: got 'emnist'")
  assert process.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


BAD_FLAGS = {
  "": "--suite: expected a suite, or --workloads",
  "--suite=cpu --workloads=lora_llama": "--suite: expected a suite, or",
  "--suite=cpu --sweep=clients": "--sweep: got 'clients', but --suite",
  "--workloads=emnist_cnn,emnist": "--workloads: got 'emnist'",
  "--suite=cpu --clients=0": "--clients: got 0, expected at least 1",
  "--suite=cpu --batch=0": "--batch: got 0, expected at least 1",
  "--suite=cpu --steps=-1": "--steps: got -1, expected at least 1",
  "--suite=cpu --length=0": "--length: got 0, expected at least 2",
  "--suite=cpu --repeats=0": "--repeats: got 0, expected at least 1",
  "--suite=cpu --host_devices=0": "--host_devices: got 0, expected at least",
  "--suite=cpu --lanes=0": "--lanes: got '0', expected auto or",
  "--suite=cpu --lanes=x": "--lanes: got 'x', expected auto or",
  "--suite=cpu --sizes=3": "--sizes: got '3', expected none",
  "--workloads=lora_llama --sweep=mesh --sizes=3": "--sizes: got '3', expected",
  "--workloads=lora_llama --sweep=clients --sizes=2,x": "--sizes: got 'x', exp",
  "--workloads=lora_llama --sweep=model --sizes=9": "--sizes: got 9, expected",
  "--workloads=emnist_cnn --sweep=model": "--sweep: 'model' needs a decoder",
}
# One process, as starting one takes seconds.
RUN_ALL = """
import sys
from absl import flags
import benchmark, command_line
for line in sys.argv[1:]:
  flags.FLAGS.unparse_flags()
  sys.argv = ["benchmark.py", *line.split()]
  try:
    command_line.run(benchmark.main)
  except SystemExit as e:
    print(e.code)
"""


def test_flags_are_checked_before_anything_runs(tmp_path):
  process = subprocess.run(
    [sys.executable, "-c", RUN_ALL, *BAD_FLAGS],
    env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  lines = process.stderr.splitlines()
  assert process.stdout.split() == ["2"] * len(BAD_FLAGS), process.stderr
  for line, expected in zip(lines, BAD_FLAGS.values(), strict=True):
    assert line.startswith(f"error: {expected}")
  assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_dispatches_send_what_they_say():
  mesh = sharding.make_mesh({"clients": 2}, jax.devices()[:2])
  rows = dispatches.measure_dispatches(
    tiny(), mesh, lanes=2, counts=(1, 3), repeats=1
  )
  ways = [(row["rounds_per_dispatch"], row["rows"]) for row in rows]
  assert ways == [(1, "host"), (3, "host"), (1, "device"), (3, "device")]
  first = rows[0]["rounds_per_second"]
  for row in rows:
    assert row["ratio_to_first"] == row["rounds_per_second"] / first > 0
  sent = [row["sent_bytes"] for row in rows]
  assert sent[0] == sent[1] and sent[2] == sent[3]
  # Two lanes of 6 steps have buffers of 8, of 2 rows of 6 tokens and a mask;
  # of these their numbers are left.
  assert sent[0] - sent[2] == 2 * 8 * 2 * (6 * (4 + 4) - 4)


@pytest.mark.slow
def test_the_cpu_suite_writes_its_figures(tmp_path):
  process = benchmark(tmp_path / "out", "--suite=cpu", "--length=8")
  assert process.returncode == 0, process.stderr
  rows = json.loads((tmp_path / "out" / "results.json").read_text())
  with (tmp_path / "out" / "results.csv").open() as f:
    assert len(list(csv.DictReader(f))) == len(rows) == 5
  units = [row.get("units_per_round") for row in rows]
  assert units == [2 * 8, 2 * 8, 2 * 8, 2, None]
  heavy = rows[-1]
  assert 1 <= heavy["steps_over_bound_mean"] <= heavy["steps_over_bound_max"]
  assert heavy["steps_over_bound_max"] <= 1.1 and heavy["programs"] <= 3


@pytest.mark.slow
@pytest.mark.parametrize("sweep", ["clients", "mesh", "weak", "dispatch"])
def test_sweeps_draw_a_plot(tmp_path, sweep):
  process = benchmark(
    tmp_path / "out",
    "--workloads=emnist_cnn",
    f"--sweep={sweep}",
    *(["--sizes=1,2"] if sweep in ("clients", "dispatch") else []),
  )
  assert process.returncode == 0, process.stderr
  rows = json.loads((tmp_path / "out" / "results.json").read_text())
  assert len(rows) >= 2 and all(row["rounds_per_second"] > 0 for row in rows)
  assert (tmp_path / "out" / "sweep.png").stat().st_size > 1000
