"""Prompts and responses as rows of tokens; the loss is on the responses.

Several examples share a row. Each is a segment of it: attention stays within,
and positions count from its start, so that an example's loss is what it would
be in a row of its own.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fedfm import errors
from fedfm.data import source as source_lib
from fedfm.data import text as text_lib
from fedfm.data import tokenizers
from fedfm.data.prompt_formats import PromptFormat

_OPEN_ROWS = 64


class Fields(NamedTuple):
  """Names of the fields of an example, text [examples] each.

  Attributes:
    prompt: The instruction or question.
    response: What is to be said.
    context: What the prompt is about; may hold "". None where there is none.
  """

  prompt: str
  response: str
  context: str | None = None


class Example(NamedTuple):
  """Tokens of a prompt and of its response, and bytes of the latter's.

  Attributes:
    prompt: int32 [tokens].
    response: int32 [tokens].
    num_bytes: int32, like `response`.
  """

  prompt: np.ndarray
  response: np.ndarray
  num_bytes: np.ndarray


def instruct(
  source: source_lib.ClientSource,
  tokenizer: tokenizers.Tokenizer,
  sequence_length: int,
  fields: Fields,
  prompt_format: PromptFormat,
  packed: bool = True,
) -> source_lib.ClientSource:
  """Turns a source of prompts and responses into one of rows of tokens.

  An example is the start token, the prompt as `prompt_format` writes it, the
  response, and a token that ends it. One that is longer than a row keeps the
  end of its prompt, and the beginning of its response, which gets at least half
  of the row.

  Args:
    source: A `ClientSource` of text.
    tokenizer: What encodes.
    sequence_length: Tokens a row, at least 4.
    fields: The source's fields.
    prompt_format: How an example is written.
    packed: Put examples into the first row that has room for them; else a row
      each, in order.

  Returns:
    A `ClientSource` that keeps the last clients' rows, as `text.cached`. Its
    fields:
      tokens: int32 [rows, sequence_length].
      loss_mask: float32 [rows, sequence_length], 1 on responses and their ends.
      num_bytes: int32 [rows], bytes of the responses.
      num_examples: int32 [rows], how many there are in a row.
      segment_ids: int32 [rows, sequence_length], from 1; 0 is padding.
      positions: int32 [rows, sequence_length], from 0 in each segment.

  Raises:
    ConfigError: `sequence_length` below 4.
    DataError: (when read) no such field, one that is not text, or an example
      without a prompt or a response.

  Examples:
    >>> from fedfm.data.prompt_formats import builtin
    >>> texts = source_lib.from_arrays({"ann": {"q": ["a"], "r": ["b"]}})
    >>> rows = instruct(
    ...   texts,
    ...   tokenizers.byte_tokenizer(),
    ...   sequence_length=6,
    ...   fields=Fields("q", "r"),
    ...   prompt_format=builtin("plain"),
    ... )
    >>> rows.read("ann")["tokens"].tolist()
    [[256, 97, 10, 98, 257, 258]]
    >>> rows.read("ann")["loss_mask"].tolist()
    [[0.0, 0.0, 0.0, 1.0, 1.0, 0.0]]
  """
  text_lib.check_length(sequence_length)
  if sequence_length < 4:
    raise errors.ConfigError(
      f"sequence_length: got {sequence_length}, expected at least 4 for a "
      "prompt and its response"
    )

  def read(client_id: str) -> source_lib.Examples:
    examples = [
      cut(_encode(tokenizer, prompt_format, *example), sequence_length)
      for example in _examples(source, client_id, fields)
    ]
    if not packed:
      return rows_of(examples, sequence_length, tokenizer.pad)
    rows = _first_fit(examples, sequence_length)
    return _arrays(rows, sequence_length, tokenizer.pad)

  return text_lib.cached(source.ids, read)


def _examples(
  source: source_lib.ClientSource, client_id: str, fields: Fields
) -> Iterator[tuple[str, str, str]]:
  """Yields (prompt, context, response) of a client's examples."""
  prompts, responses = (
    text_lib.texts(source, client_id, key)
    for key in (fields.prompt, fields.response)
  )
  contexts = [""] * len(prompts)
  if fields.context is not None:
    contexts = text_lib.texts(source, client_id, fields.context)
  for row, example in enumerate(zip(prompts, contexts, responses)):
    prompt, context, response = (
      x.decode(errors="replace") if isinstance(x, bytes) else x for x in example
    )
    for key, value in ((fields.prompt, prompt), (fields.response, response)):
      if not value.strip():
        raise errors.DataError(
          f"client {client_id!r}: field {key!r} of example {row} is empty, "
          "expected text"
        )
    yield prompt, context, response


def _encode(
  tokenizer: tokenizers.Tokenizer,
  prompt_format: PromptFormat,
  prompt: str,
  context: str,
  response: str,
) -> Example:
  """Encodes prompt and response apart, as generation meets them."""
  before, after = prompt_format.render(prompt, context, response)
  first = encode_prompt(tokenizer, prompt_format, before)
  second, sizes = tokenizers.encode_marked(tokenizer, after)
  # What a template adds is predicted too, but is none of the response's bytes.
  total = len(response.encode(errors="replace"))
  sizes = tokenizers.bytes_of_spans(np.cumsum(sizes), total)
  if not prompt_format.end:
    second = np.append(second, np.int32(tokenizer.eos))
    sizes = np.append(sizes, np.int32(0))
  return Example(first, second, sizes)


def encode_prompt(
  tokenizer: tokenizers.Tokenizer, prompt_format: PromptFormat, before: str
) -> np.ndarray:
  """Encodes what stands before a response.

  Args:
    tokenizer: What encodes.
    prompt_format: What wrote `before`.
    before: The text.

  Returns:
    int32 [tokens], a start token first.
  """
  tokens, _ = tokenizers.encode_marked(tokenizer, before)
  if prompt_format.starts:
    return tokens
  return np.concatenate([np.asarray([tokenizer.bos], np.int32), tokens])


def rows_of(
  examples: Sequence[Example], length: int, pad: int
) -> source_lib.Examples:
  """Writes examples into rows of their own.

  Args:
    examples: None longer than a row.
    length: Tokens a row.
    pad: What fills the rest.

  Returns:
    As `instruct`.
  """
  return _arrays([[example] for example in examples], length, pad)


def cut(example: Example, length: int) -> Example:
  """Cuts an example to a row: its prompt's beginning, its response's end.

  Args:
    example: Of any length.
    length: Tokens of a row, of which the response is given at least half.

  Returns:
    An example of at most `length` tokens; the first stays the first.
  """
  prompt, response, num_bytes = example
  if len(prompt) + len(response) <= length:
    return example
  kept = min(len(response), max(length - len(prompt), length // 2))
  dropped = max(len(prompt) + kept - length, 0)
  prompt = np.concatenate([prompt[:1], prompt[1 + dropped :]])
  return Example(prompt, response[:kept], num_bytes[:kept])


def _first_fit(examples: list[Example], length: int) -> list[list[Example]]:
  """Puts each example into the first of the last rows that has room for it."""
  rows: list[list[Example]] = []
  free: list[int] = []
  for example in examples:
    size = len(example.prompt) + len(example.response)
    first = max(0, len(rows) - _OPEN_ROWS)
    row = next((r for r in range(first, len(rows)) if free[r] >= size), None)
    if row is None:
      row = len(rows)
      rows.append([])
      free.append(length)
    rows[row].append(example)
    free[row] -= size
  return rows


def _arrays(
  rows: Sequence[Sequence[Example]], length: int, pad: int
) -> source_lib.Examples:
  """Writes examples side by side into rows."""
  shape = (len(rows), length)
  tokens = np.full(shape, pad, np.int32)
  loss_mask = np.zeros(shape, np.float32)
  segment_ids = np.zeros(shape, np.int32)
  positions = np.zeros(shape, np.int32)
  num_bytes = np.zeros(len(rows), np.int32)
  for r, row in enumerate(rows):
    begin = 0
    for segment, (prompt, response, sizes) in enumerate(row, start=1):
      middle = begin + len(prompt)
      end = middle + len(response)
      tokens[r, begin:middle] = prompt
      tokens[r, middle:end] = response
      loss_mask[r, middle:end] = 1
      segment_ids[r, begin:end] = segment
      positions[r, begin:end] = np.arange(end - begin)
      num_bytes[r] += sizes.sum()
      begin = end
  return {
    "tokens": tokens,
    "loss_mask": loss_mask,
    "num_bytes": num_bytes,
    "num_examples": np.array([len(row) for row in rows], np.int32),
    "segment_ids": segment_ids,
    "positions": positions,
  }
