"""One of the two copies of a client store: a file of rows, and logs.

`rows` has a record a client, as of the version `floor`; `logs/<version>` has
what each later round wrote. The state of a client is in the newest log that has
it, or else in `rows`. Every record has a digest, and every log names the one
before it, so that what is damaged, cut off or missing is found.
"""

import errno
import json
import logging
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from fedfm import errors
from fedfm.clients import sealing
from fedfm.clients.sealing import DIGEST, DamagedRowsError

DAMAGED, EMPTY, WRITTEN = range(3)  # What is found of a record.
_CHUNK = 1 << 24  # Bytes that are copied at a time.
_LOG = logging.getLogger("fedfm")
_VERSION = re.compile(r"[1-9]\d*")


class Log(NamedTuple):
  """What one round wrote.

  Attributes:
    version: Of the store after it.
    previous: The version before it.
    rows: [n], whose records it has, int64.
  """

  version: int
  previous: int
  rows: np.ndarray

  @property
  def start(self) -> int:
    """Where the records begin, in bytes."""
    return 8 * (2 + len(self.rows)) + DIGEST


class RowFiles:
  """A copy, in a folder of its own; one process writes it."""

  def __init__(self, folder: pathlib.Path, num_rows: int, size: int):
    """Opens nothing yet, so that a damaged copy can be mended.

    Args:
      folder: The copy's.
      num_rows: Of the file `rows`.
      size: Of a record, in bytes, with its digest.
    """
    self.folder = folder
    self._num_rows = num_rows
    self._size = size
    self._file = -1

  def create(self, store: dict[str, Any]) -> None:
    """Makes a copy in which there is no record; the folder must not exist.

    Args:
      store: What to say about it, JSON data.
    """
    (self.folder / "logs").mkdir(parents=True)
    with open(self.folder / "rows", "wb") as file:
      file.truncate(self._num_rows * self._size)
    self._describe(store, 0)

  def open(self, read_only: bool) -> bool:
    """Opens the file of rows; whether it is there, of the right length."""
    self.close()
    flags = os.O_RDONLY if read_only else os.O_RDWR
    try:
      self._file = os.open(self.folder / "rows", flags | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
      return False
    return self._is_of_right_length()

  def close(self) -> None:
    """Closes the file; closing twice is fine."""
    if self._file >= 0:
      os.close(self._file)
      self._file = -1

  def description(self) -> dict[str, Any] | None:
    """What `create` was given, as "store", and the "floor"; None if damaged."""
    try:
      text = (self.folder / "store.json").read_text(encoding="utf-8")
      content = json.loads(text)
      digest = content.pop("digest")
    except (FileNotFoundError, NotADirectoryError):
      return None
    except (ValueError, KeyError, TypeError, AttributeError):
      return None
    return content if digest == sealing.json_digest(content) else None

  def floor(self) -> int:
    """The oldest version that can still be read.

    Raises:
      DamagedRowsError: A damaged store.json.
    """
    content = self.description()
    if content is None:
      raise DamagedRowsError(f"{self.folder / 'store.json'}: is damaged")
    return content["floor"]

  def versions(self) -> list[int]:
    """The versions that have a log, ascending."""
    try:
      names = [p.name for p in (self.folder / "logs").iterdir()]
    except (FileNotFoundError, NotADirectoryError):
      return []
    return sorted(int(name) for name in names if _VERSION.fullmatch(name))

  def logs(self, version: int) -> list[Log]:
    """The logs that lead to a version, oldest first.

    Args:
      version: The floor, or a later one.

    Raises:
      DamagedRowsError: A damaged log, or one that is missing.
      CheckpointError: A version before the floor.
    """
    # Before the floor is read, which a writer may be raising.
    logs = [self._log(v) for v in self.versions() if v <= version]
    known = floor = self.floor()
    if version < floor:
      raise errors.CheckpointError(
        f"{self.folder}: got version {version}, but the oldest that is still "
        f"known is {floor}"
      )
    for log in logs:
      if log.version > floor:
        if log.previous != known:
          raise DamagedRowsError(f"{self._file_of(log.previous)}: is missing")
        known = log.version
    if known != version:
      raise DamagedRowsError(f"{self._file_of(version)}: is missing")
    return logs

  def read(
    self, rows: np.ndarray, version: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Reads records as of a version.

    Args:
      rows: [n], int64.
      version: The floor, or a later one.

    Returns:
      The records, uint8 [n, size], and whether each is DAMAGED, EMPTY or
      WRITTEN, [n].

    Raises:
      DamagedRowsError: None can be found, as a log is missing or damaged.
      CheckpointError: A version before the floor.
    """
    records = np.zeros((len(rows), self._size), np.uint8)
    found = np.full(len(rows), DAMAGED)
    left = np.ones(len(rows), bool)
    for log in reversed(self.logs(version)):
      order = np.argsort(log.rows)
      at = np.searchsorted(log.rows, rows, sorter=order)
      at = order[np.minimum(at, len(order) - 1)] if len(order) else at
      here = left & np.isin(rows, log.rows)
      if not here.any():
        continue
      left &= ~here
      try:
        file = os.open(self._file_of(log.version), os.O_RDONLY | os.O_CLOEXEC)
      except FileNotFoundError as e:
        raise DamagedRowsError(f"{e.filename}: is missing") from e
      try:
        for i in np.flatnonzero(here).tolist():
          place = log.start + int(at[i]) * self._size
          found[i] = self._get(file, records[i], place, int(rows[i]))
          if found[i] == EMPTY:  # A log has no holes.
            found[i] = DAMAGED
      finally:
        os.close(file)
    for i in np.flatnonzero(left).tolist():
      records[i], found[i] = self.from_rows(int(rows[i]))
    if version < self.floor():  # A writer raised it meanwhile.
      raise DamagedRowsError(f"{self.folder}: version {version} was dropped")
    return records, found

  def from_rows(self, row: int) -> tuple[np.ndarray, int]:
    """One record of the file of rows, as `read` has it, whatever the logs."""
    record = np.zeros(self._size, np.uint8)
    if self._file < 0:
      return record, DAMAGED
    return record, self._get(self._file, record, row * self._size, row)

  def write(
    self, version: int, previous: int, rows: np.ndarray, records: np.ndarray
  ) -> None:
    """Writes the log of a round, whole or not at all."""
    head = np.array([previous, len(rows), *rows], "<i8").tobytes()
    content = head + sealing.digest(version, head) + records.tobytes()
    sealing.write_whole(self._file_of(version), content)

  def is_whole(self, version: int) -> bool:
    """Whether a log and all of its records are what was written."""
    try:
      log = self._log(version)
      with open(self._file_of(version), "rb") as file:
        for i, row in enumerate(log.rows.tolist()):
          record, at = np.zeros(self._size, np.uint8), log.start
          at += i * self._size
          if self._get(file.fileno(), record, at, row) != WRITTEN:
            return False
    except (DamagedRowsError, FileNotFoundError):
      return False
    return True

  def drop_after(self, version: int) -> None:
    """Deletes the logs of later versions, the newest first."""
    for newer in reversed(self.versions()):
      if newer > version:
        self._file_of(newer).unlink()

  def merge(self, version: int) -> None:
    """Makes a version the floor: its logs go into `rows`.

    One that is killed leaves the new floor with logs before it, which the next
    merges again.

    Raises:
      DamagedRowsError: A damaged log; what it says is not taken over.
    """
    dropped = [v for v in self.versions() if v <= version]
    if not dropped:
      return
    for old in dropped:
      if not self.is_whole(old):
        raise DamagedRowsError(f"{self._file_of(old)}: is damaged")
    floor, content = self.floor(), self.description()
    if content is not None and floor < dropped[-1]:
      self._describe(content["store"], dropped[-1])
    for old in dropped:
      log = self._log(old)
      with open(self._file_of(old), "rb") as file:
        file.seek(log.start)
        for row in log.rows.tolist():
          self.put(row, np.frombuffer(file.read(self._size), np.uint8))
    os.fsync(self._file)
    for old in dropped:
      self._file_of(old).unlink()

  def put(self, row: int, record: np.ndarray) -> None:
    """Writes a record into `rows`."""
    if os.pwrite(self._file, record.data, row * self._size) != self._size:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  def mend(self, other: "RowFiles", rows: np.ndarray | None = None) -> None:
    """Replaces what is damaged or missing here by what the other copy has.

    Args:
      other: The other copy, opened.
      rows: Whose records in `rows` are compared too, [n].
    """
    theirs = other.description()
    if theirs is None or not other._is_of_right_length():
      return
    ours = self.description()
    is_open = self.open(read_only=False)
    if ours is None or not is_open or not (self.folder / "logs").is_dir():
      self._copy_rows(other)
      self._tell("store.json" if ours is None else "rows", other)
      self._describe(theirs["store"], theirs["floor"])
      ours = theirs
    for version in other.versions():
      later = version > ours["floor"]
      if later and not self.is_whole(version) and other.is_whole(version):
        content = other._file_of(version).read_bytes()
        sealing.write_whole(self._file_of(version), content)
        self._tell(f"logs/{version}", other)
    if rows is None or ours["floor"] != theirs["floor"]:
      return
    for row in rows.tolist():
      record, there = other.from_rows(row)
      if self.from_rows(row)[1] < there:
        self.put(row, record)
        self._tell(f"rows, client {row}", other)
    os.fsync(self._file)

  def _is_of_right_length(self) -> bool:
    expected = self._num_rows * self._size
    return self._file >= 0 and os.fstat(self._file).st_size == expected

  def _tell(self, what: str, other: "RowFiles") -> None:
    _LOG.warning(
      "%s: %s was damaged or missing; taken from the copy in %s",
      self.folder,
      what,
      other.folder,
    )

  def _copy_rows(self, other: "RowFiles") -> None:
    """Copies the file of rows, without its holes."""
    (self.folder / "logs").mkdir(parents=True, exist_ok=True)
    size = self._num_rows * self._size
    part = self.folder / "rows.tmp"
    with open(part, "wb") as file:
      file.truncate(size)
      at = 0
      while at < size:
        try:
          at = os.lseek(other._file, at, os.SEEK_DATA)
        except OSError as e:
          if e.errno != errno.ENXIO:  # Only a hole is left.
            raise
          break
        file.seek(at)
        at += file.write(os.pread(other._file, _CHUNK, at))
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, self.folder / "rows")
    self.open(read_only=False)

  def _file_of(self, version: int) -> pathlib.Path:
    return self.folder / "logs" / str(version)

  def _log(self, version: int) -> Log:
    """Reads the head of a log."""
    path = self._file_of(version)
    try:
      with open(path, "rb") as file:
        start = file.read(16)
        previous, count = np.frombuffer(start, "<i8").tolist()
        if not 0 <= count <= self._num_rows:
          raise ValueError
        head = start + file.read(8 * count)
        digest = file.read(DIGEST)
    except FileNotFoundError as e:
      raise DamagedRowsError(f"{path}: is missing") from e
    except ValueError as e:
      raise DamagedRowsError(f"{path}: is damaged") from e
    if digest != sealing.digest(version, head):
      raise DamagedRowsError(f"{path}: is damaged")
    return Log(version, previous, np.frombuffer(head, "<i8")[2:])

  def _get(self, file: int, record: np.ndarray, at: int, row: int) -> int:
    """Reads one record; DAMAGED, EMPTY or WRITTEN."""
    if os.preadv(file, [record.data], at) != self._size:
      return DAMAGED
    digest = record[:DIGEST]
    if not digest.any():
      return EMPTY
    is_right = digest.tobytes() == sealing.digest(row, record[DIGEST:])
    return WRITTEN if is_right else DAMAGED

  def _describe(self, store: dict[str, Any], floor: int) -> None:
    content = {"store": store, "floor": floor}
    text = json.dumps(content | {"digest": sealing.json_digest(content)})
    sealing.write_whole(self.folder / "store.json", text.encode())
