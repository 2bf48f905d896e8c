"""Rows of JSON files, checked: an object with text, or tokens, by name."""

from collections.abc import Sequence
import dataclasses
import json
from typing import Any

import numpy as np

from fedfm import errors

ALL = "all"  # The one client of rows that name none.
_INT32 = np.iinfo(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowFormat:
  """What a row must hold.

  Attributes:
    client_key: Key of the client's id, a string; "" where rows name no client.
    texts: Keys of strings.
    required: Those of `texts` that may not be empty.
    tokens: Keys of lists of integers.
    labels: Keys of integers of at least 0.
    categories: Keys of strings or integers; they become strings.
  """

  client_key: str
  texts: Sequence[str] = ()
  required: Sequence[str] = ()
  tokens: Sequence[str] = ()
  labels: Sequence[str] = ()
  categories: Sequence[str] = ()

  def parse(self, line: bytes, where: str) -> tuple[str, list[Any]]:
    """Reads a line.

    Args:
      line: One JSON object in UTF-8.
      where: File and line, for messages.

    Returns:
      The client's id, and the values of `texts`, `tokens`, `labels` and
      `categories`.

    Raises:
      DataError: Anything else.
    """
    return self.check(loads(line, where), where)

  def check(self, row: Any, where: str) -> tuple[str, list[Any]]:
    """As `parse`, of a row that is read already."""
    if not isinstance(row, dict):
      raise errors.DataError(
        f"{where}: got a JSON {type(row).__name__}, expected an object"
      )
    client_id = ALL
    if self.client_key:
      client_id = _text(row, self.client_key, where)
      if not client_id:
        raise errors.DataError(
          f"{where}: {self.client_key!r} is empty, expected a client id"
        )
    values: list[Any] = [_text(row, key, where) for key in self.texts]
    for key, value in zip(self.texts, values):
      if key in self.required and not value.strip():
        raise errors.DataError(f"{where}: {key!r} is empty, expected text")
    values += [_tokens(row, key, where) for key in self.tokens]
    values += [_label(row, key, where) for key in self.labels]
    return client_id, values + [
      _category(row, key, where) for key in self.categories
    ]

  def columns(self, rows: Sequence[Sequence[Any]]) -> dict[str, np.ndarray]:
    """Puts rows together: {key: object array [rows]}, labels as int64."""
    columns = {}
    keys = (*self.texts, *self.tokens, *self.labels, *self.categories)
    for index, key in enumerate(keys):
      dtype = np.int64 if key in self.labels else object
      column = np.empty(len(rows), dtype)
      for row, values in enumerate(rows):
        column[row] = values[index]
      columns[key] = column
    return columns


def loads(content: bytes, where: str) -> Any:
  """Reads JSON in UTF-8; DataError, with `where`, for anything else."""
  try:
    return json.loads(content.decode())
  except UnicodeDecodeError as e:
    raise errors.DataError(f"{where}: not UTF-8 at byte {e.start}") from None
  except (ValueError, RecursionError) as e:
    raise errors.DataError(f"{where}: not JSON: {e}") from None


def _value(row: dict[str, Any], key: str, where: str) -> Any:
  if key not in row:
    raise errors.DataError(
      f"{where}: key {key!r} is missing{errors.nearest(key, row)}"
    )
  return row[key]


def _text(row: dict[str, Any], key: str, where: str) -> str:
  value = _value(row, key, where)
  if not isinstance(value, str):
    raise errors.DataError(
      f"{where}: {key!r} is {type(value).__name__}, expected a string"
    )
  try:
    value.encode()
  except UnicodeEncodeError:
    raise errors.DataError(
      f"{where}: {key!r} holds a lone surrogate, expected text that UTF-8"
      " can encode"
    ) from None
  return value


def _tokens(row: dict[str, Any], key: str, where: str) -> np.ndarray:
  value = _value(row, key, where)
  if not isinstance(value, list) or not all(
    isinstance(x, int) and not isinstance(x, bool) for x in value
  ):
    raise errors.DataError(
      f"{where}: {key!r} is no list of integers, expected token ids"
    )
  if not value:
    raise errors.DataError(f"{where}: {key!r} is empty, expected token ids")
  if not all(_INT32.min <= x <= _INT32.max for x in value):
    raise errors.DataError(f"{where}: {key!r} holds a number beyond int32")
  return np.array(value, np.int32)


def _label(row: dict[str, Any], key: str, where: str) -> int:
  value = _value(row, key, where)
  if type(value) is not int or not 0 <= value <= _INT32.max:
    raise errors.DataError(
      f"{where}: {key!r} is {value!r}, expected an integer of at least 0"
    )
  return value


def _category(row: dict[str, Any], key: str, where: str) -> str:
  value = _value(row, key, where)
  if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
    raise errors.DataError(
      f"{where}: {key!r} is {value!r}, expected a string or an integer"
    )
  return str(value)
