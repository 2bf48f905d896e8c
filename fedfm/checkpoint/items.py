"""State on the host that goes into a checkpoint as files of its own.

A client store of a large population is a memory map, not an array of the server
state. Its files lie beside the arrays, in `<round>.items/<name>/`, and are
complete, and in the manifest with a SHA-256 each, before the arrays are
written: a round whose arrays are there has its items too.
"""

from collections.abc import Mapping
import concurrent.futures
import hashlib
import os
import pathlib
import shutil
from typing import Any, Protocol

from fedfm import errors
from fedfm.checkpoint import failures
from fedfm.checkpoint import manifest as manifests


class Item(Protocol):
  """What a run keeps on the host and saves with each checkpoint."""

  def snapshot(self, folder: pathlib.Path) -> None:
    """Writes its state into an empty folder; called by the first process."""

  def restore(self, folder: pathlib.Path) -> None:
    """Takes its state from such a folder; called by every process."""


def save(items: Mapping[str, Item], folder: pathlib.Path) -> dict[str, Any]:
  """Writes all items, whole or not at all.

  Args:
    items: By name.
    folder: Where to; it must not exist.

  Returns:
    {name: {file: {"bytes", "sha256"}}}, for the manifest.

  Raises:
    OSError: A full disk, for example.
  """
  part = folder.with_name(folder.name + ".part")
  shutil.rmtree(part, ignore_errors=True)
  for name, item in items.items():
    (part / name).mkdir(parents=True)
    item.snapshot(part / name)
  records = {name: _records(part / name) for name in items}
  part.rename(folder)
  return records


def check(
  records: Mapping[str, Any], items: Mapping[str, Item], folder: pathlib.Path
) -> None:
  """Checks that a checkpoint's items are whole, and those that are asked for.

  Args:
    records: Of the manifest.
    items: Those to restore; none for a reader that needs only the arrays.
    folder: Where they are.

  Raises:
    CheckpointError: The checkpoint has other items.
    DamagedError: A file is missing, unknown or changed.
  """
  if not items:
    return
  for name in items:
    if name not in records:
      raise errors.CheckpointError(
        f"item {name}: not in the checkpoint{errors.nearest(name, records)}"
      )
  for name, files in records.items():
    if name not in items:
      raise errors.CheckpointError(
        f"item {name}: not in this run{errors.nearest(name, items)}"
      )
    check_files(name, files, folder)


def check_files(
  name: str, files: Mapping[str, Any], folder: pathlib.Path
) -> None:
  """Checks the files of one item against the manifest.

  Raises:
    DamagedError: A file is missing, unknown or changed.
    StorageError: A file cannot be read.
  """
  try:
    found = _records(folder / name)
  except OSError as e:
    raise failures.of_reading(f"item {name}", e) from e
  for file in sorted(files.keys() | found.keys()):
    if files.get(file) != found.get(file):
      raise manifests.DamagedError(
        f"item {name}, file {file}: got {found.get(file, 'nothing')}, expected "
        f"{files.get(file, 'nothing')}"
      )


def _records(folder: pathlib.Path) -> dict[str, Any]:
  if not folder.is_dir():
    raise FileNotFoundError(0, "no such folder", str(folder))
  files = sorted(p for p in folder.rglob("*") if p.is_file())
  # hashlib lets go of the interpreter lock, so threads do help.
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    return {
      str(file.relative_to(folder)): record
      for file, record in zip(files, pool.map(_record, files))
    }


def _record(file: pathlib.Path) -> dict[str, Any]:
  with open(file, "rb") as f:
    os.fsync(f.fileno())
    digest = hashlib.file_digest(f, "sha256").hexdigest()
  return {"bytes": file.stat().st_size, "sha256": digest}
