"""Pairs of an image and a text, made numeric for CLIP."""

from typing import NamedTuple

import numpy as np

from fedfm import errors
from fedfm.data import labelled, text
from fedfm.data.source import ClientSource, Examples
from fedfm.data.tokenizers import Tokenizer


class Shapes(NamedTuple):
  """What a model takes.

  Attributes:
    image: Shape of an image: (size, size, channels).
    vocab_size: Token ids are in [0, vocab_size).
    eos: The token that ends a text; None is the highest of the text.
  """

  image: tuple[int, int, int]
  vocab_size: int
  eos: int | None


def image_text_pairs(
  source: ClientSource,
  shapes: Shapes,
  sequence_length: int,
  tokenizer: Tokenizer | None = None,
  image_key: str = "x",
  text_key: str = "text",
) -> ClientSource:
  """Turns images and texts, or token ids, into numeric pairs.

  Args:
    source: Clients whose `image_key` holds images [examples, size, size,
      channels], or without the last of one, and whose `text_key` holds text or
      token ids [examples, n], which an `eos` ends; what follows it is padding.
    shapes: What the model takes.
    sequence_length: Tokens a row; a text is cut, shorter ids are padded.
    tokenizer: What encodes a text, between its bos and eos; None of token ids.
    image_key: The field of the images.
    text_key: The field of the texts or token ids.

  Returns:
    A `ClientSource` that makes rows when a client is first asked for, and keeps
    the last clients' as `text.cached`. Fields:
      x: float32 [examples, size, size, channels]; integers became [0, 1].
      tokens: int32 [examples, sequence_length].
      token_mask: float32 [examples, sequence_length], 1 up to the eos.

  Raises:
    ConfigError: A tokenizer that ends texts otherwise than the model.
    DataError: (when read) no such field, images of another shape, a token out
      of range, ids that are longer than a row or that nothing ends.

  Examples:
    >>> from fedfm.data.source import from_arrays
    >>> arrays = {"x": np.zeros([1, 2, 2], np.uint8), "ids": [[5, 9, 0]]}
    >>> pairs = image_text_pairs(
    ...   from_arrays({"ann": arrays}), Shapes((2, 2, 1), 10, 9), 4,
    ...   text_key="ids")
    >>> pairs.read("ann")["token_mask"].tolist()
    [[1.0, 1.0, 0.0, 0.0]]
  """
  text.check_length(sequence_length)
  if tokenizer is not None:
    _check_end(tokenizer, shapes.eos)

  def read(client_id: str) -> Examples:
    arrays = source.read(client_id)
    x = labelled.rows_of_images(arrays, client_id, image_key)
    x = labelled.with_channels(x, client_id, image_key, shapes.image)
    if tokenizer is None:
      where = f"client {client_id!r}: field {text_key!r}"
      ids = labelled.field(arrays, client_id, text_key)
      return {"x": x, **_rows_of_ids(ids, shapes, sequence_length, where)}
    documents = text.texts(source, client_id, text_key)
    try:
      rows = labelled.rows_of_texts(documents, tokenizer, sequence_length)
    except errors.DataError as e:
      raise errors.DataError(f"client {client_id!r}: {e}") from None
    return {"x": x, **rows}

  rows = text.cached(source.ids, read)
  return ClientSource(source.ids, source.size_fn, rows.read_fn)


def _check_end(tokenizer: Tokenizer, eos: int | None) -> None:
  """The model must find the end of a text where the tokenizer puts it."""
  if eos is None:
    wrong = max(tokenizer.bos, tokenizer.pad) > tokenizer.eos
    found = "the highest token of a text"
  else:
    wrong, found = tokenizer.eos != eos, f"token {eos}"
  if wrong:
    raise errors.ConfigError(
      f"model.path: the model reads a text at {found}, but its tokenizer "
      f"({tokenizer.name}) ends texts with {tokenizer.eos} and pads with "
      f"{tokenizer.pad}"
    )


def _rows_of_ids(
  ids: np.ndarray, shapes: Shapes, length: int, where: str
) -> Examples:
  """Checks token ids [examples, n], and pads them."""
  if ids.ndim != 2 or ids.dtype.kind not in "iu":
    raise errors.DataError(
      f"{where} is {ids.dtype} of shape {list(ids.shape)}, expected integers "
      "[examples, tokens]"
    )
  if not 0 < ids.shape[1] <= length:
    raise errors.DataError(
      f"{where} holds {ids.shape[1]} tokens a text, expected 1 to "
      f"data.sequence_length = {length}"
    )
  bad = (ids < 0) | (ids >= shapes.vocab_size)
  if bad.any():
    raise errors.DataError(
      f"{where} holds token {ids[bad][0]}, expected 0 to "
      f"{shapes.vocab_size - 1}"
    )
  ends = ids == shapes.eos
  if shapes.eos is None:
    ends = ids == ids.max(axis=1, keepdims=True)
  if not ends.any(axis=1).all():
    row = int(np.argmin(ends.any(axis=1)))
    raise errors.DataError(
      f"{where}: example {row} has no token {shapes.eos}, which ends a text"
    )
  # Padding is no higher than the end of a text, wherever that is.
  tokens = np.zeros((len(ids), length), np.int32)
  tokens[:, : ids.shape[1]] = ids
  mask = np.arange(length) <= np.argmax(ends, axis=1)[:, None]
  return {"tokens": tokens, "token_mask": mask.astype(np.float32)}
