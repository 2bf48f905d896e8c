"""Text to token ids and back."""

from collections.abc import Callable, Sequence
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
  """

  encode: Callable[[str | bytes], np.ndarray]
  decode: Callable[[Sequence[int] | np.ndarray], str]
  vocab_size: int
  bos: int
  eos: int
  pad: int
  name: str


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
      try:
        text = text.encode()
      except UnicodeEncodeError as e:
        raise errors.DataError(
          f"text holds a lone surrogate at character {e.start}, expected"
          " text that UTF-8 can encode"
        ) from None
    return np.frombuffer(text, np.uint8).astype(np.int32)

  def decode(ids: Sequence[int] | np.ndarray) -> str:
    ids = np.asarray(ids, np.int64).reshape(-1)
    kept = ids[(ids >= 0) & (ids < 256)]
    return kept.astype(np.uint8).tobytes().decode(errors="replace")

  return Tokenizer(
    encode, decode, vocab_size=272, bos=256, eos=257, pad=258, name="bytes"
  )
