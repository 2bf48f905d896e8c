"""A run's folder: one writer at a time, one config, files written whole."""

from collections.abc import Iterator, Sequence
import datetime
import fcntl
import json
import os
import pathlib
import socket
from typing import Any, Self

from fedfm import errors

CONFIG = "config.json"
LOCK = "run.lock"
_TEMPORARY = ".part"
_MISSING = object()


class RunFolder:
  """A claimed folder; `close` (or leaving `with`) lets others claim it."""

  def __init__(self, path: pathlib.Path, lock: int, resumed: bool):
    """Made by `claim`.

    Args:
      path: The folder.
      lock: The open lock file's descriptor.
      resumed: Whether the folder held this run already.
    """
    self.path = path
    self.checkpoints = path / "checkpoints"
    self.resumed = resumed
    self._lock = lock

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Releases the lock; closing twice is fine."""
    if self._lock >= 0:
      # The file stays: unlinking it would let two claims lock two files.
      os.ftruncate(self._lock, 0)
      os.close(self._lock)
      self._lock = -1


def claim(
  workdir: str | pathlib.Path,
  config: dict[str, Any],
  *,
  may_change: Sequence[str] = ("rounds",),
) -> RunFolder:
  """Makes a folder this process's own, and writes or compares its config.

  The lock is the operating system's (`flock`), so it ends with the process,
  however that ends. Of several processes of one run only the first claims.

  Args:
    workdir: The run's folder; created if missing.
    config: JSON data, stored as `config.json`.
    may_change: Dotted fields (with all below them) that may differ from the
      stored config, which is then rewritten.

  Returns:
    The folder, locked.

  Raises:
    ConfigError: The folder holds a run with another config; the message lists
      every differing field.
    CheckpointError: `workdir` is a file, cannot be written, holds something
      other than a run, or is being written by a live process.
  """
  path = pathlib.Path(workdir).absolute()
  try:
    path.mkdir(parents=True, exist_ok=True)
    _check_is_run(path)
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
  except OSError as e:
    raise errors.CheckpointError(
      f"workdir: {path} cannot be written: {e.strerror}"
    ) from e
  try:
    _lock(lock, path)
    resumed = _settle_config(path / CONFIG, config, may_change)
  except BaseException:
    os.close(lock)
    raise
  return RunFolder(path, lock, resumed)


def check(
  workdir: str | pathlib.Path,
  config: dict[str, Any],
  *,
  may_change: Sequence[str] = ("rounds",),
) -> None:
  """Raises what `claim` would raise at once; touches nothing.

  Args:
    workdir: The run's folder, which may be missing.
    config: As in `claim`.
    may_change: As in `claim`.

  Raises:
    ConfigError: The folder holds a run with another config.
    CheckpointError: `workdir` is a file, cannot be written, or holds something
      other than a run.
  """
  path = pathlib.Path(workdir).absolute()
  existing = path
  while not existing.exists():
    existing = existing.parent
  if not existing.is_dir():
    raise errors.CheckpointError(
      f"workdir: {path} cannot be written: {existing} is a file"
    )
  if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
    raise errors.CheckpointError(
      f"workdir: {path} cannot be written: no permission in {existing}"
    )
  if existing == path:
    _check_is_run(path)
    if (path / CONFIG).exists():
      _differing(path / CONFIG, config, may_change)


def write_json(path: str | pathlib.Path, obj: Any) -> None:
  """Writes JSON so that a reader sees all of it, or what was there before.

  Args:
    path: The file.
    obj: JSON data, without NaN and infinity.

  Raises:
    CheckpointError: It is not JSON, or the file cannot be written.
  """
  try:
    text = json.dumps(obj, indent=2, allow_nan=False)
  except (TypeError, ValueError) as e:
    raise errors.CheckpointError(f"{path}: not JSON: {e}") from e
  write_text(path, text + "\n")


def write_text(path: str | pathlib.Path, text: str) -> None:
  """Writes a text file in one step, as `write_json` does.

  Args:
    path: The file.
    text: Its new content.

  Raises:
    CheckpointError: The file cannot be written.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + _TEMPORARY)
  try:
    with open(temporary, "w", encoding="utf-8") as f:
      f.write(text)
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  except OSError as e:
    raise errors.CheckpointError(
      f"{path}: cannot be written: {e.strerror}"
    ) from e


def read_json(path: str | pathlib.Path) -> Any:
  """Reads a JSON file.

  Args:
    path: The file.

  Returns:
    What it holds.

  Raises:
    CheckpointError: It is missing, unreadable or not JSON.
  """
  try:
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except OSError as e:
    raise errors.CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
  except ValueError as e:
    raise errors.CheckpointError(f"{path}: not JSON: {e}") from e


def _check_is_run(path: pathlib.Path) -> None:
  """Raises CheckpointError if the folder holds things, but not a run."""
  ours = (CONFIG, LOCK, CONFIG + _TEMPORARY)
  others = sorted(p.name for p in path.iterdir() if p.name not in ours)
  if others and not (path / CONFIG).exists():
    raise errors.CheckpointError(
      f"workdir: {path} is not a run (no {CONFIG}) and not empty (has "
      f"{others[0]!r}), expected a new folder or a run's"
    )


def _lock(lock: int, path: pathlib.Path) -> None:
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as e:
    owner = os.pread(lock, 200, 0).decode(errors="replace").strip()
    raise errors.CheckpointError(
      f"workdir: {path} is being written by {owner or 'another process'}"
    ) from e
  except OSError as e:
    raise errors.CheckpointError(
      f"workdir: {path} cannot be locked: {e.strerror}"
    ) from e
  now = datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")
  os.ftruncate(lock, 0)
  owner = f"process {os.getpid()} on {socket.gethostname()} since {now}\n"
  os.pwrite(lock, owner.encode(), 0)


def _settle_config(file, config, may_change) -> bool:
  """Writes the config of a new run or compares it; returns whether it was."""
  if not file.exists():
    write_json(file, config)
    return False
  if _differing(file, config, may_change):
    write_json(file, config)
  return True


def _differing(file, config, may_change) -> list[str]:
  """Names the fields that differ; raises where one of them may not."""
  stored = dict(_flatten(read_json(file)))
  # Through JSON, so that tuples and lists compare equal.
  given = dict(_flatten(json.loads(json.dumps(config))))
  fields = [*stored, *(name for name in given if name not in stored)]
  differing = [
    name
    for name in fields
    if stored.get(name, _MISSING) != given.get(name, _MISSING)
  ]
  refused = [
    f"{name}: had {_show(stored, name)}, now {_show(given, name)}"
    for name in differing
    if not any(name == m or name.startswith(m + ".") for m in may_change)
  ]
  if refused:
    raise errors.ConfigError(
      f"{file}: the run was started with another config: {'; '.join(refused)}"
    )
  return differing


def _flatten(obj: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  if isinstance(obj, dict) and obj:
    for key, value in obj.items():
      yield from _flatten(value, f"{prefix}.{key}" if prefix else key)
  else:
    yield prefix, obj


def _show(fields: dict[str, Any], name: str) -> str:
  return json.dumps(fields[name]) if name in fields else "nothing"
