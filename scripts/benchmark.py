r"""Measures rounds against the plain centralized step, in one run.

  python scripts/benchmark.py --suite=cpu
  python scripts/benchmark.py --suite=gpu --output=/tmp/fedfm/benchmark
  python scripts/benchmark.py --workloads=lora_llama --sweep=clients

Suites: `cpu` (what two cores can run: the LoRA Llama, all weights on a single
lane, the EMNIST CNN, heavy-tailed packing), `gpu` (LoRA at 1B from 1 to 256
clients, the CNN, 100M parameters in full). Sweeps: `clients`, `lanes`, `batch`,
`model` (width), `mesh` (every shape of the devices: strong scaling), `weak`
(clients grow with the devices) and `dispatch` (rounds of one program, their
rows sent to the device or held there). Times are medians; every ratio is of
pairs measured in turn. Writes results.json, results.csv and, of a sweep,
sweep.png.
"""

import csv
import dataclasses
import json
import math
import os

from absl import flags
import jax
import numpy as np

import command_line
from fedfm import data, errors, report, sharding
from fedfm.data import layout, packing
from fedfm.scaling import dispatches, measure, workloads
import output_folder

SUITES = ("cpu", "gpu")
SIZED = ("clients", "lanes", "batch", "model", "dispatch")
SWEEPS = (*SIZED, "mesh", "weak")
_SUITE = flags.DEFINE_enum("suite", None, SUITES, "What to measure.")
_WORKLOADS = flags.DEFINE_list("workloads", [], "Or these, by name.")
_SWEEP = flags.DEFINE_enum("sweep", None, SWEEPS, "What to vary.")
_SIZES = flags.DEFINE_list("sizes", [], "Values of the sweep.")
_CLIENTS = flags.DEFINE_integer("clients", None, "Clients a round.")
_LANES = flags.DEFINE_string("lanes", "auto", "Number of lanes, or auto.")
_BATCH = flags.DEFINE_integer("batch", None, "Rows a local step.")
_STEPS = flags.DEFINE_integer("steps", None, "Local steps a client.")
_LENGTH = flags.DEFINE_integer("length", None, "Tokens a row, of decoders.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed pairs.")
_HOST_DEVICES = flags.DEFINE_integer(
  "host_devices", None, "Virtual devices on a CPU; default one a core."
)
_OUTPUT = flags.DEFINE_string("output", "runs/benchmark", "Folder to write.")
# What the table on the screen shows; the files hold all.
_SHOWN = (
  "workload",
  "mesh",
  "clients",
  "lanes",
  "batch",
  "rounds_per_second",
  "units_per_second",
  "client_steps_per_second",
  "ratio_to_plain",
  "of_matmul_rate",
  "model_flops_utilisation",
  "idle_gap",
  "program_mb",
  "compile_seconds",
)


def sizes(**defaults):
  """Sizes of a workload: the flags' where given, else these."""
  given = {
    "num_clients": _CLIENTS.value,
    "batch_size": _BATCH.value,
    "local_steps": _STEPS.value,
    "length": _LENGTH.value,
  }
  return defaults | {k: v for k, v in given.items() if v is not None}


def mesh_of(num_devices=None, **axes):
  """A mesh of the first devices, all on `clients` unless axes are given."""
  devices = jax.devices()[:num_devices]
  return sharding.make_mesh(axes or {"clients": -1}, devices)


def lanes():
  return _LANES.value if _LANES.value == "auto" else int(_LANES.value)


def check_flags():
  """Refuses flags that are out of range, or that nothing would read."""
  suite, sweep_name = _SUITE.value, _SWEEP.value
  if bool(suite) == bool(_WORKLOADS.value):
    raise errors.ConfigError("--suite: expected a suite, or --workloads")
  if suite and sweep_name:
    raise errors.ConfigError(
      f"--sweep: got {sweep_name!r}, but --suite says what is measured; "
      "expected --workloads"
    )
  for flag, least in (
    (_CLIENTS, 1),
    (_BATCH, 1),
    (_STEPS, 1),
    (_LENGTH, 2),
    (_REPEATS, 1),
    (_HOST_DEVICES, 1),
  ):
    if flag.value is not None and flag.value < least:
      raise errors.ConfigError(
        f"--{flag.name}: got {flag.value}, expected at least {least}"
      )
  if _LANES.value != "auto" and not is_count(_LANES.value):
    raise errors.ConfigError(
      f"--lanes: got {_LANES.value!r}, expected auto or a number of at least 1"
    )
  if _SIZES.value and sweep_name not in SIZED:
    raise errors.ConfigError(
      f"--sizes: got {','.join(_SIZES.value)!r}, expected none but with "
      f"--sweep={'|'.join(SIZED)}"
    )
  for value in _SIZES.value:
    if not is_count(value):
      raise errors.ConfigError(
        f"--sizes: got {value!r}, expected integers of at least 1"
      )
  for name in _WORKLOADS.value:
    workloads.check_name(name)
    if sweep_name == "model":
      check_widths(workloads.workload(name).model.config)


def is_count(text):
  return text.isascii() and text.isdecimal() and int(text) > 0


def check_widths(config):
  if not hasattr(config, "width"):
    raise errors.ConfigError("--sweep: 'model' needs a decoder workload")
  for value in _SIZES.value:
    if int(value) % (2 * config.num_heads):
      raise errors.ConfigError(
        f"--sizes: got {value}, expected widths that {config.num_heads} heads "
        "of an even size divide"
      )


def run(label, work, mesh, lane_count=None):
  """Measures one case and says so."""
  row = measure.measure(
    work, mesh, lanes=lane_count or lanes(), repeats=_REPEATS.value
  )
  row = {"case": label} | row
  command_line.show(
    f"{label}: {row['units_per_second']:,.0f} {work.unit}/s, "
    f"{row['ratio_to_plain']:.2f} of the plain step, "
    f"{row['of_matmul_rate']:.2f} of the matmul rate",
  )
  return row


def cpu_suite():
  one = mesh_of(1)
  return [
    run("LoRA, 8 clients", workloads.lora_llama(**sizes()), mesh_of()),
    run(
      "LoRA, 16 clients",
      workloads.lora_llama(**sizes(num_clients=16)),
      mesh_of(),
    ),
    run(
      "all weights, single lane",
      workloads.lora_llama(**sizes(num_clients=1, rank=None)),
      one,
      1,
    ),
    run("EMNIST CNN", workloads.emnist_cnn(**cnn_sizes()), mesh_of()),
  ]


def cnn_sizes():
  return {k: v for k, v in sizes().items() if k != "length"}


def sizes_of(work_name):
  return cnn_sizes() if work_name == "emnist_cnn" else sizes()


def gpu_suite():
  rows = []
  for count in (1, 4, 16, 64, 256):
    work = workloads.lora_1b(**sizes(num_clients=count))
    rows.append(run(f"LoRA 1B, {count} clients", work, mesh_of()))
  work = workloads.lora_1b(**sizes(num_clients=64))
  rows.append(run("LoRA 1B, 64 clients on one lane", work, mesh_of(1), 1))
  rows.append(run("EMNIST CNN", workloads.emnist_cnn(**cnn_sizes()), mesh_of()))
  rows.append(
    run("all weights, 100M", workloads.full_100m(**sizes()), mesh_of())
  )
  return rows


def heavy_tail(rounds=100, num_lanes=8):
  """Packs rounds of 64 log-normal(1.5) clients; runs nothing."""
  rng = np.random.default_rng(0)
  counts = np.ceil(20 * rng.lognormal(0, 1.5, 1000)).astype(int)
  ids = [str(i) for i in range(len(counts))]
  sampler = data.sampling.uniform(ids, 64, 0)
  steps = [
    [packing.steps_per_client(counts[int(i)], 4) for i in sampler.sample(r)]
    for r in range(rounds)
  ]
  step_buckets, slot_buckets = layout.plan_buckets(steps, num_lanes)
  over_bound, shapes = [], set()
  for cohort in steps:
    lanes = layout.assign(cohort, num_lanes)
    longest = max(sum(cohort[c] for c in lane) for lane in lanes)
    bound = max(sum(cohort) / num_lanes, max(cohort))
    over_bound.append(longest / bound)
    shapes.add(
      (
        layout.bucket(longest, step_buckets),
        layout.bucket(max(map(len, lanes)), slot_buckets),
      )
    )
  return {
    "case": f"64 log-normal(1.5) clients, {num_lanes} lanes, {rounds} rounds",
    "steps_over_bound_mean": float(np.mean(over_bound)),
    "steps_over_bound_max": float(np.max(over_bound)),
    "programs": len(shapes),
  }


def sweep(name, work_name):
  """Varies one thing; yields rows and the value of each."""
  values = [int(v) for v in _SIZES.value]
  make = workloads.workload
  n = len(jax.devices())
  options = sizes_of(work_name)
  if name == "clients":
    for v in values or (1, 4, 16, 64):
      work = make(work_name, **options | {"num_clients": v})
      yield v, run(f"{v} clients", work, mesh_of())
  elif name == "lanes":
    work = make(work_name, **options)
    for v in values or [n * 2**i for i in range(4)]:
      yield v, run(f"{v} lanes", work, mesh_of(), v)
  elif name == "batch":
    for v in values or (1, 4, 16):
      work = make(work_name, **options | {"batch_size": v})
      yield v, run(f"batch {v}", work, mesh_of())
  elif name == "model":
    config = make(work_name).model.config
    for v in values or (128, 256, 512):
      changed = dataclasses.replace(
        config,
        width=v,
        mlp_width=v * config.mlp_width // config.width,
        head_dim=v // config.num_heads,
      )
      work = make(work_name, **options | {"config": changed})
      yield v, run(f"width {v}", work, mesh_of())
  elif name == "mesh":
    work = make(work_name, **options)
    for clients_axis in (2**i for i in range(int(math.log2(n)) + 1)):
      for fsdp in (2**i for i in range(int(math.log2(n // clients_axis)) + 1)):
        shape = (clients_axis, fsdp, n // clients_axis // fsdp)
        mesh = mesh_of(**dict(zip(sharding.MESH_AXES, shape)))
        try:
          yield "x".join(map(str, shape)), run(f"mesh {shape}", work, mesh)
        except errors.ConfigError as e:
          command_line.show(f"mesh {shape}: left out: {e}")
  else:
    per_device = options.get("num_clients", 8)
    for v in [2**i for i in range(int(math.log2(n)) + 1)]:
      work = make(work_name, **options | {"num_clients": per_device * v})
      yield v, run(f"{v} devices", work, mesh_of(v))


def dispatch_rows(work_name):
  """Measures rounds by how many are one program, and where their rows are."""
  return dispatches.measure_dispatches(
    workloads.workload(work_name, **sizes_of(work_name)),
    mesh_of(),
    lanes=lanes(),
    counts=[int(v) for v in _SIZES.value] or (1, 2, 5, 10),
    repeats=_REPEATS.value,
  )


def plot_dispatches(folder, rows):
  """Draws a line for each workload and place of the rows."""
  lines = {}
  for row in rows:
    x, y = lines.setdefault(f"{row['workload']}, {row['rows']}", ([], []))
    x.append(row["rounds_per_dispatch"])
    y.append(row["rounds_per_second"])
  report.plot_lines(
    folder / "sweep.png",
    report.Panel(lines, "rounds of a program", "rounds per second"),
  )


def plot(folder, name, rows):
  """Draws a sweep: rate, and ratio to the plain step, over its values."""
  at = [row["value"] for row in rows]
  if any(isinstance(x, str) for x in at):
    at = list(range(len(at)))
  unit = rows[0]["unit"]
  report.plot_lines(
    folder / "sweep.png",
    report.Panel(
      {
        "round": (at, [row["units_per_second"] for row in rows]),
        "plain step": (at, [row["plain_units_per_second"] for row in rows]),
      },
      name,
      f"{unit} per second",
    ),
    report.Panel(
      {"ratio": (at, [row["ratio_to_plain"] for row in rows])},
      name,
      "round / plain step",
    ),
  )


def write(folder, rows):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
  fields = list(dict.fromkeys(k for row in rows for k in row))
  with (folder / "results.csv").open("w", newline="") as f:
    writer = csv.DictWriter(f, fields)
    writer.writeheader()
    writer.writerows(rows)


def main():
  check_flags()
  cores = len(os.sched_getaffinity(0))
  jax.config.update("jax_num_cpu_devices", _HOST_DEVICES.value or cores)
  folder = output_folder.check("--output", _OUTPUT.value)
  if _SUITE.value == "cpu":
    rows = cpu_suite()
  elif _SUITE.value == "gpu":
    rows = gpu_suite()
  elif _SWEEP.value == "dispatch":
    rows = [row for name in _WORKLOADS.value for row in dispatch_rows(name)]
    command_line.show("\n" + report.table(rows))
    write(folder, rows)
    plot_dispatches(folder, rows)
    command_line.show(f"\nwrote {folder}/")
    return
  elif _SWEEP.value:
    rows = [
      row | {"value": value}
      for work_name in _WORKLOADS.value
      for value, row in sweep(_SWEEP.value, work_name)
    ]
  else:
    rows = []
    for name in _WORKLOADS.value:
      work = workloads.workload(name, **sizes_of(name))
      rows.append(run(name, work, mesh_of()))
  shown = [
    {"case": row["case"]}
    | {k: row[k] for k in _SHOWN[1:] if k in row}
    | {"program_mb": row["program_bytes"] / 1e6}
    for row in rows
  ]
  command_line.show("\n" + report.table(shown))
  if _SUITE.value == "cpu":
    packed = heavy_tail()
    command_line.show("\n" + report.table([packed]))
    rows.append(packed)
  write(folder, rows)
  if _SWEEP.value and not _SUITE.value:
    plot(folder, _SWEEP.value, rows)
  command_line.show(f"\nwrote {folder}/")


if __name__ == "__main__":
  command_line.run(main)
