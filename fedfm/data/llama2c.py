"""The vocabulary files of llama2.c, such as tokenizer.bin or tok512.bin.

One int32, the longest piece; then for each piece a float32 score, an int32
length and its bytes. Pieces 0 to 2 are unknown, start and end; 3 to 258 are the
256 bytes. Text is cut by joining neighbours, the best score first.
"""

from collections.abc import Sequence
import functools
import itertools
import os
import pathlib
import re
import struct

import numpy as np

from fedfm import errors
from fedfm.data.tokenizers import Tokenizer, bytes_of_spans, utf8

_ENTRY = struct.Struct("<fi")
_BOS, _FIRST_BYTE = 1, 3


def llama2c_tokenizer(path: str | os.PathLike) -> Tokenizer:
  """Loads a vocabulary file of llama2.c.

  Args:
    path: The file.

  Returns:
    A `Tokenizer`. As in SentencePiece, encoding puts a space before the text,
    and decoding takes one away from the start.

  Raises:
    DataError: It is no such file.
  """
  path = pathlib.Path(path)
  pieces, scores = _read(path)
  ids: dict[bytes, int] = {}
  for i, piece in enumerate(pieces):
    ids.setdefault(piece, i)
  raw = list(pieces)
  for value in range(256):  # As bytes, not as the names "<0x00>" and so on.
    raw[_FIRST_BYTE + value] = bytes([value])
  crosses_words = any(b" " in piece[1:] for piece in pieces)

  @functools.lru_cache(maxsize=1 << 16)
  def encode_word(word: str) -> tuple[int, ...]:
    found: list[int] = []
    for character in word:
      own = character.encode()
      found += [ids[own]] if own in ids else [_FIRST_BYTE + b for b in own]
    while True:
      joined = [
        (scores[new], -i, new)
        for i, (a, b) in enumerate(zip(found, found[1:]))
        if (new := ids.get(pieces[a] + pieces[b])) is not None
      ]
      if not joined:
        return tuple(found)
      _, i, new = max(joined)  # The first of those with the best score.
      found[-i : -i + 2] = [new]

  def encode(text: str | bytes) -> np.ndarray:
    if isinstance(text, bytes):
      text = text.decode(errors="replace")
    utf8(text)  # Refuses lone surrogates.
    words = (
      [" " + text] if crosses_words else re.findall(" ?[^ ]+| ", " " + text)
    )
    found = itertools.chain.from_iterable(map(encode_word, words))
    return np.fromiter(found, np.int32) if text else np.zeros(0, np.int32)

  sizes = np.array([len(piece) for piece in raw], np.int32)
  sizes[:_FIRST_BYTE] = 0

  def measure(text: str | bytes) -> tuple[np.ndarray, np.ndarray]:
    ids = encode(text)
    total = len(text if isinstance(text, bytes) else text.encode())
    # The space before the text is none of its own.
    return ids, bytes_of_spans(np.maximum(np.cumsum(sizes[ids]) - 1, 0), total)

  def decode(tokens: Sequence[int] | np.ndarray) -> str:
    flat = np.asarray(tokens, np.int64).reshape(-1)
    kept = flat[(flat >= _FIRST_BYTE) & (flat < len(raw))]
    joined = b"".join(raw[i] for i in kept)
    return joined.removeprefix(b" ").decode(errors="replace")

  return Tokenizer(
    encode,
    decode,
    vocab_size=len(pieces),
    bos=_BOS,
    eos=_BOS,  # What stories end with: the start of the next one.
    pad=0,
    name=f"llama2.c:{path.name}",
    measure=measure,
  )


def _read(path: pathlib.Path) -> tuple[list[bytes], list[float]]:
  """Reads pieces and scores."""
  try:
    content = path.read_bytes()
  except OSError as e:
    raise errors.DataError(f"{path}: {e.strerror}") from None
  pieces, scores, begin = [], [], 4
  while begin < len(content):
    start = begin + _ENTRY.size
    if start > len(content):
      break
    score, length = _ENTRY.unpack(content[begin:start])
    begin = start + length
    if length < 0 or begin > len(content):
      break
    pieces.append(content[start:begin])
    scores.append(score)
  if begin != len(content) or len(pieces) < _FIRST_BYTE + 256:
    raise errors.DataError(f"{path}: no vocabulary of llama2.c, or cut off")
  return pieces, scores
