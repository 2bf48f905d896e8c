"""The client store of a large population: rows in files, read as needed.

100,000 adapters do not fit a device. Here they are records of a file, which
takes disk space only for clients that took part, and a round reads and writes
those of its cohort. Files are read and written rather than mapped to memory: a
full disk is then an error and not the end of the process.

Logs make it one with the checkpoints of the run: a round's rows go into a log
of its own, a checkpoint holds only the store's version, and going back to a
version drops the logs after it. Everything is there twice, in two folders; what
is damaged in one is replaced by what the other has.
"""

from collections.abc import Callable
import errno
import logging
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np

from fedfm import errors, trees
from fedfm.clients import row_files, sealing
from fedfm.clients.row_files import DAMAGED, WRITTEN
from fedfm.clients.sealing import DIGEST, DamagedRowsError

PyTree = Any
_FORMAT = 2
COPIES = ("first", "second")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_TRIES = 5  # Of a reader, beside a writer that drops logs.
_LOG = logging.getLogger("fedfm")


class HostStore:
  """States of a population's clients in a folder; one process writes it."""

  def __init__(
    self,
    folder: str | pathlib.Path,
    client_state: PyTree,
    num_clients: int,
    *,
    read_only: bool = False,
    may_create: bool = True,
    oldest: Callable[[], int] = lambda: 0,
  ):
    """Opens a store, or makes one in which nobody took part.

    Args:
      folder: Its own folder.
      client_state: State of a client that never took part, a tree of arrays;
        that of a store that is there already holds instead, if it is like it.
      num_clients: Size of the population.
      read_only: For a reader beside the process that writes.
      may_create: Whether a new one will do where none is.
      oldest: The oldest version that may be gone back to, asked at each write.

    Raises:
      CheckpointError: A folder that is missing, cannot be read or written, or
        holds a store of other states.
      SaveError: A full disk, for example.
    """
    self._folder = pathlib.Path(folder)
    self._read_only = read_only
    self._oldest = oldest
    self.num_clients = num_clients
    leaves, self._treedef = jax.tree.flatten(client_state)
    leaves = [np.asarray(x) for x in leaves]
    self._specs = [(x.dtype, x.shape) for x in leaves]
    self._given = _as_bytes([x[None] for x in leaves])[0]
    self._size = DIGEST + self._given.size
    self._meta = {
      "format": _FORMAT,
      "num_clients": num_clients,
      "leaves": {
        path: [x.dtype.name, list(x.shape)]
        for path, x in zip(trees.paths(client_state), leaves)
      },
    }
    self._copies = self._at(self._folder)
    try:
      if not read_only and not self._folder.exists():
        if not may_create:
          raise errors.CheckpointError(
            f"{self._folder}: is missing, but checkpoints of this run need the "
            "clients' states that it held"
          )
        self._create()
      self._open()
    except OSError as e:
      error = self._error(e)
      raise (errors.SaveError(error) if e.errno in _DISK else error) from e

  def _at(self, folder: pathlib.Path) -> list[row_files.RowFiles]:
    # The last row is the state of a client that never took part.
    rows = self.num_clients + 1
    return [
      row_files.RowFiles(folder / name, rows, self._size) for name in COPIES
    ]

  def _create(self) -> None:
    """Makes a new store, and puts it in the place of the old one, if any."""
    new = self._folder.with_name(self._folder.name + ".new")
    old = self._folder.with_name(self._folder.name + ".old")
    for left in (new, old):
      shutil.rmtree(left, ignore_errors=True)
    initial = np.zeros(self._size, np.uint8)
    initial[DIGEST:] = self._given
    sealing.seal(self.num_clients, initial)
    for copy in self._at(new):
      copy.create(self._meta)
      copy.open(read_only=False)
      copy.put(self.num_clients, initial)
      copy.close()
    if self._folder.exists():
      self._folder.rename(old)
    new.rename(self._folder)
    shutil.rmtree(old, ignore_errors=True)

  def _open(self) -> None:
    found = [copy.description() for copy in self._copies]
    known = [x["store"] for x in found if x is not None]
    if not known:
      raise errors.CheckpointError(
        f"{self._folder}: holds no intact store.json of clients' states"
      )
    if any(x != self._meta for x in known):
      raise errors.CheckpointError(
        f"{self._folder}: holds client states of {known[0]}, expected "
        f"{self._meta}"
      )
    is_open = [copy.open(self._read_only) for copy in self._copies]
    if not any(is_open):
      raise errors.CheckpointError(
        f"{self._folder}: both files of rows are missing or cut off"
      )
    last = self.num_clients
    if not self._read_only:
      first, second = self._copies
      first.mend(second, np.array([last]))
      second.mend(first, np.array([last]))
      self._merge(max(copy.floor() for copy in self._copies))
    self._newest = self._find_newest()
    found = [copy.from_rows(last) for copy in self._copies]
    whole = [record for record, what in found if what == WRITTEN]
    if not whole:
      raise DamagedRowsError(
        f"{self._folder}: the state of new clients is damaged in both copies"
      )
    self._initial = whole[0][DIGEST:]

  def _on_both(self, do: Callable[[row_files.RowFiles], Any]) -> None:
    """Does something to both copies, mended where it takes that."""
    first, second = self._copies
    for copy, other in ((first, second), (second, first)):
      try:
        do(copy)
      except DamagedRowsError:
        copy.mend(other)
        do(copy)

  def _find_newest(self) -> int:
    versions = [v for copy in self._copies for v in copy.versions()]
    floors = [c.floor() for c in self._copies if c.description() is not None]
    return max(versions + floors)

  @property
  def initial(self) -> PyTree:
    """The state of a client that never took part."""
    return jax.tree.map(lambda x: x[0], self._as_tree(self._initial[None]))

  def close(self) -> None:
    """Closes the files; closing twice is fine."""
    for copy in self._copies:
      copy.close()

  def read(self, rows: np.ndarray, version: int | None = None) -> PyTree:
    """Reads the states of some clients.

    Args:
      rows: [n], rows of the population.
      version: Read as of this version, for readers beside a writer; default
        the newest.

    Returns:
      A tree like a client's state, of NumPy arrays [n, ...].

    Raises:
      DamagedRowsError: A row that is damaged in both copies.
      CheckpointError: A version that is no longer known.
    """
    rows = np.asarray(rows, np.int64).reshape(-1)
    try:
      records = self._records(rows, version)
    except OSError as e:
      raise self._error(e) from e
    records[~records[:, :DIGEST].any(axis=1), DIGEST:] = self._initial
    return self._as_tree(records[:, DIGEST:])

  def check(self, version: int) -> None:
    """Checks that a version is here, whole but for the oldest rows.

    Args:
      version: As of a `write`; 0 always is, as a new store will do.

    Raises:
      DamagedRowsError: What leads to it is damaged or missing in both copies.
      CheckpointError: A version that is no longer known.
    """
    problem = None
    for copy in self._copies if version else ():
      try:
        for log in copy.logs(version):
          if not copy.is_whole(log.version):
            raise DamagedRowsError(
              f"{copy.folder}/logs/{log.version}: is damaged"
            )
        return
      except DamagedRowsError as e:
        problem = problem or e
      except OSError as e:
        raise self._error(e) from e
    if problem is not None:
      raise problem

  def damage(self, rows: np.ndarray, version: int) -> list[str]:
    """Names what is damaged in one copy of some rows, as of a version.

    Raises:
      DamagedRowsError: A row that is damaged in both copies.
      CheckpointError: A version that is no longer known.
    """
    rows = np.asarray(rows, np.int64).reshape(-1)
    first, second = [self._found(c, rows, version) for c in self._copies]
    problem = first.problem or second.problem
    self._refuse(rows, np.maximum(first.found, second.found), problem)
    named = []
    for copy, own, other in (
      (self._copies[0], first, second),
      (self._copies[1], second, first),
    ):
      named += [
        f"{copy.folder}: the state of client {row} is damaged"
        for row in rows[own.found < other.found].tolist()
      ]
    both = (first.found == WRITTEN) & (second.found == WRITTEN)
    differ = (first.records != second.records).any(axis=1)
    named += [
      f"{self._folder}: the copies of the state of client {row} differ"
      for row in rows[both & differ].tolist()
    ]
    return named

  def write(self, rows: np.ndarray, states: PyTree, version: int) -> None:
    """Writes the states of some clients, so that it can be undone.

    Args:
      rows: [n], rows of the population, each once.
      states: A tree like a client's state, of arrays [n, ...].
      version: Of the store after this; above all before it.

    Raises:
      SaveError: The disk is full, for example; `roll_back` undoes what was
        written of it.
    """
    rows = np.asarray(rows, np.int64).reshape(-1)
    content = _as_bytes([np.asarray(x) for x in jax.tree.leaves(states)])
    new = np.zeros((len(rows), self._size), np.uint8)
    new[:, DIGEST:] = content
    for row, record in zip(rows.tolist(), new):
      sealing.seal(row, record)
    try:
      changed = (self._records(rows) != new).any(axis=1)
      try:
        for copy in self._copies:
          copy.write(version, self._newest, rows[changed], new[changed])
      except OSError:  # It may hold the last free bytes.
        self._copies[0].drop_after(self._newest)
        raise
      self._newest = version
      self._merge(self._oldest())
    except OSError as e:
      raise errors.SaveError(self._error(e)) from e

  def roll_back(self, version: int) -> None:
    """Undoes everything that was written after a version.

    Args:
      version: As of a `write`; 0 is the store in which nobody took part.

    Raises:
      DamagedRowsError: The version is missing.
      CheckpointError: The version is no longer known.
      SaveError: The store cannot be written.
    """
    if version == self._newest:
      return
    try:
      self._on_both(lambda copy: copy.floor())
      if version == 0 and any(copy.floor() > 0 for copy in self._copies):
        self.close()
        self._create()
        self._open()
        return
      self._on_both(lambda copy: copy.logs(version))
      self._on_both(lambda copy: copy.drop_after(version))
      self._newest = version
    except OSError as e:
      raise errors.SaveError(self._error(e)) from e

  def _merge(self, version: int) -> None:
    """Forgets what it takes to go back further than to a version."""
    self._on_both(lambda copy: copy.merge(version))

  def _records(
    self, rows: np.ndarray, version: int | None = None
  ) -> np.ndarray:
    """The records of rows [n], of the copy where they are whole."""
    for left in reversed(range(_TRIES if self._read_only else 1)):
      as_of = self._find_newest() if self._read_only else self._newest
      as_of = as_of if version is None else version
      first, second = self._copies
      best = self._found(first, rows, as_of)
      unsure = np.flatnonzero(best.found < WRITTEN)
      if not len(unsure):
        return best.records
      other = self._found(second, rows[unsure], as_of)
      better = other.found > best.found[unsure]
      at = unsure[better]
      best.records[at] = other.records[better]
      best.found[at] = other.found[better]
      if not left or not (best.found == DAMAGED).any():
        self._refuse(rows, best.found, best.problem or other.problem)
        if len(at):
          self._mend_first(rows[at])
        return best.records
    raise AssertionError

  def _mend_first(self, rows: np.ndarray) -> None:
    first, second = self._copies
    if not self._read_only:
      first.mend(second, rows)
      return
    _LOG.warning(
      "%s: the states of clients %s are damaged; those in %s are used",
      first.folder,
      rows.tolist(),
      second.folder,
    )

  def _found(self, copy, rows: np.ndarray, version: int) -> "_Found":
    try:
      return _Found(*copy.read(rows, version))
    except DamagedRowsError as e:
      nothing = np.zeros((len(rows), self._size), np.uint8)
      return _Found(nothing, np.full(len(rows), DAMAGED), e)

  def _refuse(
    self, rows: np.ndarray, found: np.ndarray, why: DamagedRowsError | None
  ) -> None:
    """Raises if the best that was found of a row is damaged."""
    bad = np.flatnonzero(found == DAMAGED)
    if len(bad):
      raise DamagedRowsError(
        f"{self._folder}: the state of client {rows[bad[0]]} is damaged in "
        f"both copies{f': {why}' if why else ''}"
      )

  def _as_tree(self, content: np.ndarray) -> PyTree:
    leaves, at = [], 0
    for dtype, shape in self._specs:
      size = dtype.itemsize * int(np.prod(shape))
      part = np.ascontiguousarray(content[:, at : at + size])
      leaves.append(part.view(dtype).reshape(len(content), *shape))
      at += size
    return self._treedef.unflatten(leaves)

  def _error(self, error: OSError) -> errors.CheckpointError:
    return errors.CheckpointError(f"{self._folder}: {error.strerror or error}")


class _Found(NamedTuple):
  """What a copy has of some rows: see `RowFiles.read`."""

  records: np.ndarray
  found: np.ndarray
  problem: DamagedRowsError | None = None


def _as_bytes(leaves: list[np.ndarray]) -> np.ndarray:
  """Puts leaves [n, ...] side by side as bytes [n, bytes]."""
  return np.concatenate(
    [
      np.ascontiguousarray(x).reshape(len(x), -1).view(np.uint8) for x in leaves
    ],
    axis=1,
  )
