"""Populations stored in files: JSON, one or many, and TFDS data sets."""

import array
from collections.abc import Iterator, Sequence
import contextlib
import gzip
import os
import pathlib
import re
from typing import Any
import zlib

import numpy as np

from fedfm import errors
from fedfm.data import json_rows, source

ClientSource = source.ClientSource
Examples = source.Examples


def from_jsonl(
  path: str | os.PathLike[str],
  client_key: str,
  text_key: str | Sequence[str],
  *,
  required: Sequence[str] = (),
  token_key: str | None = None,
  label_key: str | None = None,
  category_key: str | None = None,
) -> ClientSource:
  """Makes a source from a file with one JSON object a line.

  One pass indexes and checks the file; later reads seek to a client's lines.
  A file that ends in `.gz` cannot be sought in, so its text stays in memory.

  Args:
    path: A `.jsonl` or `.jsonl.gz` file in UTF-8; blank lines are skipped.
    client_key: The key of the client's id, a string; "" for one client, "all".
    text_key: The key of the example's text, a string; or several.
    required: Those of the text's keys whose text may not be empty.
    token_key: A key of a list of token ids, or None.
    label_key: A key of a label, an integer of at least 0, or None.
    category_key: A key of a string or an integer, read as text, or None.

  Returns:
    A `ClientSource` in order of first appearance; reads are {key: object array
    [examples] of str, or of int32 [tokens]} and {label_key: int64 [examples]},
    in the file's order.

  Raises:
    DataError: A file that cannot be read or has no rows, a line that is not a
      JSON object with all of this (says which line), or a client whose texts
      are all empty.
  """
  path = os.fspath(path)
  row_format = make_row_format(
    client_key, text_key, required, token_key, label_key, category_key
  )
  compressed = path.endswith(".gz")
  # Byte offsets, or the values themselves where the file cannot be sought in.
  rows: dict[str, Any] = {}
  empty: dict[str, None] = {}
  for offset, where, line in lines(path, compressed):
    client_id, values = row_format.parse(line, where)
    if any(values[: len(row_format.texts)]) or row_format.tokens:
      empty.pop(client_id, None)
    elif client_id not in rows:
      empty[client_id] = None
    if compressed:
      rows.setdefault(client_id, []).append(values)
    else:
      rows.setdefault(client_id, array.array("q")).append(offset)
  if not rows:
    raise errors.DataError(f"{path}: got no rows, expected at least 1")
  for client_id in empty:
    raise errors.DataError(f"{path}: client {client_id!r}: has no text")

  def read_rows(client_id: str) -> list[list[Any]]:
    if compressed:
      return rows[client_id]
    found = []
    try:
      with open(path, "rb") as file:
        for offset in rows[client_id]:
          file.seek(offset)
          where = f"{path}, byte {offset}"
          found_id, values = row_format.parse(file.readline(), where)
          if found_id != client_id:
            raise errors.DataError(
              f"{where}: got client {found_id!r}, expected {client_id!r}; the"
              " file changed since it was indexed"
            )
          found.append(values)
    except OSError as e:
      raise _unreadable(path, e) from None
    return found

  def read(client_id: str) -> Examples:
    return row_format.columns(read_rows(client_id))

  return ClientSource(tuple(rows), lambda c: len(rows[c]), read)


def from_files(
  directory: str | os.PathLike[str],
  pattern: str,
  text_key: str | Sequence[str],
  *,
  required: Sequence[str] = (),
  token_key: str | None = None,
  category_key: str | None = None,
) -> ClientSource:
  """Makes a source of a folder in which every file is a client.

  Args:
    directory: The folder.
    pattern: Which of its files, such as "local_training_*.json"; each holds a
      JSON array of objects (.json), or one object a line (any other name).
    text_key: As in `from_jsonl`.
    required: Likewise.
    token_key: Likewise.
    category_key: Likewise.

  Returns:
    A `ClientSource` whose ids are the files' names without what follows the
    last dot, in the order of the numbers and letters in them; reads as those of
    `from_jsonl`.

  Raises:
    DataError: No such file, two of one id, a file that cannot be read or has no
      rows, or a row that is malformed (says which).
  """
  row_format = make_row_format(
    "", text_key, required, token_key, category_key=category_key
  )
  folder = pathlib.Path(directory)
  if not folder.is_dir():
    raise errors.DataError(f"{folder}: is not a folder")
  try:
    files = sorted(filter(pathlib.Path.is_file, folder.glob(pattern)))
  except (ValueError, NotImplementedError):
    files = []
  if not files:
    raise errors.DataError(f"{folder}: holds no file {pattern!r}")
  by_id: dict[str, pathlib.Path] = {}
  for file in sorted(files, key=_natural):
    if file.stem in by_id:
      raise errors.DataError(
        f"{file}: is the client {file.stem!r} as {by_id[file.stem].name} is"
      )
    by_id[file.stem] = file

  def rows_of(client_id: str) -> list[list[Any]]:
    file = by_id[client_id]
    return [row_format.check(x, at)[1] for at, x in _objects(file)]

  sizes = {client_id: len(rows_of(client_id)) for client_id in by_id}
  for client_id, size in sizes.items():
    if not size:
      raise errors.DataError(
        f"{by_id[client_id]}: got no rows, expected at least 1"
      )

  def read(client_id: str) -> Examples:
    rows = rows_of(client_id)
    if len(rows) != sizes[client_id]:
      raise errors.DataError(
        f"{by_id[client_id]}: got {len(rows)} rows, expected "
        f"{sizes[client_id]}; the file changed since it was indexed"
      )
    return row_format.columns(rows)

  return ClientSource(tuple(by_id), sizes.__getitem__, read)


def make_row_format(
  client_key: str,
  text_key: str | Sequence[str],
  required: Sequence[str] = (),
  token_key: str | None = None,
  label_key: str | None = None,
  category_key: str | None = None,
) -> json_rows.RowFormat:
  """What a line must hold, by the arguments of `from_jsonl`."""
  return json_rows.RowFormat(
    client_key=client_key,
    texts=(text_key,) if isinstance(text_key, str) else tuple(text_key),
    required=tuple(required),
    tokens=() if token_key is None else (token_key,),
    labels=() if label_key is None else (label_key,),
    categories=() if category_key is None else (category_key,),
  )


def _natural(path: pathlib.Path) -> list[Any]:
  """Sorts client_2 before client_10."""
  parts = re.split("([0-9]+)", path.name)
  return [(int(x), "") if x.isdigit() else (-1, x) for x in parts]


def _objects(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Yields ("file:place", row) of a JSON array, or of a file of lines."""
  if path.suffix != ".json":
    compressed = path.suffix == ".gz"
    for _, where, line in lines(os.fspath(path), compressed):
      yield where, json_rows.loads(line, where)
    return
  try:
    content = path.read_bytes()
  except OSError as e:
    raise _unreadable(path, e) from None
  rows = json_rows.loads(content, str(path))
  if not isinstance(rows, list):
    raise errors.DataError(
      f"{path}: got a JSON {type(rows).__name__}, expected an array of objects"
    )
  for index, row in enumerate(rows):
    yield f"{path}, row {index}", row


def lines(path: str, compressed: bool) -> Iterator[tuple[int, str, bytes]]:
  """Yields (byte offset, "file:line", line) of the lines that are not blank."""
  offset = 0
  try:
    with (gzip.open if compressed else open)(path, "rb") as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          yield offset, f"{path}:{number}", line
        offset += len(line)
  except (OSError, EOFError, ValueError, zlib.error) as e:
    raise _unreadable(path, e) from None


def _unreadable(
  path: str | os.PathLike[str], error: Exception
) -> errors.DataError:
  reason = getattr(error, "strerror", None) or str(error)
  return errors.DataError(f"{path}: cannot be read: {reason}")


def from_tfds(
  name: str,
  split: str,
  client_key: str,
  data_dir: str | os.PathLike | None = None,
  fields: Sequence[str] | None = None,
  label_key: str | None = None,
  num_classes: int = 0,
) -> ClientSource:
  """Makes a source of a prepared TFDS data set, without TensorFlow.

  One pass reads the client of every record, and checks the labels that the data
  set itself does not bound; later reads fetch a client's records by their
  index. Nothing is downloaded.

  Args:
    name: The data set, e.g. `"federated_emnist/digits:1.0.0"`.
    split: The split, e.g. `"train"` or `"train[:10%]"`.
    client_key: The feature that names the client, a string or an integer; it
      is left out of what is read. "" for one client, "all".
    data_dir: Where TFDS keeps its data; default as TFDS.
    fields: Which features to read; default all.
    label_key: The feature of labels in [0, num_classes), or None.
    num_classes: The model's classes.

  Returns:
    A `ClientSource` in order of first appearance; strings are read as bytes.

  Raises:
    DataError: A data set that is unknown, not prepared or not in ArrayRecord
      files, an unknown split or feature, labels that are no such integers, or
      examples of different shapes.
  """
  # Takes 0.7 s to import, which users of other sources need not wait for.
  import tensorflow_datasets as tfds

  where = f"TFDS data set {name!r}"
  data_dir = None if data_dir is None else os.fspath(data_dir)
  with _data_errors(f"{where}: cannot be opened in data_dir {data_dir}"):
    builder = tfds.builder(name, data_dir=data_dir)
  if not builder.is_prepared():
    raise errors.DataError(
      f"{where}: not prepared in {builder.data_dir}; prepare it first with"
      " tfds.builder(...).download_and_prepare(file_format='array_record')"
    )
  array_record = tfds.core.FileFormat.ARRAY_RECORD
  if array_record not in builder.info.available_file_formats():
    raise errors.DataError(
      f"{where}: files are {builder.info.file_format.value}, but without"
      " TensorFlow only array_record is read; prepare it again with"
      " file_format='array_record'"
    )
  with _data_errors(f"{where}: split {split!r}"):
    records: Any = builder.as_data_source(
      # pyrefly: ignore[bad-argument-type]
      split,
      deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
      file_format=array_record,
    )
  features = builder.info.features
  if fields is None:
    fields = [key for key in features if key != client_key]
  for key in (client_key, *fields, label_key):
    if key and key not in features:
      raise errors.DataError(
        f"{where}: no feature {key!r}{errors.nearest(key, features)}"
      )
  checked = label_key
  if label_key:
    known = getattr(features[label_key], "num_classes", None)
    if known is not None and known > num_classes:
      raise errors.DataError(
        f"{where}: feature {label_key!r} has {known} classes, but the model has"
        f" {num_classes}"
      )
    checked = label_key if known is None else None
  # Features that are not asked for (images, say) are never decoded.
  indexed = [key for key in (client_key, checked) if key]
  only_indexed: Any = tfds.features.FeaturesDict(
    {key: features[key] for key in indexed}
  )
  only_fields: Any = tfds.features.FeaturesDict(
    {k: features[k] for k in fields}
  )

  rows: dict[str, Any] = {}
  for row in range(len(records)):
    values = {}
    if indexed:
      with _data_errors(f"{where}: split {split!r}, record {row}"):
        values = only_indexed.deserialize_example_np(records[row])
    if checked:
      _check_label(
        values[checked], num_classes, f"{where}, record {row}: {checked!r}"
      )
    client_id = json_rows.ALL
    if client_key:
      client_id = _client_id(values[client_key], f"{where}, record {row}")
    rows.setdefault(client_id, array.array("q")).append(row)
  if not rows:
    raise errors.DataError(f"{where}: split {split!r} has no examples")

  def read(client_id: str) -> Examples:
    with _data_errors(f"{where}: client {client_id!r}"):
      examples = [
        only_fields.deserialize_example_np(record)
        for record in records.__getitems__(list(rows[client_id]))
      ]
    stacked = {key: [example[key] for example in examples] for key in fields}
    return source.columns(stacked, f"{where}: client {client_id!r}")

  return ClientSource(tuple(rows), lambda c: len(rows[c]), read)


@contextlib.contextmanager
def _data_errors(where: str) -> Iterator[None]:
  """Raises DataError for what TFDS and its readers raise, of any kind."""
  try:
    yield
  except Exception as e:
    reason = (str(e) or type(e).__name__).splitlines()[0]
    raise errors.DataError(f"{where}: {reason}") from None


def _client_id(value: Any, where: str) -> str:
  """Turns the value of a client feature, bytes or an integer, into an id."""
  if isinstance(value, bytes):
    try:
      return value.decode()
    except UnicodeDecodeError:
      raise errors.DataError(
        f"{where}: client {value!r} is not UTF-8"
      ) from None
  if isinstance(value, str | int | np.integer):
    return str(value)
  raise errors.DataError(
    f"{where}: client is {type(value).__name__}, expected a string or integer"
  )


def _check_label(value: Any, num_classes: int, where: str) -> None:
  """Raises DataError unless a feature is an integer in [0, num_classes)."""
  label = np.asarray(value)
  if label.ndim or label.dtype.kind not in "iu":
    raise errors.DataError(
      f"{where} is {label.dtype} of shape {list(label.shape)}, expected an "
      "integer"
    )
  if not 0 <= label < num_classes:
    raise errors.DataError(
      f"{where} is {label}, expected 0 to {num_classes - 1}"
    )
