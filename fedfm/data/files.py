"""Populations stored in files: JSON Lines, and TFDS data sets."""

import array
from collections.abc import Iterator, Sequence
import contextlib
import gzip
import json
import os
from typing import Any
import zlib

import numpy as np

from fedfm import errors
from fedfm.data import source

ClientSource = source.ClientSource
Examples = source.Examples


def from_jsonl(
  path: str | os.PathLike[str], client_key: str, text_key: str
) -> ClientSource:
  """Makes a source of text from a file with one JSON object a line.

  One pass indexes and checks the file; later reads seek to a client's lines.
  A file that ends in `.gz` cannot be sought in, so its text stays in memory.

  Args:
    path: A `.jsonl` or `.jsonl.gz` file in UTF-8; blank lines are skipped.
    client_key: The key of the client's id, a string.
    text_key: The key of the example's text, a string.

  Returns:
    A `ClientSource` in order of first appearance; reads are {text_key: object
    array of str [examples]} in the file's order.

  Raises:
    DataError: A file that cannot be read or has no rows, a line that is not a
      JSON object with both strings (says which line), or a client whose texts
      are all empty.
  """
  path = os.fspath(path)
  keys = (client_key, text_key)
  compressed = path.endswith(".gz")
  # Byte offsets, or the texts themselves where the file cannot be sought in.
  rows: dict[str, Any] = {}
  empty: dict[str, None] = {}
  for offset, where, line in _lines(path, compressed):
    client_id, text = _parse_row(line, where, keys)
    if text:
      empty.pop(client_id, None)
    elif client_id not in rows:
      empty[client_id] = None
    if compressed:
      rows.setdefault(client_id, []).append(text)
    else:
      rows.setdefault(client_id, array.array("q")).append(offset)
  if not rows:
    raise errors.DataError(f"{path}: got no rows, expected at least 1")
  for client_id in empty:
    raise errors.DataError(f"{path}: client {client_id!r}: has no text")

  def read_texts(client_id: str) -> list[str]:
    if compressed:
      return rows[client_id]
    texts = []
    try:
      with open(path, "rb") as file:
        for offset in rows[client_id]:
          file.seek(offset)
          where = f"{path}, byte {offset}"
          found_id, text = _parse_row(file.readline(), where, keys)
          if found_id != client_id:
            raise errors.DataError(
              f"{where}: got client {found_id!r}, expected {client_id!r}; the"
              " file changed since it was indexed"
            )
          texts.append(text)
    except OSError as e:
      raise _unreadable(path, e) from None
    return texts

  def read(client_id: str) -> Examples:
    return {text_key: np.array(read_texts(client_id), dtype=object)}

  return ClientSource(tuple(rows), lambda c: len(rows[c]), read)


def _lines(path: str, compressed: bool) -> Iterator[tuple[int, str, bytes]]:
  """Yields (byte offset, "file:line", line) of the lines that are not blank."""
  offset = 0
  try:
    with (gzip.open if compressed else open)(path, "rb") as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          yield offset, f"{path}:{number}", line
        offset += len(line)
  except (OSError, EOFError, zlib.error) as e:
    raise _unreadable(path, e) from None


def _unreadable(
  path: str | os.PathLike[str], error: Exception
) -> errors.DataError:
  reason = getattr(error, "strerror", None) or str(error)
  return errors.DataError(f"{path}: cannot be read: {reason}")


def _parse_row(line: bytes, where: str, keys: tuple[str, str]) -> list[str]:
  """Returns the strings under `keys` of a line's JSON object."""
  try:
    row = json.loads(line.decode())
  except UnicodeDecodeError as e:
    raise errors.DataError(f"{where}: not UTF-8 at byte {e.start}") from None
  except (ValueError, RecursionError) as e:
    raise errors.DataError(f"{where}: not JSON: {e}") from None
  if not isinstance(row, dict):
    raise errors.DataError(
      f"{where}: got a JSON {type(row).__name__}, expected an object"
    )
  for key in keys:
    if key not in row:
      raise errors.DataError(
        f"{where}: key {key!r} is missing{errors.nearest(key, row)}"
      )
    if not isinstance(row[key], str):
      raise errors.DataError(
        f"{where}: {key!r} is {type(row[key]).__name__}, expected a string"
      )
    try:
      row[key].encode()
    except UnicodeEncodeError:
      raise errors.DataError(
        f"{where}: {key!r} holds a lone surrogate, expected text that UTF-8"
        " can encode"
      ) from None
  if not row[keys[0]]:
    raise errors.DataError(
      f"{where}: {keys[0]!r} is empty, expected a client id"
    )
  return [row[key] for key in keys]


def from_tfds(
  name: str,
  split: str,
  client_key: str,
  data_dir: str | os.PathLike | None = None,
  fields: Sequence[str] | None = None,
) -> ClientSource:
  """Makes a source of a prepared TFDS data set, without TensorFlow.

  One pass reads the client of every record; later reads fetch a client's
  records by their index. Nothing is downloaded.

  Args:
    name: The data set, e.g. `"federated_emnist/digits:1.0.0"`.
    split: The split, e.g. `"train"` or `"train[:10%]"`.
    client_key: The feature that names the client, a string or an integer; it
      is left out of what is read.
    data_dir: Where TFDS keeps its data; default as TFDS.
    fields: Which features to read; default all.

  Returns:
    A `ClientSource` in order of first appearance; strings are read as bytes.

  Raises:
    DataError: A data set that is unknown, not prepared or not in ArrayRecord
      files, an unknown split or feature, or examples of different shapes.
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
  for key in (client_key, *fields):
    if key not in features:
      raise errors.DataError(
        f"{where}: no feature {key!r}{errors.nearest(key, features)}"
      )
  # Features that are not asked for (images, say) are never decoded.
  only_client: Any = tfds.features.FeaturesDict(
    {client_key: features[client_key]}
  )
  only_fields: Any = tfds.features.FeaturesDict(
    {k: features[k] for k in fields}
  )

  rows: dict[str, Any] = {}
  for row in range(len(records)):
    with _data_errors(f"{where}: split {split!r}, record {row}"):
      value = only_client.deserialize_example_np(records[row])[client_key]
    client_id = _client_id(value, f"{where}, record {row}")
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
