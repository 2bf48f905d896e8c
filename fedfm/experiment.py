"""A run: from a config to a trained federation, in a folder that resumes.

Usable from a notebook, without flags:

  from fedfm import experiment
  summary = experiment.train({"rounds": 4}, "/tmp/fedfm/run")
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import time
from typing import Any

import jax
import ml_collections

from fedfm import (
  assembly,
  checkpoint,
  errors,
  goodput,
  hosting,
  interruption,
  processes,
  protection,
  recording,
  rounds,
  run_folder,
  run_log,
)
from fedfm import metrics as metrics_lib
from fedfm import settings as settings_lib
from fedfm.assembly import Experiment
from fedfm.settings import Settings
from fedfm.types import ServerState

Config = ml_collections.ConfigDict | Mapping[str, Any] | Settings
# What may differ when a run is continued: none of it changes what was done.
_MAY_CHANGE = (
  "mesh.clients",
  "mesh.fsdp",
  "mesh.tensor",
  "rounds_per_dispatch",
  "data.path",  # But not what is there: see `recording.check_data`.
  "data.resident",
  "checkpoint",
  "safety",
)
_LOG = logging.getLogger("fedfm")


def default_config() -> ml_collections.ConfigDict:
  """Returns every field with its default, to change and pass to `train`."""
  return ml_collections.ConfigDict(_defaults())


def _defaults() -> dict[str, Any]:
  return settings_lib.to_dict(Settings())


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
  workdir: str | os.PathLike,
  changes: Mapping[str, Any] | None = None,
  round: int | None = None,
) -> tuple[Experiment, ServerState]:
  """Opens a run to evaluate it or to generate from it; changes nothing in it.

  Args:
    workdir: A run's folder.
    changes: Fields that differ from the run's, nested, such as
      `{"eval": {"max_examples": 0}}` or another mesh.
    round: Whose checkpoint to take; default the newest that is intact.

  Returns:
    The experiment, and its state.

  Raises:
    CheckpointError: The folder holds no run, or no such checkpoint, or the base
      is not the one that the run was started from.
    ConfigError: A bad change.
  """
  folder = pathlib.Path(workdir)
  with errors.at("workdir", folder):
    errors.check_path(folder, errors.CheckpointError)
  if not (folder / "config.json").is_file():
    raise errors.CheckpointError(
      f"workdir: {folder} holds no config.json, expected a run's folder"
    )
  config = run_folder.read_config(folder)
  experiment = build(_merge(config, changes or {}))
  experiment = hosting.open_store(experiment, folder, read_only=True)
  with checkpoint.Checkpointer(
    folder / "checkpoints", read_only=True
  ) as checkpointer:
    target = checkpoint.abstract(experiment.initial_state())
    check = functools.partial(hosting.check, experiment)
    restored = checkpointer.restore(target, round, check=check)
    if restored is None:
      raise errors.CheckpointError(
        f"workdir: {folder} holds no intact checkpoint"
      )
    if "model" not in (changes or {}):
      manifest = checkpointer.manifest(restored[0])
      recording.check_base(folder, manifest, experiment)
  return experiment, restored[1]


def _merge(config: Any, changes: Any) -> Any:
  if not isinstance(config, Mapping) or not isinstance(changes, Mapping):
    return changes
  merged = {k: _merge(config.get(k), v) for k, v in changes.items()}
  return {**config, **merged}


def train(
  config: Config,
  workdir: str | os.PathLike,
  profile_round: int | None = None,
) -> dict[str, Any]:
  """Trains, or goes on where the run in this folder stopped.

  Writes config.json, metrics.jsonl, TensorBoard events, checkpoints, log.txt
  and summary.json. A resumed run ends with the bits of an uninterrupted one.

  Args:
    config: The run's config.
    workdir: Its folder, new or with an earlier part of the same run.
    profile_round: A round to trace with `jax.profiler`, from 1; its profile is
      in the folder, `profile/round_<N>`.

  Returns:
    The summary: {"rounds", "base", "final", "time/...", ...}.

  Raises:
    ConfigError: A bad field, or a folder that holds another run.
    DataError: Bad data.
    CheckpointError: Bad weights, a folder that cannot be written, or a run that
      went on and has no intact checkpoint any more.
    SaveError: The disk was full, for example; what was saved is whole.
    DivergedError: The loss went wrong, where `safety` says to stop then.
    Stopped: SIGTERM or Ctrl-C; the state is saved.
  """
  began = time.perf_counter()
  settings = as_settings(config)
  with _claimed(settings, pathlib.Path(workdir), profile_round) as folder:
    return _run(build(settings), folder, began, profile_round)[0]


def run(
  experiment: Experiment,
  workdir: str | os.PathLike,
  profile_round: int | None = None,
) -> tuple[dict[str, Any], ServerState]:
  """Runs an experiment that is built; see `train`.

  Args:
    experiment: From `build`.
    workdir: Its folder, new or with an earlier part of the same run.
    profile_round: As in `train`.

  Returns:
    The summary, and the last state.

  Raises:
    FedFMError: As `train`.
  """
  began = time.perf_counter()
  settings = experiment.settings
  with _claimed(settings, pathlib.Path(workdir), profile_round) as folder:
    return _run(experiment, folder, began, profile_round)


@contextlib.contextmanager
def _claimed(
  settings: Settings, workdir: pathlib.Path, profile_round: int | None
) -> Iterator[run_folder.RunFolder]:
  """Makes the folder this run's until the end, or refuses it in all processes.

  Before anything is built: a refused run leaves no trace.
  """
  config = settings_lib.to_dict(settings)
  claim = run_folder.RunFolder(workdir, config)
  error: errors.FedFMError | None = None
  with contextlib.ExitStack() as stack:
    try:
      may_change = _check_folder(settings, workdir, profile_round)
      if jax.process_index() == 0:
        claim = stack.enter_context(
          run_folder.claim(
            workdir, config, may_change=may_change, defaults=_defaults()
          )
        )
    except errors.FedFMError as e:
      error = e
    fields = {path: settings_lib.get(settings, path) for path in _paths()}
    processes.agree(error, fields)
    yield claim


def _paths() -> list[str]:
  """Returns the dotted name of every field."""
  return _paths_of(Settings, "")


def _paths_of(group: Any, prefix: str) -> list[str]:
  paths = []
  for field in dataclasses.fields(group):
    path = f"{prefix}{field.name}"
    if dataclasses.is_dataclass(field.default):
      paths += _paths_of(field.default, f"{path}.")
    else:
      paths.append(path)
  return paths


def _check_folder(
  settings: Settings, workdir: pathlib.Path, profile_round: int | None
) -> tuple[str, ...]:
  """Refuses a folder of something else; returns the fields that may change."""
  if profile_round is not None and not 1 <= profile_round <= settings.rounds:
    raise errors.ConfigError(
      f"profile_round: got {profile_round}, expected 1 to rounds = "
      f"{settings.rounds}"
    )
  may_change = _MAY_CHANGE
  # A schedule that falls to 0 over the rounds makes them part of what was done.
  # So does noise that was chosen for their number.
  constant = settings.client.schedule == settings.server.schedule == "constant"
  if constant and settings.privacy.epsilon is None:
    may_change = (*may_change, "rounds")
  if not settings.deterministic:
    may_change = (*may_change, "lanes")
  config = settings_lib.to_dict(settings)
  run_folder.check(workdir, config, may_change=may_change, defaults=_defaults())
  folder = workdir / "checkpoints"
  if folder.exists():
    with checkpoint.Checkpointer(folder, read_only=True) as checkpointer:
      done = 0
      for round in reversed(checkpointer.all_rounds()):
        with contextlib.suppress(checkpoint.DamagedError):  # Told on restoring.
          done = checkpointer.manifest(round)["round"]
          break
    if done > settings.rounds:
      raise errors.ConfigError(
        f"rounds: got {settings.rounds}, but the run in {workdir} has done "
        f"{done}"
      )
  return may_change


def _run(
  experiment: Experiment,
  claim: run_folder.RunFolder,
  began: float,
  profile_round: int | None,
) -> tuple[dict[str, Any], ServerState]:
  """Restores what there is, runs the rounds that are left, writes a summary."""
  s, folder = experiment.settings, claim.path
  first_process = jax.process_index() == 0
  with contextlib.ExitStack() as stack:
    enter = stack.enter_context
    enter(jax.set_mesh(experiment.mesh))
    clock = enter(goodput.Clock(began))
    log = None
    if first_process:
      if not claim.resumed:
        claim.commit()
      log = enter(run_log.RunLog(folder))
      log.say(recording.describe(experiment))
      if not experiment.data.evals:
        _LOG.warning(
          "nothing is evaluated: the data holds nothing out (see "
          "data.heldout_fraction and data.unseen_fraction)"
        )
      if experiment.accounting is not None:
        log.say(protection.describe(s, experiment.accounting))
    processes.wait_for_all("claimed")
    checkpointer = enter(recording.open_checkpoints(experiment, folder))
    # Clients' states on the host can go back to any checkpoint that is kept.
    experiment = hosting.open_store(
      experiment,
      folder,
      may_create=not checkpointer.latest(),
      oldest=lambda: min(checkpointer.all_rounds(), default=0),
    )
    state = experiment.initial_state()
    restored = checkpointer.restore(
      checkpoint.abstract(state),
      check=functools.partial(hosting.check, experiment),
    )
    first, extra = 0, {}
    if restored is not None:
      first, state, extra = restored
      manifest = checkpointer.manifest(first)
      recording.check_base(folder, manifest, experiment)
      recording.check_data(folder, manifest, checkpointer.run)
      recording.warn_of_versions(manifest)
    else:
      recording.check_nothing_done(folder, checkpointer.set_aside())
    hosting.take_back(experiment, state)
    if first_process:
      claim.commit()
    reports = run_log.Reports()
    if first_process:
      writer = metrics_lib.MetricsWriter(
        folder, resume_round=None if restored is None else first
      )
      progress = metrics_lib.Progress(s.rounds, first)
      enter(contextlib.closing(progress))
      reports = run_log.Reports(enter(writer), progress, log)
    if restored is not None:
      reports.say(f"resuming at round {first}")
    if profile_round is not None and profile_round <= first:
      reports.say(
        f"profile_round: round {profile_round} was done before, not traced now"
      )
    profile = None
    if profile_round is not None:
      profile = profile_round, folder / "profile" / f"round_{profile_round}"
    training = rounds.Training(
      experiment, checkpointer, reports, clock, extra, profile
    )
    if restored is None:
      training.begin(state)
    with interruption.StopRequest() as stop:
      state = training.run(state, first, stop)
    if first_process:
      summary = recording.summary(folder, s)
      run_folder.write_json(folder / "summary.json", summary)
      reports.say(recording.say_time(summary))
    processes.wait_for_all("summary")
  return run_folder.read_json(folder / "summary.json"), state
