"""A run: from a config to a trained federation, in a folder that resumes.

Usable from a notebook, without flags:

  from fedfm import experiment
  summary = experiment.train({"rounds": 4}, "/tmp/fedfm/run")
"""

from collections.abc import Mapping
import contextlib
import logging
import os
import pathlib
import time
from typing import Any

import jax
import ml_collections

from fedfm import assembly
from fedfm import checkpoint
from fedfm import errors
from fedfm import metrics as metrics_lib
from fedfm import prefetch
from fedfm import run_folder
from fedfm import settings as settings_lib
from fedfm.assembly import Experiment
from fedfm.settings import Settings
from fedfm.types import ServerState

Config = ml_collections.ConfigDict | Mapping[str, Any] | Settings
# What may differ when a run is continued: none of it changes what was done.
_MAY_CHANGE = (
    "rounds",
    "lanes",
    "mesh.clients",
    "mesh.fsdp",
    "mesh.tensor",
    "checkpoint.every",
    "checkpoint.keep_last",
)
_LOG = logging.getLogger("fedfm")


def default_config() -> ml_collections.ConfigDict:
  """Returns every field with its default, to change and pass to `train`."""
  return ml_collections.ConfigDict(settings_lib.to_dict(Settings()))


def as_settings(config: Config) -> Settings:
  """Checks a config of any kind; raises ConfigError in one line."""
  if isinstance(config, Settings):
    return config
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  return settings_lib.from_dict(config)


def build(config: Config) -> Experiment:
  """Builds the pieces that a config names; see `assembly.build`."""
  return assembly.build(as_settings(config))


def initial_state(experiment: Experiment) -> ServerState:
  """Returns the server state of round 0, placed on the mesh."""
  with jax.set_mesh(experiment.mesh):
    return jax.jit(experiment.algorithm.init)(experiment.trainable)


def open_run(
    workdir: str | os.PathLike,
) -> tuple[Experiment, ServerState]:
  """Opens a run to evaluate it or to generate from it; changes nothing in it.

  Args:
    workdir: A run's folder.

  Returns:
    The experiment, and its state at the newest intact checkpoint.

  Raises:
    CheckpointError: The folder holds no run, or no checkpoint.
  """
  folder = pathlib.Path(workdir)
  if not (folder / "config.json").is_file():
    raise errors.CheckpointError(
        f"workdir: {folder} holds no config.json, expected a run's folder"
    )
  experiment = build(run_folder.read_json(folder / "config.json"))
  with checkpoint.Checkpointer(
      folder / "checkpoints", read_only=True
  ) as checkpointer:
    target = checkpoint.abstract(initial_state(experiment))
    restored = checkpointer.restore(target)
  if restored is None:
    raise errors.CheckpointError(
        f"workdir: {folder} holds no intact checkpoint"
    )
  return experiment, restored[1]


def train(config: Config, workdir: str | os.PathLike) -> dict[str, Any]:
  """Trains, or goes on where the run in this folder stopped.

  Writes config.json, metrics.jsonl, TensorBoard events, checkpoints and
  summary.json. A resumed run ends with the bits of an uninterrupted one.

  Args:
    config: The run's config.
    workdir: Its folder, new or with an earlier part of the same run.

  Returns:
    The summary: {"rounds", "base", "final", "time", ...}.

  Raises:
    ConfigError: A bad field, or a folder that holds another run.
    DataError: Bad data.
    CheckpointError: Bad weights, or a folder that cannot be written.
  """
  settings = as_settings(config)
  experiment = build(settings)
  with run_folder.claim(
      workdir, settings_lib.to_dict(settings), may_change=_MAY_CHANGE
  ) as folder, jax.set_mesh(experiment.mesh):
    return _train(experiment, folder)


def _train(experiment: Experiment, folder: run_folder.RunFolder) -> dict:
  s = experiment.settings
  state = initial_state(experiment)
  with checkpoint.Checkpointer(
      folder.checkpoints, keep_last=s.checkpoint.keep_last
  ) as checkpointer:
    restored = checkpointer.restore(checkpoint.abstract(state))
    first = 0
    if restored is not None:
      first, state, _ = restored
      _LOG.info("resuming at round %d", first)
    with metrics_lib.MetricsWriter(
        folder.path, resume_round=None if restored is None else first
    ) as writer, contextlib.closing(
        metrics_lib.Progress(s.rounds, first)
    ) as progress:
      if restored is None:
        writer.write({"round": 0, **_evaluate(experiment, state)})
        checkpointer.save(0, state)
      state = _rounds(experiment, state, first, checkpointer, writer, progress)
  summary = _summary(folder.path, s)
  run_folder.write_json(folder.path / "summary.json", summary)
  return summary


def _rounds(experiment, state, first, checkpointer, writer, progress):
  """Runs rounds [first, settings.rounds) and returns the last state."""
  s, base = experiment.settings, experiment.base
  up, down = experiment.algorithm.bytes_per_client(state)
  began = time.perf_counter()
  for index, cohort in prefetch.prefetch(experiment.cohort, first, s.rounds):
    waited = time.perf_counter() - began
    state, metrics = experiment.run_round(state, base, cohort)
    # One dispatch at a time: virtual CPU devices deadlock with more queued.
    metrics = {k: v.item() for k, v in jax.device_get(metrics).items()}
    seconds = time.perf_counter() - began
    done = index + 1
    participants = int(metrics["clients/participating"])
    line = {
        "round": done,
        **metrics,
        "comm/bytes_up": participants * up,
        "comm/bytes_down": participants * down,
        "time/round_seconds": seconds,
        "time/data_wait_seconds": waited,
        "time/tokens_per_second": metrics["train/count"] / seconds,
    }
    last = done == s.rounds
    if last or done % s.eval.every == 0:
      line |= _evaluate(experiment, state)
    writer.write(line)
    if last or done % s.checkpoint.every == 0:
      checkpointer.save(done, state)
    progress.update(
        done,
        loss=metrics["train/loss"],
        tokens_per_second=line["time/tokens_per_second"],
    )
    if metrics["clients/nonfinite"]:
      _LOG.warning(
          "round %d: %d clients were not finite and left out",
          done,
          int(metrics["clients/nonfinite"]),
      )
    began = time.perf_counter()
  return state


def _evaluate(experiment: Experiment, state: ServerState) -> dict[str, float]:
  base = experiment.algorithm.effective_base(state, experiment.base)
  return experiment.evaluate(state.trainable, base)


def _summary(folder: pathlib.Path, settings: Settings) -> dict[str, Any]:
  """Derives the summary from the metrics file, which resuming keeps whole."""
  lines = metrics_lib.read(folder)
  evaluated = [
      {k: v for k, v in line.items() if k.startswith("eval/")}
      for line in lines
  ]
  evaluated = [e for e in evaluated if e]
  return {
      "rounds": lines[-1]["round"],
      "algorithm": settings.algorithm,
      "base": evaluated[0] if evaluated else {},
      "final": evaluated[-1] if evaluated else {},
      "comm/bytes_up": sum(line.get("comm/bytes_up", 0) for line in lines),
      "comm/bytes_down": sum(line.get("comm/bytes_down", 0) for line in lines),
      "time/seconds": sum(line.get("time/round_seconds", 0) for line in lines),
  }
