"""Text to token ids and back."""

from collections.abc import Callable, Mapping, Sequence
import re
import types
from typing import NamedTuple

import numpy as np

from fedfm import errors


class Tokenizer(NamedTuple):
  """Two functions and the ids they agree on.

  Attributes:
    encode: Text, str or UTF-8 bytes -> int32 ids [tokens]; adds no specials.
    decode: Ids [tokens] -> text, specials left out.
    vocab_size: Ids are in [0, vocab_size).
    bos: Id that starts every document.
    eos: Id that ends a generated document.
    pad: Id that fills up the last row.
    name: Written to checkpoints, so that a run cannot resume with another.
    measure: Text -> ids as of `encode`, and int32 [tokens], the bytes of the
      text that each stands for: in sum all of them, for bits per byte.
    specials: Special tokens by the text that templates write them as.
    stops: Other ids that end a generated text, besides `eos`.
  """

  encode: Callable[[str | bytes], np.ndarray]
  decode: Callable[[Sequence[int] | np.ndarray], str]
  vocab_size: int
  bos: int
  eos: int
  pad: int
  name: str
  measure: Callable[[str | bytes], tuple[np.ndarray, np.ndarray]]
  specials: Mapping[str, int] = types.MappingProxyType({})
  stops: tuple[int, ...] = ()


def byte_tokenizer() -> Tokenizer:
  """Makes a tokenizer whose tokens are the bytes of UTF-8.

  Ids 0 to 255 are bytes, 256 bos, 257 eos, 258 pad; the rest up to
  `vocab_size` = 272 is unused, so that it divides over the axes of a mesh.

  Returns:
    A `Tokenizer`, lossless on any bytes; decoding a cut character gives
    U+FFFD.

  Examples:
    >>> t = byte_tokenizer()
    >>> t.encode("héllo").tolist()
    [104, 195, 169, 108, 108, 111]
    >>> t.decode([t.bos, *t.encode("héllo"), t.eos])
    'héllo'
  """

  def encode(text: str | bytes) -> np.ndarray:
    if isinstance(text, str):
      text = utf8(text)
    return np.frombuffer(text, np.uint8).astype(np.int32)

  def decode(ids: Sequence[int] | np.ndarray) -> str:
    ids = np.asarray(ids, np.int64).reshape(-1)
    kept = ids[(ids >= 0) & (ids < 256)]
    return kept.astype(np.uint8).tobytes().decode(errors="replace")

  def measure(text: str | bytes) -> tuple[np.ndarray, np.ndarray]:
    ids = encode(text)
    return ids, np.ones_like(ids)

  return Tokenizer(
    encode,
    decode,
    vocab_size=272,
    bos=256,
    eos=257,
    pad=258,
    name="bytes",
    measure=measure,
  )


def utf8(text: str) -> bytes:
  """Encodes a text; DataError where it holds a lone surrogate."""
  try:
    return text.encode()
  except UnicodeEncodeError as e:
    raise errors.DataError(
      f"text holds a lone surrogate at character {e.start}, expected"
      " text that UTF-8 can encode"
    ) from None


def bytes_of_spans(ends: Sequence[int] | np.ndarray, total: int) -> np.ndarray:
  """Shares a text's bytes out to its tokens, by where each ends.

  Spans may overlap (the tokens of one character each end where it ends) or
  leave gaps (spaces that a tokenizer drops): what a token adds is its own.

  Args:
    ends: Bytes of the text up to the end of each token [tokens].
    total: Bytes of the text.

  Returns:
    int32 [tokens], at least 0; `total` in sum where there are tokens.

  Examples:
    >>> bytes_of_spans([1, 3, 3, 5], 6).tolist()
    [1, 2, 0, 3]
  """
  reached = np.minimum(np.maximum.accumulate(np.asarray(ends, np.int64)), total)
  if len(reached):
    reached[-1] = total
  return np.diff(reached, prepend=0).astype(np.int32)


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
  """Matches a special token where a text has it written out."""
  longest_first = sorted(tokenizer.specials, key=len, reverse=True)
  return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def encode_marked(
  tokenizer: Tokenizer, text: str
) -> tuple[np.ndarray, np.ndarray]:
  """Encodes a text in which special tokens are written out, as templates do.

  Args:
    tokenizer: Its `specials` are looked for.
    text: The text.

  Returns:
    Ids, and the bytes that each stands for, 0 of special tokens; both int32
    [tokens].

  Examples:
    >>> t = byte_tokenizer()._replace(specials={"<s>": 256})
    >>> [x.tolist() for x in encode_marked(t, "<s>hi")]
    [[256, 104, 105], [0, 1, 1]]
  """
  if not tokenizer.specials:
    return tokenizer.measure(text)
  pieces = special_pattern(tokenizer).split(text)
  ids, num_bytes = zip(
    *(
      (np.array([tokenizer.specials[piece]]), np.zeros(1))
      if piece in tokenizer.specials
      else tokenizer.measure(piece)
      for piece in pieces
    )
  )
  return (
    np.concatenate(ids).astype(np.int32),
    np.concatenate(num_bytes).astype(np.int32),
  )
