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
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import ml_collections

from fedfm import assembly, checkpoint, errors, prefetch, run_folder
from fedfm import metrics as metrics_lib
from fedfm import settings as settings_lib
from fedfm.assembly import Experiment
from fedfm.settings import Settings
from fedfm.types import ServerState

Config = ml_collections.ConfigDict | Mapping[str, Any] | Settings
# What may differ when a run is continued: none of it changes what was done.
_MAY_CHANGE = (
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


def open_run(
  workdir: str | os.PathLike, changes: Mapping[str, Any] | None = None
) -> tuple[Experiment, ServerState]:
  """Opens a run to evaluate it or to generate from it; changes nothing in it.

  Args:
    workdir: A run's folder.
    changes: Fields that differ from the run's, nested, such as
      `{"eval": {"max_examples": 0}}` or another mesh.

  Returns:
    The experiment, and its state at the newest intact checkpoint.

  Raises:
    CheckpointError: The folder holds no run, or no checkpoint.
    ConfigError: A bad change.
  """
  folder = pathlib.Path(workdir)
  if not (folder / "config.json").is_file():
    raise errors.CheckpointError(
      f"workdir: {folder} holds no config.json, expected a run's folder"
    )
  config = run_folder.read_json(folder / "config.json")
  experiment = build(_merge(config, changes or {}))
  with checkpoint.Checkpointer(
    folder / "checkpoints", read_only=True
  ) as checkpointer:
    target = checkpoint.abstract(experiment.initial_state())
    restored = checkpointer.restore(target)
  if restored is None:
    raise errors.CheckpointError(
      f"workdir: {folder} holds no intact checkpoint"
    )
  return experiment, restored[1]


def _merge(config: Any, changes: Any) -> Any:
  if not isinstance(config, Mapping) or not isinstance(changes, Mapping):
    return changes
  merged = {k: _merge(config.get(k), v) for k, v in changes.items()}
  return {**config, **merged}


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
  _check_folder(settings, pathlib.Path(workdir))  # Before anything is built.
  return run(build(settings), workdir)[0]


def run(
  experiment: Experiment, workdir: str | os.PathLike
) -> tuple[dict[str, Any], ServerState]:
  """Runs an experiment that is built; see `train`.

  Args:
    experiment: From `build`.
    workdir: Its folder, new or with an earlier part of the same run.

  Returns:
    The summary, and the last state.

  Raises:
    ConfigError: A folder that holds another run.
    CheckpointError: A folder that cannot be written.
  """
  settings, folder = experiment.settings, pathlib.Path(workdir)
  may_change = _check_folder(settings, folder)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(experiment.mesh))
    if jax.process_index() == 0:
      stack.enter_context(
        run_folder.claim(
          folder, settings_lib.to_dict(settings), may_change=may_change
        )
      )
    _wait_for_all("claimed")
    checkpointer = stack.enter_context(
      checkpoint.Checkpointer(
        folder / "checkpoints", keep_last=settings.checkpoint.keep_last
      )
    )
    state = _train(experiment, folder, checkpointer)
  return run_folder.read_json(folder / "summary.json"), state


def _check_folder(settings: Settings, workdir: pathlib.Path) -> tuple[str, ...]:
  """Refuses a folder of something else; returns the fields that may change."""
  may_change = _MAY_CHANGE
  # A schedule that falls to 0 over the rounds makes them part of what was done.
  if settings.client.schedule == settings.server.schedule == "constant":
    may_change = (*_MAY_CHANGE, "rounds")
  config = settings_lib.to_dict(settings)
  run_folder.check(workdir, config, may_change=may_change)
  folder = workdir / "checkpoints"
  if folder.is_dir():
    with checkpoint.Checkpointer(folder, read_only=True) as checkpointer:
      done = checkpointer.latest() or 0
    if done > settings.rounds:
      raise errors.ConfigError(
        f"rounds: got {settings.rounds}, but the run in {workdir} has done "
        f"{done}"
      )
  return may_change


def _wait_for_all(name: str) -> None:
  """Waits until every process is here; a no-op with one."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _train(
  experiment: Experiment,
  folder: pathlib.Path,
  checkpointer: checkpoint.Checkpointer,
) -> ServerState:
  """Restores what there is, runs the rounds that are left, writes a summary."""
  s = experiment.settings
  state = experiment.initial_state()
  restored = checkpointer.restore(checkpoint.abstract(state))
  first = 0
  _LOG.info("%d lanes", experiment.num_lanes)
  if restored is not None:
    first, state, _ = restored
    _LOG.info("resuming at round %d", first)
  with contextlib.ExitStack() as stack:
    log = _Log(None, None)
    if jax.process_index() == 0:
      log = _Log(
        stack.enter_context(
          metrics_lib.MetricsWriter(
            folder, resume_round=None if restored is None else first
          )
        ),
        stack.enter_context(
          contextlib.closing(metrics_lib.Progress(s.rounds, first))
        ),
      )
    if restored is None:
      log.write({"round": 0, **_evaluate(experiment, state)})
      checkpointer.save(0, state)
    state = _rounds(experiment, state, first, checkpointer, log)
  checkpointer.wait()
  if jax.process_index() == 0:
    run_folder.write_json(folder / "summary.json", _summary(folder, s))
  _wait_for_all("summary")
  return state


class _Log(NamedTuple):
  """Where process 0 reports; the others say nothing."""

  writer: metrics_lib.MetricsWriter | None
  progress: metrics_lib.Progress | None

  def write(self, line: dict[str, Any]) -> None:
    if self.writer is not None:
      self.writer.write(line)

  def update(self, done: int, **values: float) -> None:
    if self.progress is not None:
      self.progress.update(done, **values)


def _rounds(experiment, state, first, checkpointer, log) -> ServerState:
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
    log.write(line)
    if last or done % s.checkpoint.every == 0:
      checkpointer.save(done, state)
    log.update(
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
    {k: v for k, v in line.items() if k.startswith("eval/")} for line in lines
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
