"""What a run writes down about itself: manifests, log lines, the summary."""

import logging
import math
import pathlib
from typing import Any

import jax

from fedfm import (
  blueprint,
  checkpoint,
  data_files,
  errors,
  goodput,
  planning,
  report,
  trees,
)
from fedfm import metrics as metrics_lib
from fedfm import settings as settings_lib
from fedfm.assembly import Experiment
from fedfm.settings import Settings

_LOG = logging.getLogger("fedfm")


def open_checkpoints(
  experiment: Experiment, folder: pathlib.Path
) -> checkpoint.Checkpointer:
  """Opens the checkpoints of a run, which keep what its settings say.

  Args:
    experiment: What is trained.
    folder: The run's folder.

  Returns:
    A checkpointer, whose manifests hold the config and the digests of the base
    and of the data.
  """
  c = experiment.settings.checkpoint
  config = settings_lib.to_dict(experiment.settings)

  def score(extra):
    value = extra.get("score")
    same = value is not None and extra.get("best_by") == c.best_by
    return value if same else math.inf

  return checkpoint.Checkpointer(
    folder / "checkpoints",
    keep_last=c.keep_last,
    keep_every=c.keep_every or None,
    keep_best=score if c.keep_best else None,
    regular=c.every,
    items=experiment.items,
    run={
      "config": config,
      "config_digest": checkpoint.json_digest(config),
      "base": _describe_base(experiment),
      "data": data_files.digest(experiment.settings, experiment.data.train),
    },
  )


def _describe_base(experiment: Experiment) -> dict[str, Any] | None:
  """Names the frozen base, which no checkpoint holds."""
  if experiment.base is None:
    return None
  return {
    "path": str(blueprint.model_folder(experiment.settings)),
    "digest": checkpoint.digest(experiment.base),
    "bytes": trees.num_bytes(experiment.base),
  }


def check_base(
  folder: pathlib.Path, manifest: dict[str, Any], experiment: Experiment
) -> None:
  """Checks that a checkpoint was made on the base that is here now.

  Args:
    folder: The run's folder, for the message.
    manifest: The checkpoint's.
    experiment: What is to go on from it.

  Raises:
    CheckpointError: The base's weights are other ones.
  """
  stored, base = manifest["run"].get("base"), _describe_base(experiment)
  if stored and base and stored["digest"] != base["digest"]:
    raise errors.CheckpointError(
      f"model.path: the weights of {base['path']} are not those that the run "
      f"in {folder} was started from: digest {base['digest'][:23]}, expected "
      f"{stored['digest'][:23]} (of {stored['path']})"
    )


def check_data(
  folder: pathlib.Path, manifest: dict[str, Any], now: dict[str, Any]
) -> None:
  """Checks that a checkpoint was made with the data that are here now.

  Args:
    folder: The run's folder, for the message.
    manifest: The checkpoint's; one of an older version has no digest.
    now: As `manifest["run"]`, of what is to go on.

  Raises:
    DataError: The data are other ones, or elsewhere without a digest to tell.
  """
  was = manifest["run"]
  old, new = was["config"]["data"]["path"], now["config"]["data"]["path"]
  if "data" not in was and old != new:
    raise errors.DataError(
      f"data.path: had {old!r}, now {new!r}, and the run in {folder} has no "
      "digest of its data to compare"
    )
  if was.get("data", now["data"]) != now["data"]:
    raise errors.DataError(
      f"data.path: {new or now['config']['data']['name']} does not hold the "
      f"data that the run in {folder} was started with: digest "
      f"{now['data'][:23]}, expected {was['data'][:23]}"
    )


def check_nothing_done(folder: pathlib.Path, set_aside: list[str]) -> None:
  """Checks that a run without an intact checkpoint has not begun to train.

  The first line of training is written after the checkpoint of round 0 is
  whole, and from then on there always is one. Without it the run would start
  over, and its metrics would go.

  Args:
    folder: The run's folder.
    set_aside: The names of its damaged checkpoints.

  Raises:
    CheckpointError: It has.
  """
  done = metrics_lib.last_round(folder)
  trained = [name for name in set_aside if not name.startswith("0.")]
  if done > 0 or trained:
    damaged = f"; damaged: {', '.join(trained)}" if trained else ""
    raise errors.CheckpointError(
      f"workdir: {folder} has metrics of {max(done, 0)} rounds and no intact "
      f"checkpoint{damaged}; start in a new folder, or remove "
      f"{metrics_lib.FILE} and checkpoints to begin again"
    )


def warn_of_versions(manifest: dict[str, Any]) -> None:
  """Warns where a checkpoint was made by other versions than are here now.

  Args:
    manifest: The checkpoint's.
  """
  now = checkpoint.versions()
  changed = [
    f"{name} {was}, now {now.get(name)}"
    for name, was in manifest["versions"].items()
    if now.get(name) != was
  ]
  if changed and jax.process_index() == 0:
    _LOG.warning(
      "other versions than the checkpoint's, so the last bits may differ: %s",
      "; ".join(changed),
    )


def describe(experiment: Experiment) -> str:
  """Says in one line what runs where."""
  mesh, versions = experiment.mesh, checkpoint.versions()
  shape = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
  lanes = planning.say_lanes(
    experiment.settings, experiment.plan, mesh, experiment.num_lanes
  )
  return (
    f"fedfm {versions['fedfm']} on jax {versions['jax']}: {mesh.size} "
    f"{mesh.devices.flat[0].platform} devices of {jax.process_count()} "
    f"processes, mesh {shape}; {lanes}"
  )


def say_time(summary: dict[str, Any]) -> str:
  """Says in one line where the time went."""
  whole = max(summary["time/seconds"], 1e-9)
  shares = ", ".join(
    f"{name.replace('_', ' ')} {summary[f'time/{name}_seconds'] / whole:.0%}"
    for name in (*goodput.SPANS, "compile", "other")
  )
  return f"done: {summary['rounds']} rounds in {whole:.1f} s ({shares})"


def summary(folder: pathlib.Path, settings: Settings) -> dict[str, Any]:
  """Derives the summary from the metrics file, which resuming keeps whole.

  Args:
    folder: The run's folder.
    settings: The run's.

  Returns:
    The content of `summary.json`.
  """
  lines = metrics_lib.read(folder)
  evaluated = [
    {k: v for k, v in line.items() if k.startswith("eval/")} for line in lines
  ]
  evaluated = [e for e in evaluated if e]

  def total(name):
    return sum(line.get(name) or 0 for line in lines)

  spent = (*goodput.SPANS, "compile", "other", "elapsed")
  seconds = {f"time/{k}_seconds": total(f"time/{k}_seconds") for k in spent}
  elapsed = seconds.pop("time/elapsed_seconds")
  peaks = {k for line in lines for k in line if k.startswith("memory/")}
  return {
    "rounds": settings.rounds,
    "algorithm": settings.algorithm,
    "base": evaluated[0] if evaluated else {},
    "final": evaluated[-1] if evaluated else {},
    **(report.forgetting(lines) if settings.data.schedule != "static" else {}),
    "comm/bytes_up": total("comm/bytes_up"),
    "comm/bytes_down": total("comm/bytes_down"),
    "clients/nonfinite": total("clients/nonfinite"),
    "safety/problems": sum("safety/problem" in line for line in lines),
    "time/seconds": elapsed,
    "time/goodput": seconds["time/round_seconds"] / max(elapsed, 1e-9),
    "time/compilations": total("time/compilations"),
    **seconds,
    **{k: max(line.get(k) or 0 for line in lines) for k in sorted(peaks)},
  }
