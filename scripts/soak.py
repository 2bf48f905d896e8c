r"""Kills a run again and again, and compares it with one that never stopped.

  python scripts/soak.py --kills=30
  python scripts/soak.py --kills=30 --config=FILE --config.rounds=200

Trains twice with the same config: once without interruption, once under `kill
-9` at random moments, each followed by the same command, until enough kills
were survived (in several runs, if one ends before). Then every array of the
last checkpoint and every line of metrics must be the same, bit for bit. Prints
the tally; ends with exit code 1 if anything differs.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

import command_line
from fedfm import checkpoint, errors, hosting, metrics, report
import output_folder

_SCRIPTS = pathlib.Path(__file__).parent
_KILLS = flags.DEFINE_integer("kills", 30, "Kills to survive.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments of the kills.")
_CONFIG = flags.DEFINE_string(
  "config", str(_SCRIPTS.parent / "configs" / "quickstart.py"), "Config file."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder for the runs; default a temporary one."
)
# Many short rounds, unless the command line says otherwise.
_SHORT = {
  "rounds": 60,
  "clients_per_round": 4,
  "client.local_steps": 2,
  "data.sequence_length": 64,
  "eval.every": 30,
  "eval.max_examples": 1,
  "checkpoint.every": 2,
}
_STARTS = 0.25  # Share of the kills that come before the first new round.


class Runner:
  """Starts the training in a folder, as a process of its own."""

  def __init__(self, folder: pathlib.Path, overrides: list[str]):
    self._overrides = overrides
    self._env = os.environ | {
      "PYTHONPATH": os.pathsep.join([str(_SCRIPTS.parent), *sys.path]),
      # Every life compiles the same programs.
      "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }

  def start(self, workdir: pathlib.Path) -> subprocess.Popen:
    """Runs the same command as ever."""
    command = [sys.executable, _SCRIPTS / "train.py", f"--workdir={workdir}"]
    log = open(workdir.with_suffix(".out"), "ab")  # noqa: SIM115
    with log:
      return subprocess.Popen(
        [*command, f"--config={_CONFIG.value}", *self._overrides],
        env=self._env,
        stdout=log,
        stderr=log,
      )


def last_round(workdir: pathlib.Path) -> int:
  """The newest round in the metrics, or -1."""
  try:
    return metrics.read(workdir)[-1]["round"]
  except (errors.CheckpointError, IndexError):
    return -1


def written_since(workdir: pathlib.Path, since: float) -> bool:
  """Whether metrics were written after a time."""
  try:
    return (workdir / metrics.FILE).stat().st_mtime > since
  except OSError:
    return False


def saved_round(workdir: pathlib.Path) -> int:
  """The newest round that is saved, or -1."""
  folder = workdir / "checkpoints"
  if not folder.is_dir():
    return -1
  with checkpoint.Checkpointer(folder, read_only=True) as reader:
    latest = reader.latest()
    return -1 if latest is None else latest


def check_exit(process: subprocess.Popen, workdir: pathlib.Path) -> None:
  """Raises unless a process that was not killed ended well."""
  if process.returncode:
    output = workdir.with_suffix(".out").read_text(errors="replace")
    raise errors.CheckpointError(
      f"{workdir}: a process ended with exit code {process.returncode}: "
      f"{output[-500:]}"
    )


def content(workdir: pathlib.Path) -> dict[str, Any]:
  """Everything of a finished run that must not depend on when it ran."""

  def timeless(row):
    return {
      k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))
    }

  with checkpoint.Checkpointer(workdir / "checkpoints", read_only=True) as c:
    states, damaged = "", []
    for round in c.all_rounds():
      arrays = c.verify(round)
      if (workdir / hosting.FOLDER).is_dir():
        states, found = hosting.verify(workdir, int(arrays["clients"]))
        damaged += found
    manifest = c.manifest(max(c.all_rounds()))
  return {
    "clients' states": states,
    "damaged clients' states": damaged,
    "arrays": {leaf["path"]: leaf["digest"] for leaf in manifest["leaves"]},
    "memory of the run": manifest["extra"],
    "metrics": [timeless(row) for row in metrics.read(workdir)],
    "summary": timeless(json.loads((workdir / "summary.json").read_text())),
  }


def live(runner, workdir, pause, startup, rng, tally) -> bool:
  """One life of the run; returns whether it was killed."""
  before = saved_round(workdir)
  process = runner.start(workdir)
  began, started = time.monotonic(), time.time()
  if rng.random() < _STARTS:
    kind, deadline = "start", began + rng.uniform(0, startup)
  else:
    kind, deadline = "rounds", None
  while process.poll() is None:
    now = time.monotonic()
    if deadline is None and written_since(workdir, started):
      deadline = now + rng.uniform(0, pause)
    if deadline is not None and now >= deadline:
      process.kill()
      break
    time.sleep(0.01)
  process.wait()
  if process.returncode == 0:
    return False
  if process.returncode > 0:
    check_exit(process, workdir)
  lost = 0  # By a life that wrote nothing.
  if written_since(workdir, started):
    lost = max(0, last_round(workdir) - max(0, saved_round(workdir)))
  tally.append(
    {
      "kill": len(tally) + 1,
      "during": kind,
      "seconds": time.monotonic() - began,
      "saved before": before,
      "saved then": saved_round(workdir),
      "rounds lost": lost,
    }
  )
  return True


def main():
  rng = random.Random(_SEED.value)
  given = [
    f"--config.{name}={value}" for name, value in command_line.raw_overrides()
  ]
  is_default = _CONFIG.present == 0
  short = _SHORT if is_default else {}
  overrides = [f"--config.{k}={v}" for k, v in short.items()] + given
  folder = output_folder.check(
    "--workdir", _WORKDIR.value or tempfile.mkdtemp(prefix="fedfm-soak")
  )
  folder.mkdir(parents=True, exist_ok=True)
  runner = Runner(folder, overrides)

  whole = folder / "uninterrupted"
  process, began, startup = runner.start(whole), time.monotonic(), None
  while process.poll() is None:
    if startup is None and last_round(whole) >= 1:
      startup = time.monotonic() - began
    time.sleep(0.01)
  check_exit(process, whole)
  startup = startup or 1.0
  rounds = last_round(whole)
  expected = content(whole)
  training = max(0.1, time.monotonic() - began - startup)
  command_line.show(
    f"uninterrupted: {rounds} rounds, {startup:.1f} s to the first and "
    f"{training:.1f} s for the others"
  )

  tally, runs, differing = [], 0, []
  # Kills that come after a new round, spread over the whole run.
  pause = 2 * training / max(1.0, _KILLS.value * (1 - _STARTS))
  while len(tally) < _KILLS.value or not runs:
    workdir = folder / f"killed-{runs + 1}"
    while len(tally) < _KILLS.value and live(
      runner, workdir, pause, startup, rng, tally
    ):
      pass
    process = runner.start(workdir)  # To its end, or to find that it is there.
    process.wait()
    check_exit(process, workdir)
    got, runs = content(workdir), runs + 1
    differing += [f"{workdir}: {k}" for k in expected if got[k] != expected[k]]
  command_line.show(report.table(tally))
  lost = max((row["rounds lost"] for row in tally), default=0)
  command_line.show(
    f"\n{len(tally)} kills over {runs} runs; at most {lost} rounds were lost "
    f"by one; {len(expected['arrays'])} arrays, {rounds + 1} lines of metrics "
    f"and the summary: {'DIFFERENT' if differing else 'bit for bit the same'}"
  )
  for name in differing:
    command_line.show(f"differs: {name}")
  if differing:
    sys.exit(1)


if __name__ == "__main__":
  command_line.run(main)
