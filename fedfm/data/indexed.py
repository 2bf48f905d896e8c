"""Very large populations in a JSON Lines file, found by an index beside it.

The index is made by one pass and then stays: clients' names (`id_file`), how
many lines each has, and where they begin. All of it is mapped, so that a run
of a million clients starts at once and holds none of their names. The lines of
a client must follow each other.
"""

from collections.abc import Iterator, Sequence
import os
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np

from fedfm import errors
from fedfm.data import files, holdout, id_file, json_rows
from fedfm.data.source import (
  ClientSource,
  Examples,
  FederatedData,
  KnownIds,
  subset,
)


def from_indexed_jsonl(
  path: str | os.PathLike,
  index: str | os.PathLike,
  client_key: str,
  text_key: str | Sequence[str],
  **options: Any,
) -> ClientSource:
  """Makes a source of a JSON Lines file by its index, made if missing.

  Args:
    path: A file in UTF-8, not compressed, each client's lines together.
    index: The index's folder; it must not be moved to another file.
    client_key: The key of the client's id, a string.
    text_key: As in `from_jsonl`.
    **options: Likewise.

  Returns:
    A `ClientSource` in the file's order whose names stay on disk; reads are
    those of `from_jsonl`.

  Raises:
    DataError: What `from_jsonl` refuses, when the index is made; a client whose
      lines are apart; or an index that is damaged or of another file.
  """
  path, folder = os.fspath(path), pathlib.Path(index)
  row_format = files.make_row_format(client_key, text_key, **options)
  if not folder.exists():
    _write(path, folder, row_format)
  ids = id_file.IdFile(folder / "ids")
  try:
    begins = np.load(folder / "begins.npy", mmap_mode="r", allow_pickle=False)
    counts = np.load(folder / "counts.npy", mmap_mode="r", allow_pickle=False)
    size = os.path.getsize(path)
  except (OSError, ValueError) as e:
    raise errors.DataError(f"data.index: {folder}: {e}") from None
  if (len(begins), len(counts)) != (len(ids) + 1, len(ids)) or (
    begins[-1] != size
  ):
    raise errors.DataError(
      f"data.index: {folder} is of {len(begins) - 1} clients in {begins[-1]} "
      f"bytes, but {path} has {size}; remove it to index the file anew"
    )

  def row(client_id: str) -> int:
    found = ids.row(client_id)
    assert found is not None  # The source knows its clients.
    return found

  def read(client_id: str) -> Examples:
    at = row(client_id)
    begin, end = int(begins[at]), int(begins[at + 1])
    with open(path, "rb") as file:
      file.seek(begin)
      lines = file.read(end - begin).splitlines()
    where = f"{path}, client {client_id!r}"
    rows = [row_format.parse(x, where) for x in lines if x.strip()]
    if len(rows) != counts[at] or any(own != client_id for own, _ in rows):
      raise errors.DataError(f"{where}: the file changed since it was indexed")
    return row_format.columns([values for _, values in rows])

  return ClientSource(ids, lambda client_id: int(counts[row(client_id)]), read)


def _write(
  path: str, folder: pathlib.Path, row_format: json_rows.RowFormat
) -> None:
  """Indexes a file; whoever is first of several processes leaves its own."""
  begins, counts = [], []

  def names() -> Iterator[str]:
    last, is_empty = None, False
    for offset, where, line in files.lines(path, compressed=False):
      client_id, values = row_format.parse(line, where)
      if client_id != last:
        _check_text(path, last, is_empty)
        begins.append(offset)
        counts.append(0)
        yield client_id
        is_empty = True
      last = client_id
      counts[-1] += 1
      texts = values[: len(row_format.texts)]
      is_empty = is_empty and not (any(texts) or row_format.tokens)
    _check_text(path, last, is_empty)

  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
    parts = pathlib.Path(parent) / "index"
    try:
      id_file.write(parts / "ids", names())
    except errors.DataError as e:
      if "is repeated" in str(e):
        raise errors.DataError(
          f"{path}: {e}; the lines of a client must follow each other"
        ) from None
      raise
    begins.append(os.path.getsize(path))
    np.save(parts / "begins.npy", np.array(begins, np.int64))
    np.save(parts / "counts.npy", np.array(counts, np.int64))
    try:
      parts.rename(folder)
    except OSError:
      if not folder.exists():
        raise
      shutil.rmtree(parts)


def _check_text(path: str, client_id: str | None, is_empty: bool) -> None:
  if is_empty:
    raise errors.DataError(f"{path}: client {client_id!r}: has no text")


class Chosen(KnownIds):
  """Some of the names of an `IdFile`, in its order; holds their rows only.

  Args:
    ids: All names.
    rows: Which, ascending.
  """

  def __init__(self, ids: id_file.IdFile, rows: np.ndarray):
    self._ids, self._rows = ids, rows

  def __len__(self) -> int:
    return len(self._rows)

  def name(self, row: int) -> str:
    """Reads the name in a row."""
    return self._ids[int(self._rows[row])]

  def row(self, client_id: Any) -> int | None:
    """Returns the row of a client, or None."""
    found = self._ids.row(client_id)
    if found is None:
      return None
    at = int(np.searchsorted(self._rows, found))
    known = at < len(self._rows) and self._rows[at] == found
    return at if known else None


def hold_out(
  source: ClientSource,
  unseen_fraction: float,
  heldout_fraction: float,
  max_clients: int,
) -> FederatedData:
  """Splits a population as `holdout.hold_out` does, and names few clients.

  Args:
    source: From `from_indexed_jsonl`.
    unseen_fraction: Share of clients that are never trained on: those whose
      names have the least hashes.
    heldout_fraction: Share of examples held out in each training client.
    max_clients: Clients to evaluate on in each population, evenly spaced in the
      file's order; of training clients, those with examples to hold out.

  Returns:
    `train`, and `evals` "seen" and "unseen", each where it is not empty.

  Raises:
    ConfigError: Nothing would be left to train on.
  """
  ids = source.ids
  assert isinstance(ids, id_file.IdFile)
  num_unseen = int(round(unseen_fraction * len(ids)))
  if num_unseen >= len(ids):
    raise errors.ConfigError(
      f"data.unseen_fraction: {unseen_fraction} of {len(ids)} clients leaves "
      "none to train on"
    )
  seen = Chosen(ids, np.sort(ids.rows[num_unseen:]))
  unseen = Chosen(ids, np.sort(ids.rows[:num_unseen]))
  train, held_out = holdout.split_examples(source, seen, heldout_fraction)
  with_held_out = [i for i in _spread(seen, max_clients) if held_out.size(i)]
  evals = {}
  if with_held_out:
    evals["seen"] = subset(held_out, with_held_out)
  if num_unseen:
    evals["unseen"] = subset(source, _spread(unseen, max_clients))
  return FederatedData(train=train, evals=evals)


def _spread(ids: KnownIds, count: int) -> list[str]:
  """At most `count` of the names, evenly spaced."""
  at = np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int)
  return [ids[int(i)] for i in at]
