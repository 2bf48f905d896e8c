"""Names of very large populations, in files that are mapped and not read.

A million names take a hundred megabytes as Python strings, and seconds to index
when a run starts. Here they lie one after the other in a file, and are found by
the sorted hashes in another:

  id_file.write(folder, names)
  source = data.ClientSource(id_file.IdFile(folder), size_fn, read_fn)
"""

from collections.abc import Iterable
import hashlib
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

from fedfm import errors
from fedfm.data.source import KnownIds, check_id


def write(folder: str | os.PathLike, ids: Iterable[str]) -> None:
  """Writes the names of a population; reads them one at a time.

  Args:
    folder: Where to, a new folder.
    ids: The names, in the order of the clients' rows.

  Raises:
    DataError: No name, one that is repeated or bad, or a folder that exists.
  """
  path = pathlib.Path(folder)
  if path.exists():
    raise errors.DataError(f"ids: {path} exists, expected a new folder")
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as parent:
    parts = pathlib.Path(parent) / "ids"
    parts.mkdir()
    _write_files(parts, ids)
    _check_unique(IdFile(parts))
    parts.rename(path)


def _write_files(folder: pathlib.Path, ids: Iterable[str]) -> None:
  ends, hashes = [0], []
  with open(folder / "names.bin", "wb") as file:
    for client_id in ids:
      check_id(client_id)
      name = client_id.encode()
      file.write(name)
      ends.append(ends[-1] + len(name))
      hashes.append(_hash(name))
  if not hashes:
    raise errors.DataError("client ids: got none, expected at least 1 client")
  hashed = np.array(hashes, np.uint64)
  rows = np.argsort(hashed, kind="stable")
  np.save(folder / "ends.npy", np.array(ends, np.int64))
  np.save(folder / "hashes.npy", hashed[rows])
  np.save(folder / "rows.npy", rows.astype(np.int64))


def _check_unique(ids: "IdFile") -> None:
  """Raises DataError for a name that is there twice: its hash is, too."""
  same = np.flatnonzero(ids.hashes[1:] == ids.hashes[:-1])
  for row in ids.rows[np.union1d(same, same + 1)].tolist():
    if ids.row(ids[row]) != row:
      raise errors.DataError(
        f"client ids: {ids[row]!r} is repeated, expected unique ids"
      )


class IdFile(KnownIds):
  """Names that `write` wrote; holds none of them in memory.

  Args:
    folder: The folder.

  Attributes:
    hashes: Of all names, sorted, uint64 [clients].
    rows: The client of each hash, int64 [clients].

  Raises:
    DataError: Files that are missing, damaged or do not go together.
  """

  def __init__(self, folder: str | os.PathLike):
    path = pathlib.Path(folder)
    try:
      self._ends, self.hashes, self.rows = (
        np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in ("ends", "hashes", "rows")
      )
      self._names = np.memmap(path / "names.bin", np.uint8, "r")
    except (OSError, ValueError) as e:
      raise errors.DataError(f"ids: {path}: {e}") from None
    count = len(self._ends) - 1
    sizes = len(self.hashes), len(self.rows), len(self._names)
    if sizes != (count, count, int(self._ends[-1])):
      raise errors.DataError(
        f"ids: {path}: files of {sizes} hashes, rows and bytes, expected "
        f"{(count, count, int(self._ends[-1]))}"
      )

  def __len__(self) -> int:
    return len(self.rows)

  def name(self, row: int) -> str:
    """Reads the name in a row."""
    return self._names[self._ends[row] : self._ends[row + 1]].tobytes().decode()

  def row(self, client_id: Any) -> int | None:
    """Returns the row of a client, or None."""
    if not isinstance(client_id, str):
      return None
    name = client_id.encode(errors="replace")
    value = np.uint64(_hash(name))
    begin = int(np.searchsorted(self.hashes, value))
    end = int(np.searchsorted(self.hashes, value, side="right"))
    for row in self.rows[begin:end].tolist():
      if self[row] == client_id:
        return row
    return None


def _hash(name: bytes) -> int:
  return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
