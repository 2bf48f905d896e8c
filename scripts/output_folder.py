"""Folders that scripts write, checked before anything is computed."""

import os
import pathlib
from typing import Any

from fedfm import adapters, blueprint, errors


def check(flag: str, path: str | os.PathLike) -> pathlib.Path:
  """Refuses what cannot be, or become, a folder to write into.

  Args:
    flag: Its name, such as "--output".
    path: Its value.

  Returns:
    The path.

  Raises:
    ConfigError: A path that no file can have, a file, or one below a file or
      where nothing can be written.
  """
  folder = pathlib.Path(path)
  with errors.at(flag, folder, (errors.ConfigError,)):
    errors.check_path(folder)
    existing = folder.absolute()
    while not existing.exists():
      existing = existing.parent
    if not existing.is_dir():
      raise errors.ConfigError(f"{existing} is a file")
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
      raise errors.ConfigError(f"no permission in {existing}")
  return folder


def check_new(flag: str, path: str | os.PathLike) -> pathlib.Path:
  """As `check`; what is there already is not written over, nor mixed with.

  Args:
    flag: As in `check`.
    path: As in `check`.

  Returns:
    The path.

  Raises:
    ConfigError: As `check`, or a folder that is not empty.
  """
  folder = check(flag, path)
  if folder.exists() and any(folder.iterdir()):
    raise errors.ConfigError(f"{flag}: {folder} is not empty")
  return folder


def write_merged(folder: pathlib.Path, opened: Any, state: Any) -> None:
  """Writes what a run has trained as a Hugging Face folder of the whole model.

  Args:
    folder: From `check_new`.
    opened: The run, of `experiment.open_run`.
    state: Its state.

  Raises:
    ConfigError: An adapter that is not a change of weights.
    CheckpointError: The folder cannot be written.
  """
  start = blueprint.model_folder(opened.settings)
  adapters.export(
    folder,
    opened.model,
    opened.algorithm.effective_base(state, opened.base),
    opened.adapter,
    opened.algorithm.effective_trainable(state),
    like=start,
  )
