"""Clients' documents as rows of tokens to predict."""

import collections
from collections.abc import Callable, Sequence
import threading

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
) -> source_lib.ClientSource:
  """Turns a source of text into one of rows of tokens.

  A client's documents are encoded, each after a bos, strung together and cut
  into rows that overlap by one token, so that every token but the first is
  predicted in exactly one row. The bos of later documents is not predicted:
  the summed loss / ln 2 / summed `num_bytes` is bits per byte, whatever the
  tokens are.

  Args:
    source: A `ClientSource` whose `text_key` holds str or bytes [documents].
    tokenizer: What encodes.
    sequence_length: Tokens a row, at least 2.
    text_key: The field of the text.

  Returns:
    A `ClientSource` that tokenizes when a client is first asked for, and keeps
    the last clients' rows in memory (up to 256 MiB). Fields:
      tokens: int32 [rows, sequence_length], pad at the end of the last row.
      loss_mask: float32 [rows, sequence_length], 1 where the token is to be
        predicted from those before it in the row; position 0 is always 0.
      num_bytes: int32 [rows], bytes of text that the predicted tokens stand
        for.

  Raises:
    ConfigError: `sequence_length` below 2.
    DataError: (when read) no such field, or one that is not text.

  Examples:
    >>> texts = source_lib.from_arrays({"ann": {"text": ["abc", "d"]}})
    >>> rows = tokenize(texts, tokenizers.byte_tokenizer(), sequence_length=4)
    >>> rows.read("ann")["tokens"].tolist()
    [[256, 97, 98, 99], [99, 256, 100, 258]]
    >>> rows.read("ann")["loss_mask"].tolist()
    [[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]]
  """
  check_length(sequence_length)

  def read(client_id: str) -> source_lib.Examples:
    documents = texts(source, client_id, text_key)
    try:
      encoded = [tokenizer.measure(d) for d in documents]
    except errors.DataError as e:
      raise errors.DataError(f"client {client_id!r}: {e}") from None
    return _rows(encoded, tokenizer, sequence_length)

  return cached(source.ids, read)


def check_length(sequence_length: int) -> None:
  """Raises ConfigError unless rows of so many tokens predict one at least."""
  if isinstance(sequence_length, bool) or not isinstance(
    sequence_length, int | np.integer
  ):
    raise errors.ConfigError(
      f"sequence_length: got {sequence_length!r}, expected an integer"
    )
  if sequence_length < 2:
    raise errors.ConfigError(
      f"sequence_length: got {sequence_length}, expected at least 2"
    )


def cached(
  ids: Sequence[str], read_fn: Callable[[str], source_lib.Examples]
) -> source_lib.ClientSource:
  """Makes a source of rows that are costly to make.

  Args:
    ids: The clients.
    read_fn: Client id -> its rows, which become read-only.

  Returns:
    A `ClientSource` that makes a client's rows when it is first asked for, and
    keeps the last clients' (up to 256 MiB).
  """

  def read(client_id: str) -> source_lib.Examples:
    rows = read_fn(client_id)
    for x in rows.values():
      x.flags.writeable = False
    return rows

  cache = RowCache(read, _CACHE_BYTES)
  return source_lib.ClientSource(ids, cache.size, cache.read)


def texts(
  source: source_lib.ClientSource, client_id: str, text_key: str
) -> np.ndarray:
  """Reads a field of text of a client.

  Args:
    source: The clients.
    client_id: Which of them.
    text_key: The field.

  Returns:
    Object array of str or bytes [documents].

  Raises:
    DataError: No such field, or one that is not text.
  """
  documents = _field(source, client_id, text_key)
  if documents.ndim != 1 or not all(
    isinstance(d, str | bytes) for d in documents
  ):
    raise errors.DataError(
      f"client {client_id!r}: field {text_key!r} is {documents.dtype} of"
      f" shape {list(documents.shape)}, expected text [documents]"
    )
  return documents


def _field(
  source: source_lib.ClientSource, client_id: str, key: str
) -> np.ndarray:
  arrays = source.read(client_id)
  if key not in arrays:
    raise errors.DataError(
      f"client {client_id!r}: no field {key!r}{errors.nearest(key, arrays)}"
    )
  return arrays[key]


def _rows(
  documents: list[tuple[np.ndarray, np.ndarray]],
  tokenizer: tokenizers.Tokenizer,
  sequence_length: int,
) -> source_lib.Examples:
  """Strings documents together and cuts rows that overlap by one token."""
  starts = np.cumsum([0] + [1 + len(ids) for ids, _ in documents])
  stream = np.empty(starts[-1], np.int32)
  sizes = np.zeros(len(stream), np.int32)
  predicted = np.ones(len(stream), np.float32)
  for start, (ids, num_bytes) in zip(starts, documents):
    stream[start] = tokenizer.bos
    predicted[start] = 0
    stream[start + 1 : start + 1 + len(ids)] = ids
    sizes[start + 1 : start + 1 + len(ids)] = num_bytes
  stride = sequence_length - 1
  num_rows = max(1, -(-(len(stream) - 1) // stride))
  padding = (0, num_rows * stride + 1 - len(stream))
  index = np.arange(num_rows)[:, None] * stride + np.arange(sequence_length)
  tokens = np.pad(stream, padding, constant_values=tokenizer.pad)[index]
  loss_mask = np.pad(predicted, padding)[index]
  sizes = np.pad(sizes, padding)[index]
  loss_mask[:, 0] = 0
  num_bytes = sizes[:, 1:].sum(axis=1, dtype=np.int32)
  return {"tokens": tokens, "loss_mask": loss_mask, "num_bytes": num_bytes}


class RowCache:
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


def from_tokens(
  source: source_lib.ClientSource,
  sequence_length: int,
  token_key: str,
  pad: int,
  vocab_size: int,
) -> source_lib.ClientSource:
  """Turns a source of token ids, one row an example, into rows to predict.

  Args:
    source: A `ClientSource` whose `token_key` holds integers [examples, n], or
      an array of integers [n] an example.
    sequence_length: Tokens a row; shorter examples are padded.
    token_key: The field of the tokens.
    pad: The token to pad with.
    vocab_size: The model's.

  Returns:
    A `ClientSource` that keeps the last clients' rows, as `cached`, of "tokens"
    and "loss_mask" as `tokenize`; how much text they are is not known.

  Raises:
    ConfigError: `sequence_length` below 2.
    DataError: (when read) no such field, not integers, an example longer than a
      row or without a token, or a token outside [0, vocab_size).

  Examples:
    >>> texts = source_lib.from_arrays({"ann": {"ids": [[5, 6, 7]]}})
    >>> rows = from_tokens(texts, 4, "ids", pad=0, vocab_size=8).read("ann")
    >>> rows["tokens"].tolist(), rows["loss_mask"].tolist()
    ([[5, 6, 7, 0]], [[0.0, 1.0, 1.0, 0.0]])
  """
  check_length(sequence_length)

  def read(client_id: str) -> source_lib.Examples:
    where = f"client {client_id!r}: field {token_key!r}"
    examples = _field(source, client_id, token_key)
    tokens = np.full((len(examples), sequence_length), pad, np.int32)
    loss_mask = np.zeros(tokens.shape, np.float32)
    for row, example in enumerate(examples):
      example = np.asarray(example)
      if example.ndim != 1 or not 0 < len(example) <= sequence_length:
        raise errors.DataError(
          f"{where}: example {row} has shape {list(example.shape)}, expected 1 "
          f"to data.sequence_length = {sequence_length} tokens"
        )
      _check_range(example, vocab_size, client_id, token_key)
      tokens[row, : len(example)] = example
      loss_mask[row, 1 : len(example)] = 1
    return {"tokens": tokens, "loss_mask": loss_mask}

  return cached(source.ids, read)


def _check_range(
  tokens: np.ndarray, vocab_size: int, client_id: str, token_key: str
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
