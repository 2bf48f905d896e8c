"""A run's folder: one writer at a time, one config, files written whole."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
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
  """A claimed folder; `close` (or leaving `with`) lets others claim it.

  Until `commit` the folder is as it was, but for the lock, and closing leaves
  no trace: a run that is refused later changes nothing.
  """

  def __init__(self, path: pathlib.Path, config: dict[str, Any]):
    """Made by `claim`.

    Args:
      path: The folder.
      config: What `commit` stores.
    """
    self.path = path
    self.resumed = False
    self._config = config
    self._rewrite = False
    self._committed = False
    self._made: list[pathlib.Path] = []  # Folders, the outermost first.
    self._lock = -1
    self._old_owner: bytes | None = None  # Of a lock file that was there.

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def commit(self) -> None:
    """Makes the folder a run's, or its config the new one.

    Raises:
      SaveError: The config cannot be written.
    """
    if self._rewrite:
      write_json(self.path / CONFIG, self._config)
    self._rewrite, self._committed = False, True

  def close(self) -> None:
    """Releases the lock; closing twice is fine."""
    if self._lock < 0:
      return
    owner = b"" if self._committed else (self._old_owner or b"")
    _write_owner(self._lock, owner)
    if not self._committed and self._old_owner is None:
      # Still locked: who waits for this file finds that it is gone.
      (self.path / LOCK).unlink(missing_ok=True)
    os.close(self._lock)
    self._lock = -1
    if not self._committed:
      self._remove_made()

  def _open(
    self, may_change: Sequence[str], defaults: Mapping[str, Any]
  ) -> None:
    for folder in reversed([self.path, *self.path.parents]):
      if not folder.exists():
        folder.mkdir(exist_ok=True)
        self._made.append(folder)
    _check_is_run(self.path)
    self._lock, self._old_owner = _lock(self.path)
    self.resumed = (self.path / CONFIG).exists()
    if self.resumed:
      differing = _differing(self.path, self._config, may_change, defaults)
      self._rewrite = bool(differing)
    else:
      self._rewrite = True

  def _remove_made(self) -> None:
    for folder in reversed(self._made):
      with contextlib.suppress(OSError):  # Something else is there by now.
        folder.rmdir()


def claim(
  workdir: str | pathlib.Path,
  config: dict[str, Any],
  *,
  may_change: Sequence[str] = ("rounds",),
  defaults: Mapping[str, Any] | None = None,
) -> RunFolder:
  """Makes a folder this process's own, and compares its config.

  The lock is the operating system's (`flock`), so it ends with the process,
  however that ends. Of several processes of one run only the first claims.

  Args:
    workdir: The run's folder; created if missing.
    config: JSON data, stored as `config.json` by `commit`.
    may_change: Dotted fields (with all below them) that may differ from the
      stored config, which is then rewritten.
    defaults: Values of fields that the stored config lacks, as that of an older
      version does; default none.

  Returns:
    The folder, locked.

  Raises:
    ConfigError: The folder holds a run with another config; the message lists
      every differing field.
    CheckpointError: `workdir` is a file, cannot be written, holds something
      other than a run, or is being written by a live process.
  """
  run = RunFolder(pathlib.Path(workdir).absolute(), config)
  try:
    run._open(may_change, defaults or {})
  except BaseException as e:
    run.close()
    run._remove_made()
    if isinstance(e, OSError):
      raise errors.CheckpointError(
        f"workdir: {run.path} cannot be written: {e.strerror}"
      ) from e
    raise
  return run


def check(
  workdir: str | pathlib.Path,
  config: dict[str, Any],
  *,
  may_change: Sequence[str] = ("rounds",),
  defaults: Mapping[str, Any] | None = None,
) -> None:
  """Raises what `claim` would raise at once; touches nothing.

  Args:
    workdir: The run's folder, which may be missing.
    config: As in `claim`.
    may_change: As in `claim`.
    defaults: As in `claim`.

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
      _differing(path, config, may_change, defaults or {})


def write_json(path: str | pathlib.Path, obj: Any) -> None:
  """Writes JSON so that a reader sees all of it, or what was there before.

  Args:
    path: The file.
    obj: JSON data, without NaN and infinity.

  Raises:
    CheckpointError: It is not JSON.
    SaveError: The file cannot be written.
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
    SaveError: The file cannot be written.
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
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise errors.SaveError(f"{path}: cannot be written: {e.strerror}") from e


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
  except (ValueError, RecursionError) as e:
    raise errors.CheckpointError(f"{path}: not JSON: {e}") from e


def read_config(workdir: str | pathlib.Path) -> dict[str, Any]:
  """Reads the config of the run that a folder holds.

  Args:
    workdir: The folder.

  Returns:
    Its fields.

  Raises:
    CheckpointError: There is none, or it is not a JSON object.
  """
  path = pathlib.Path(workdir) / CONFIG
  config = read_json(path)
  if not isinstance(config, dict):
    raise errors.CheckpointError(
      f"{path}: got a JSON {type(config).__name__}, expected an object"
    )
  return config


def _check_is_run(path: pathlib.Path) -> None:
  """Raises CheckpointError if the folder holds things, but not a run."""
  ours = (CONFIG, LOCK, CONFIG + _TEMPORARY)
  others = sorted(p.name for p in path.iterdir() if p.name not in ours)
  if others and not (path / CONFIG).exists():
    raise errors.CheckpointError(
      f"workdir: {path} is not a run (no {CONFIG}) and not empty (has "
      f"{others[0]!r}), expected a new folder or a run's"
    )


def _lock(path: pathlib.Path) -> tuple[int, bytes | None]:
  """Returns the locked file, and what it held; None for a new file."""
  file = path / LOCK
  while True:
    existed = file.exists()
    lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      old = os.pread(lock, 200, 0)
      if _is_at(lock, file):
        break
      os.close(lock)  # Its owner was refused and took the file along.
    except BlockingIOError as e:
      owner = os.pread(lock, 200, 0).decode(errors="replace").strip()
      os.close(lock)
      raise errors.CheckpointError(
        f"workdir: {path} is being written by {owner or 'another process'}"
      ) from e
    except OSError as e:
      os.close(lock)
      raise errors.CheckpointError(
        f"workdir: {path} cannot be locked: {e.strerror}"
      ) from e
  now = datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")
  owner = f"process {os.getpid()} on {socket.gethostname()} since {now}\n"
  _write_owner(lock, owner.encode())
  return lock, old if existed else None


def _is_at(descriptor: int, file: pathlib.Path) -> bool:
  try:
    return os.path.samestat(os.fstat(descriptor), os.stat(file))
  except FileNotFoundError:
    return False


def _write_owner(lock: int, text: bytes) -> None:
  # On a full disk the lock holds without a name.
  with contextlib.suppress(OSError):
    os.ftruncate(lock, 0)
    os.pwrite(lock, text, 0)


def _differing(path, config, may_change, defaults) -> list[str]:
  """Names the fields that differ; raises where one of them may not."""
  stored = dict(_flatten(_filled(read_config(path), defaults)))
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
      f"{path / CONFIG}: the run was started with another config: "
      f"{'; '.join(refused)}"
    )
  return differing


def _filled(config: Any, defaults: Any) -> Any:
  """Adds fields that are missing; {} is a value, not a group of fields."""
  if not isinstance(config, dict) or not isinstance(defaults, Mapping):
    return config
  if not defaults:
    return config
  both = {k: _filled(config[k], defaults.get(k)) for k in config}
  return {**defaults, **both}


def _flatten(obj: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  if isinstance(obj, dict) and obj:
    for key, value in obj.items():
      yield from _flatten(value, f"{prefix}.{key}" if prefix else key)
  else:
    yield prefix, obj


def _show(fields: dict[str, Any], name: str) -> str:
  return json.dumps(fields[name]) if name in fields else "nothing"
