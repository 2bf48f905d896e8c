"""Words to ids by a hash: a vocabulary that nobody has to count.

Clients need agree on nothing but the number of buckets, and no word of theirs
is told to anyone (the hashing trick, Weinberger et al. 2009, arXiv 0902.2206).
"""

from collections.abc import Sequence
import hashlib
import json
import pathlib
import re

import numpy as np

from fedfm import errors
from fedfm.data.tokenizers import Tokenizer, bytes_of_spans, utf8

FILE = "hashed_words.json"
_SPECIAL = 3  # Ids of bos, eos and pad.
_WORD = re.compile(r"\w+|[^\w\s]")


def hashed_words(num_buckets: int) -> Tokenizer:
  """Makes a tokenizer whose tokens are lower-case words and punctuation marks.

  Args:
    num_buckets: How many ids words share, after 0 bos, 1 eos and 2 pad.

  Returns:
    A `Tokenizer` for classifiers: ids cannot be turned back to words, and
    decode to nothing but their numbers.

  Raises:
    ConfigError: Fewer than 1 bucket.

  Examples:
    >>> t = hashed_words(100)
    >>> t.encode("Good, good").tolist() == t.encode("good , GOOD").tolist()
    True
    >>> t.vocab_size, len(t.encode("Good, good"))
    (103, 3)
  """
  if num_buckets < 1:
    raise errors.ConfigError(
      f"num_buckets: got {num_buckets}, expected at least 1"
    )

  def as_text(text: str | bytes) -> str:
    return text.decode(errors="replace") if isinstance(text, bytes) else text

  def encode(text: str | bytes) -> np.ndarray:
    words = _WORD.findall(as_text(text))
    ids = [_SPECIAL + _hash(word.lower()) % num_buckets for word in words]
    return np.asarray(ids, np.int32)

  def measure(text: str | bytes) -> tuple[np.ndarray, np.ndarray]:
    text, ends, until = as_text(text), [], 0
    for begin, end in (word.span() for word in _WORD.finditer(text)):
      until += len(utf8(text[begin:end]))  # Spaces are left out.
      ends.append(until)
    return encode(text), bytes_of_spans(ends, len(utf8(text)))

  def decode(ids: Sequence[int] | np.ndarray) -> str:
    flat = np.asarray(ids, np.int64).reshape(-1).tolist()
    return " ".join(str(i) for i in flat if i >= _SPECIAL)

  return Tokenizer(
    encode,
    decode,
    vocab_size=_SPECIAL + num_buckets,
    bos=0,
    eos=1,
    pad=2,
    name=f"hashed_words:{num_buckets}",
    measure=measure,
  )


def _hash(word: str) -> int:
  """The same on every machine, which Python's own is not."""
  encoded = word.encode(errors="replace")
  return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big")


def read(path: pathlib.Path) -> Tokenizer:
  """Reads hashed_words.json, `{"num_buckets": N}`; DataError if malformed."""
  try:
    count = json.loads(path.read_bytes())["num_buckets"]
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise errors.DataError(
      f'{path}: expected {{"num_buckets": N}}: {e!r}'
    ) from None
  if type(count) is not int or count < 1:
    raise errors.DataError(
      f"{path}: num_buckets is {count!r}, expected an integer of at least 1"
    )
  return hashed_words(count)
