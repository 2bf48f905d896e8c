"""Finds the tokenizer in a model's folder."""

from collections.abc import Sequence
import importlib
import os
import pathlib
from typing import Any

import numpy as np

from fedfm import errors
from fedfm.data import hashed_words, special_tokens
from fedfm.data.llama2c import llama2c_tokenizer
from fedfm.data.sentence_pieces import sentencepiece_tokenizer
from fedfm.data.tokenizers import (
  Tokenizer,
  byte_tokenizer,
  bytes_of_spans,
  utf8,
)

_FAST = "tokenizer.json"
_SENTENCEPIECE = ("tokenizer.model", "spiece.model")
# GPT-2's own files: vocabulary and merges, of transformers and of OpenAI.
_BPE = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_BPE_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
_END_OF_TEXT = "<|endoftext|>"
# Largest vocabulary that a folder without a tokenizer is taken for bytes at.
_BYTE_SIZED = 512


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
  """Loads the tokenizer of a model's folder.

  Args:
    directory: A folder with, in this order, a tokenizer.json (which needs the
      package `tokenizers`, of the extra `hf`), a hashed_words.json, a
      tokenizer.model (package `sentencepiece`), GPT-2's vocab.json and
      merges.txt or encoder.json and vocab.bpe (`tokenizers`), or a llama2.c
      vocabulary. With no tokenizer at all, and a vocabulary of at most 512, its
      model is one of bytes. A file is
      the model beside.

  Returns:
    A `Tokenizer`.

  Raises:
    DataError: The tokenizer is damaged, missing, or of a kind that is not read.
  """
  directory = pathlib.Path(directory)
  directory = directory.parent if directory.is_file() else directory
  if (directory / _FAST).is_file():
    return _fast(directory)
  if (directory / hashed_words.FILE).is_file():
    return hashed_words.read(directory / hashed_words.FILE)
  for name in _SENTENCEPIECE:
    if (directory / name).is_file():
      return sentencepiece_tokenizer(directory / name)
  for vocabulary, merges in _BPE:
    if (directory / vocabulary).is_file():
      return _byte_pairs(directory, vocabulary, merges)
  vocabularies = sorted(directory.glob("tok*.bin"))
  if len(vocabularies) > 1:
    raise errors.DataError(
      f"{directory}: holds {len(vocabularies)} vocabularies tok*.bin, expected "
      "one"
    )
  if vocabularies:
    return llama2c_tokenizer(vocabularies[0])
  size = special_tokens.read_json(directory / "config.json").get("vocab_size")
  if isinstance(size, int) and size > _BYTE_SIZED:
    raise errors.DataError(
      f"{directory}: holds no tokenizer, but the vocabulary of {size} is not "
      f"of bytes; expected {_FAST}, {_SENTENCEPIECE[0]}, or {_BPE[0][0]} and "
      f"{_BPE[0][1]}"
    )
  return byte_tokenizer()


def _import_tokenizers(path: pathlib.Path) -> Any:
  try:
    return importlib.import_module("tokenizers")
  except ImportError:
    raise errors.DataError(
      f"{path}: needs the package tokenizers: pip install 'fedfm[hf]'"
    ) from None


def _fast(directory: pathlib.Path) -> Tokenizer:
  """Loads a tokenizer.json."""
  path = directory / _FAST
  tokenizers = _import_tokenizers(path)
  try:
    tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
  except Exception as e:  # What `tokenizers` raises is Exception itself.
    raise errors.DataError(f"{path}: {' '.join(str(e).split())}") from None
  tokenizer.no_truncation()  # What the file asks for is not for training data.
  tokenizer.no_padding()
  between = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
  specials = special_tokens.read(directory, tokenizer.token_to_id, between)
  return _of_library(tokenizer, specials, _FAST)


def _byte_pairs(
  directory: pathlib.Path, vocabulary: str, merges: str
) -> Tokenizer:
  """Loads GPT-2's byte pairs (Radford et al. 2019)."""
  path = directory / vocabulary
  if not (directory / merges).is_file():
    raise errors.DataError(f"{path}: expected {merges} beside it")
  # Others have files of these names, and cut words elsewhere.
  config = special_tokens.read_json(directory / special_tokens.CONFIG)
  kind = config.get("tokenizer_class", _BPE_CLASSES[0])
  if kind not in _BPE_CLASSES:
    raise errors.DataError(f"{path}: is of {kind}, expected {_FAST} beside it")
  tokenizers = _import_tokenizers(path)
  try:
    model = tokenizers.models.BPE.from_file(str(path), str(directory / merges))
  except Exception as e:  # What `tokenizers` raises is Exception itself.
    raise errors.DataError(f"{path}: {' '.join(str(e).split())}") from None
  tokenizer: Any = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  end = tokenizer.token_to_id(_END_OF_TEXT)
  specials = special_tokens.read(directory, tokenizer.token_to_id, (end, end))
  texts = [tokenizer.id_to_token(i) for i in {*specials[:3]}]
  tokenizer.add_special_tokens([text for text in texts if text is not None])
  return _of_library(tokenizer, specials, vocabulary)


def _of_library(
  tokenizer: Any, specials: special_tokens.SpecialTokens, name: str
) -> Tokenizer:
  """Wraps a tokenizer of the `tokenizers` library."""
  known = tokenizer.get_vocab().values()
  size = 1 + max(max(known, default=0), *specials[:3])
  by_text = {
    token.content: i
    for i, token in tokenizer.get_added_tokens_decoder().items()
    if token.special
  }

  def run(text: str | bytes) -> tuple[str, Any]:
    if isinstance(text, bytes):
      text = text.decode(errors="replace")
    utf8(text)  # Refuses lone surrogates.
    return text, tokenizer.encode(text, add_special_tokens=False)

  def encode(text: str | bytes) -> np.ndarray:
    return np.asarray(run(text)[1].ids, np.int32)

  def measure(text: str | bytes) -> tuple[np.ndarray, np.ndarray]:
    text, encoding = run(text)
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + sum(
      (code_points >= first).astype(np.int64)
      for first in (0x80, 0x800, 1 << 16)
    )
    until = np.concatenate([[0], np.cumsum(sizes)])  # Of each character.
    ends = until[np.array([end for _, end in encoding.offsets], np.int64)]
    return np.asarray(encoding.ids, np.int32), bytes_of_spans(ends, until[-1])

  def decode(ids: Sequence[int] | np.ndarray) -> str:
    flat = np.asarray(ids, np.int64).reshape(-1).tolist()
    return tokenizer.decode(flat, skip_special_tokens=True)

  return Tokenizer(
    encode,
    decode,
    vocab_size=size,
    bos=specials.bos,
    eos=specials.eos,
    pad=specials.pad,
    name=f"{name}:{size}",
    measure=measure,
    specials=by_text | specials.by_text,
    stops=tuple(i for i in specials.stops if i < size),
  )
