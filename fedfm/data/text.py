"""Clients' documents as rows of tokens to predict."""

import collections
from collections.abc import Callable, Iterable
import threading
from typing import Any

import numpy as np

from fedfm import errors
from fedfm.data import source as source_lib
from fedfm.data import tokenizers

_CACHE_BYTES = 256 * 2**20


def tokenize(
  source: source_lib.ClientSource,
  tokenizer: tokenizers.Tokenizer,
  sequence_length: int,
  text_key: str = "text",
  max_examples: int | None = None,
) -> source_lib.ClientSource:
  """Turns a source of text into one of rows of tokens.

  A client's documents are encoded, each after a bos, strung together and cut
  into rows that overlap by one token, so that every token but the first is
  predicted in exactly one row. The bos of later documents is not predicted:
  the summed loss / ln 2 / number of predicted tokens is bits per token (per
  byte, with the byte tokenizer).

  Args:
    source: A `ClientSource` whose `text_key` holds str or bytes [documents].
    tokenizer: What encodes.
    sequence_length: Tokens a row, at least 2.
    text_key: The field of the text.
    max_examples: Rows a client has at most, the first ones; default all.

  Returns:
    A `ClientSource` that tokenizes when a client is first asked for, and keeps
    the last clients' rows in memory (up to 256 MiB). Fields:
      tokens: int32 [rows, sequence_length], pad at the end of the last row.
      loss_mask: float32 [rows, sequence_length], 1 where the token is to be
        predicted from those before it in the row; position 0 is always 0.

  Raises:
    ConfigError: `sequence_length` below 2 or `max_examples` below 1.
    DataError: (when read) no such field, or one that is not text.

  Examples:
    >>> texts = source_lib.from_arrays({"ann": {"text": ["abc", "d"]}})
    >>> rows = tokenize(texts, tokenizers.byte_tokenizer(), sequence_length=4)
    >>> rows.read("ann")["tokens"].tolist()
    [[256, 97, 98, 99], [99, 256, 100, 258]]
    >>> rows.read("ann")["loss_mask"].tolist()
    [[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]]
  """
  for name, value, least in (
    ("sequence_length", sequence_length, 2),
    ("max_examples", max_examples, 1),
  ):
    if name == "max_examples" and value is None:
      continue
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
      raise errors.ConfigError(f"{name}: got {value!r}, expected an integer")
    if value < least:
      raise errors.ConfigError(
        f"{name}: got {value}, expected at least {least}"
      )

  def read(client_id: str) -> source_lib.Examples:
    documents = _documents(source, client_id, text_key)
    try:
      encoded = [tokenizer.encode(d) for d in documents]
    except errors.DataError as e:
      raise errors.DataError(f"client {client_id!r}: {e}") from None
    rows = _rows(encoded, tokenizer, sequence_length)
    rows = {name: x[:max_examples] for name, x in rows.items()}
    for x in rows.values():
      x.flags.writeable = False
    return rows

  cache = _RowCache(read, _CACHE_BYTES)
  return source_lib.ClientSource(source.ids, cache.size, cache.read)


def _documents(
  source: source_lib.ClientSource, client_id: str, text_key: str
) -> np.ndarray:
  """Returns the client's text, str or bytes [documents]."""
  arrays = source.read(client_id)
  if text_key not in arrays:
    raise errors.DataError(
      f"client {client_id!r}: no field"
      f" {text_key!r}{errors.nearest(text_key, arrays)}"
    )
  documents = arrays[text_key]
  if documents.ndim != 1 or not all(
    isinstance(d, str | bytes) for d in documents
  ):
    raise errors.DataError(
      f"client {client_id!r}: field {text_key!r} is {documents.dtype} of"
      f" shape {list(documents.shape)}, expected text [documents]"
    )
  return documents


def _rows(
  documents: list[np.ndarray],
  tokenizer: tokenizers.Tokenizer,
  sequence_length: int,
) -> source_lib.Examples:
  """Strings documents together and cuts rows that overlap by one token."""
  starts = np.cumsum([0] + [1 + len(d) for d in documents])
  stream = np.empty(starts[-1], np.int32)
  predicted = np.ones(len(stream), np.float32)
  for start, document in zip(starts, documents):
    stream[start] = tokenizer.bos
    predicted[start] = 0
    stream[start + 1 : start + 1 + len(document)] = document
  stride = sequence_length - 1
  num_rows = max(1, -(-(len(stream) - 1) // stride))
  padding = (0, num_rows * stride + 1 - len(stream))
  index = np.arange(num_rows)[:, None] * stride + np.arange(sequence_length)
  tokens = np.pad(stream, padding, constant_values=tokenizer.pad)[index]
  loss_mask = np.pad(predicted, padding)[index]
  loss_mask[:, 0] = 0
  return {"tokens": tokens, "loss_mask": loss_mask}


class _RowCache:
  """The rows of the clients read last, and the sizes of all read so far."""

  def __init__(
    self,
    read_fn: Callable[[str], source_lib.Examples],
    max_bytes: int,
  ):
    self._read_fn = read_fn
    self._max_bytes = max_bytes
    self._rows: collections.OrderedDict[str, source_lib.Examples] = (
      collections.OrderedDict()
    )
    self._bytes = 0
    self._sizes: dict[str, int] = {}
    # A round's clients may be read ahead in another thread.
    self._lock = threading.Lock()

  def size(self, client_id: str) -> int:
    if client_id not in self._sizes:
      self.read(client_id)
    return self._sizes[client_id]

  def read(self, client_id: str) -> source_lib.Examples:
    with self._lock:
      rows = self._rows.get(client_id)
      if rows is None:
        rows = self._rows[client_id] = self._read_fn(client_id)
        self._sizes[client_id] = len(rows["tokens"])
        self._bytes += _num_bytes(rows)
        while self._bytes > self._max_bytes and len(self._rows) > 1:
          _, dropped = self._rows.popitem(last=False)
          self._bytes -= _num_bytes(dropped)
      self._rows.move_to_end(client_id)
      return dict(rows)


def _num_bytes(rows: source_lib.Examples) -> int:
  return sum(x.nbytes for x in rows.values())


def check_tokens(
  source: source_lib.ClientSource,
  vocab_size: int,
  ids: Iterable[str] | None = None,
  token_key: str = "tokens",
) -> None:
  """Checks that a model of `vocab_size` can embed the clients' tokens.

  Args:
    source: A `ClientSource` of token ids, any shape [examples, ...].
    vocab_size: The model's.
    ids: Which clients to check; default all, which reads all of them.
    token_key: The field of the tokens.

  Raises:
    DataError: No such field, not integers, or a token outside
      [0, vocab_size); an embedding lookup would silently clamp it.
  """
  for client_id in source.ids if ids is None else ids:
    arrays = source.read(client_id)
    if token_key not in arrays:
      raise errors.DataError(
        f"client {client_id!r}: no field"
        f" {token_key!r}{errors.nearest(token_key, arrays)}"
      )
    _check_range(arrays[token_key], vocab_size, client_id, token_key)


def _check_range(
  tokens: np.ndarray, vocab_size: int, client_id: str, token_key: Any
) -> None:
  if tokens.dtype.kind not in "iu":
    raise errors.DataError(
      f"client {client_id!r}: field {token_key!r} is {tokens.dtype},"
      " expected integers"
    )
  bad = (tokens < 0) | (tokens >= vocab_size)
  if bad.any():
    raise errors.DataError(
      f"client {client_id!r}: field {token_key!r} holds token"
      f" {tokens[bad][0]}, expected 0 to {vocab_size - 1}"
    )
