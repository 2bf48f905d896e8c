"""SentencePiece models (Kudo and Richardson 2018, arXiv 1808.06226)."""

from collections.abc import Sequence
import importlib
import os
import pathlib
from typing import Any

import numpy as np

from fedfm import errors
from fedfm.data import special_tokens
from fedfm.data.tokenizers import Tokenizer, bytes_of_spans, utf8


def sentencepiece_tokenizer(path: str | os.PathLike) -> Tokenizer:
  """Loads a SentencePiece model, such as a folder's tokenizer.model.

  Args:
    path: The file. Its folder's tokenizer_config.json may name special tokens
      and add some; without it the model's own count.

  Returns:
    A `Tokenizer`.

  Raises:
    DataError: No such model, or the package `sentencepiece` is missing.
  """
  path = pathlib.Path(path)
  try:
    sentencepiece: Any = importlib.import_module("sentencepiece")
  except ImportError:
    raise errors.DataError(
      f"{path}: needs the package sentencepiece: pip install 'fedfm[hf]'"
    ) from None
  model: Any = sentencepiece.SentencePieceProcessor()
  try:
    model.LoadFromSerializedProto(path.read_bytes())
  except (OSError, RuntimeError) as e:
    reason = " ".join(str(e).split())
    raise errors.DataError(
      f"{path}: no model of SentencePiece: {reason}"
    ) from None
  size = model.GetPieceSize()
  pieces = [model.IdToPiece(i) for i in range(size)]
  ids = {piece: i for i, piece in enumerate(pieces)}
  added = dict(special_tokens.added(path.parent))
  bos, eos = (i if i >= 0 else None for i in (model.bos_id(), model.eos_id()))
  specials = special_tokens.read(
    path.parent, lambda text: ids.get(text, added.get(text)), (bos, eos)
  )
  return _tokenizer(path, model, pieces, specials)


def _tokenizer(
  path: pathlib.Path,
  model: Any,
  pieces: list[str],
  specials: special_tokens.SpecialTokens,
) -> Tokenizer:
  """Puts the functions together; ids past the pieces are added tokens."""
  control = [i for i in range(len(pieces)) if model.IsControl(i)]
  size = 1 + max(len(pieces) - 1, *specials.by_text.values(), *specials[:3])
  first = model.EncodeAsIds("a")
  adds_space = bool(first) and pieces[first[0]].startswith("\u2581")
  # Bytes of what each piece is written as: spaces are U+2581 in it.
  sizes = np.zeros(size, np.int64)
  for i, piece in enumerate(pieces):
    is_byte = model.IsByte(i)
    sizes[i] = 1 if is_byte else len(piece.replace("\u2581", " ").encode())
  sizes[control] = 0

  def encode(text: str | bytes) -> np.ndarray:
    return np.asarray(model.EncodeAsIds(_as_text(text)), np.int32)

  def measure(text: str | bytes) -> tuple[np.ndarray, np.ndarray]:
    text = _as_text(text)
    found = encode(text)
    ends = np.cumsum(sizes[found])
    # A space that the model puts before the text is none of its own.
    ends = np.maximum(ends - adds_space, 0)
    return found, bytes_of_spans(ends, len(text.encode()))

  def decode(tokens: Sequence[int] | np.ndarray) -> str:
    flat = np.asarray(tokens, np.int64).reshape(-1)
    kept = flat[(flat >= 0) & (flat < len(pieces))]
    return model.DecodeIds([i for i in kept.tolist() if i not in control])

  return Tokenizer(
    encode,
    decode,
    vocab_size=size,
    bos=specials.bos,
    eos=specials.eos,
    pad=specials.pad,
    name=f"sentencepiece:{path.name}:{size}",
    measure=measure,
    specials=specials.by_text | {pieces[i]: i for i in control},
    stops=tuple(i for i in specials.stops if i < size),
  )


def _as_text(text: str | bytes) -> str:
  if isinstance(text, bytes):
    return text.decode(errors="replace")
  utf8(text)  # Refuses lone surrogates.
  return text
