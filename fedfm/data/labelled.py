"""Labelled texts and images: read from files, made numeric for a classifier."""

from collections.abc import Mapping
import io
import os
import types
from typing import Any
import zipfile

import numpy as np

from fedfm import errors
from fedfm.data import holdout, partition, sampling, text
from fedfm.data.source import (
  ClientSource,
  Examples,
  FederatedData,
  from_arrays,
)
from fedfm.data.tokenizers import Tokenizer

# A test set that is nobody's is evaluated in so many parts, side by side.
_TEST_PARTS = 8
_KERAS = types.MappingProxyType({"x": "x", "y": "label"})
_POLARITY = {"rt-polarity.neg": 0, "rt-polarity.pos": 1}


def from_npz(
  path: str | os.PathLike,
  fields: Mapping[str, str] = _KERAS,
  min_part: int = 1,
) -> FederatedData:
  """Reads an archive of x_train, y_train, x_test and y_test, as Keras's MNIST.

  Args:
    path: The `.npz` file.
    fields: {array, without "_train" and "_test": field to read it as}.
    min_part: Test examples that are worth a part.

  Returns:
    `train`, one client "all", to be dealt out by `data.partition`, and the
    population "test" in up to 8 parts; by default of the fields "x" [examples,
    ...] and "label".

  Raises:
    DataError: A file that cannot be read, or without these arrays.
  """
  names = [f"{a}_{part}" for part in ("train", "test") for a in fields]
  try:
    with np.load(path, allow_pickle=False) as archive:
      arrays = {name: archive[name] for name in names if name in archive}
  except (OSError, ValueError, zipfile.BadZipFile) as e:
    raise errors.DataError(f"{path}: cannot be read: {e}") from None
  if missing := [name for name in names if name not in arrays]:
    raise errors.DataError(
      f"{path}: has no array {missing[0]}, expected {', '.join(names)}"
    )
  train, test = (
    {field: arrays[f"{a}_{part}"] for a, field in fields.items()}
    for part in ("train", "test")
  )
  return _pooled(train, test, min_part)


def sentence_polarity(
  path: str | os.PathLike, heldout_fraction: float
) -> FederatedData:
  """Reads the zip of the sentence polarity data set (Pang and Lee 2005).

  Args:
    path: The archive, with rt-polarity.neg and rt-polarity.pos in it.
    heldout_fraction: Share of the sentences that is for testing.

  Returns:
    As `from_npz`; fields "text" and "label", 0 negative and 1 positive.

  Raises:
    DataError: A file that cannot be read, or without these two.
  """
  texts: list[str] = []
  labels: list[int] = []
  try:
    with zipfile.ZipFile(path) as archive:
      members = {name.rsplit("/", 1)[-1]: name for name in archive.namelist()}
      for name, label in _POLARITY.items():
        if name not in members:
          raise errors.DataError(f"{path}: has no {name}")
        # Latin-1, by its README.
        content = io.TextIOWrapper(archive.open(members[name]), "latin-1")
        lines = [line.strip() for line in content.read().split("\n")]
        lines = [line for line in lines if line]
        texts += lines
        labels += [label] * len(lines)
  except (OSError, zipfile.BadZipFile) as e:
    raise errors.DataError(f"{path}: cannot be read: {e}") from None
  # Else the order of a client's rows would tell their labels.
  order = sampling.generator("sentence_polarity", 0).permutation(len(texts))
  arrays = {
    "text": np.array(texts, object)[order],
    "label": np.array(labels)[order],
  }
  split = holdout.hold_out(from_arrays({"all": arrays}), 0.0, heldout_fraction)
  if "seen" not in split.evals:
    raise errors.ConfigError(
      f"data.heldout_fraction: {heldout_fraction} leaves nothing to test on"
    )
  return _pooled(split.train.read("all"), split.evals["seen"].read("all"))


def _pooled(train: Any, test: Any, min_part: int = 1) -> FederatedData:
  count = len(next(iter(test.values())))
  parts = max(1, min(_TEST_PARTS, count // min_part))
  return FederatedData(
    train=from_arrays({"all": train}),
    evals={"test": partition.iid(test, parts)},
  )


def tokenize_labelled(
  source: ClientSource,
  tokenizer: Tokenizer,
  sequence_length: int,
  num_classes: int,
  text_key: str = "text",
  label_key: str = "label",
) -> ClientSource:
  """Turns labelled texts into a row of tokens each, cut where they are long.

  Args:
    source: Clients whose `text_key` holds text [examples].
    tokenizer: What encodes; a text is put between its bos and eos.
    sequence_length: Tokens a row, at least 2.
    num_classes: Labels are in [0, num_classes).
    text_key: The field of the text.
    label_key: The field of the labels, integers.

  Returns:
    A `ClientSource` that tokenizes when a client is first asked for. Fields:
      tokens: int32 [examples, sequence_length], pad at the end.
      token_mask: float32 [examples, sequence_length], 1 where it is no pad.
      label: int32 [examples].

  Raises:
    DataError: (when read) no such field, a field of another kind, or a label
      out of range.

  Examples:
    >>> from fedfm.data.tokenizers import byte_tokenizer
    >>> texts = from_arrays({"ann": {"text": ["abc"], "label": [1]}})
    >>> rows = tokenize_labelled(texts, byte_tokenizer(), 4, 2).read("ann")
    >>> rows["tokens"].tolist(), rows["label"].tolist()
    ([[256, 97, 98, 257]], [1])
  """
  text.check_length(sequence_length)

  def read(client_id: str) -> Examples:
    documents = text.texts(source, client_id, text_key)
    labels = _labels(source, client_id, label_key, num_classes)
    try:
      rows = rows_of_texts(documents, tokenizer, sequence_length)
    except errors.DataError as e:
      raise errors.DataError(f"client {client_id!r}: {e}") from None
    return _frozen(rows | {"label": labels})

  rows = text.cached(source.ids, read)
  return ClientSource(source.ids, source.size_fn, rows.read_fn)


def rows_of_texts(
  documents: np.ndarray, tokenizer: Tokenizer, sequence_length: int
) -> Examples:
  """Encodes each text between a bos and an eos, cut where it is long.

  Args:
    documents: Texts, object array [examples] of str or bytes.
    tokenizer: What encodes.
    sequence_length: Tokens a row, at least 2.

  Returns:
    "tokens" and "token_mask" of `tokenize_labelled`.
  """
  tokens = np.full((len(documents), sequence_length), tokenizer.pad, np.int32)
  mask = np.zeros(tokens.shape, np.float32)
  for i, document in enumerate(documents):
    body = tokenizer.encode(document)[: sequence_length - 2]
    row = [tokenizer.bos, *body, tokenizer.eos]
    tokens[i, : len(row)], mask[i, : len(row)] = row, 1
  return {"tokens": tokens, "token_mask": mask}


def images_labelled(
  source: ClientSource,
  num_classes: int,
  image_key: str = "x",
  label_key: str = "label",
  shape: tuple[int, int, int] | None = None,
) -> ClientSource:
  """Turns labelled images into float32; integers up to 255 into [0, 1].

  Args:
    source: Clients whose `image_key` holds images [examples, ...].
    num_classes: Labels are in [0, num_classes).
    image_key: The field of the images.
    label_key: The field of the labels, integers.
    shape: What the model takes, (size, size, channels); None for anything.

  Returns:
    A `ClientSource` of fields "x" and "label", converted when read.

  Raises:
    DataError: (when read, and at once for the first client) no such field, a
      field of another kind, images of another shape, or a label out of range.
  """

  def read(client_id: str) -> Examples:
    arrays = source.read(client_id)
    x = rows_of_images(arrays, client_id, image_key)
    if shape is not None:
      x = with_channels(x, client_id, image_key, shape)
    labels = _labels(source, client_id, label_key, num_classes)
    return _frozen({"x": x, "label": labels})

  if shape is not None and source.ids:
    first = source.ids[0]
    images = field(source.read(first), first, image_key)
    with_channels(images, first, image_key, shape)
  return ClientSource(source.ids, source.size_fn, read)


def rows_of_images(arrays: Examples, client_id: str, key: str) -> np.ndarray:
  """Reads images as float32; integers up to 255 become [0, 1].

  Args:
    arrays: A client's fields.
    client_id: The client, for messages.
    key: The field of the images.

  Returns:
    float32 [examples, ...].

  Raises:
    DataError: No such field, or no numbers.
  """
  images = field(arrays, client_id, key)
  if images.dtype.kind not in "fiu":
    raise errors.DataError(
      f"client {client_id!r}: field {key!r} is {images.dtype}, expected images "
      "of numbers"
    )
  scale = 1 if images.dtype.kind == "f" else 255
  return images.astype(np.float32) / np.float32(scale)


def with_channels(
  images: np.ndarray, client_id: str, key: str, shape: tuple[int, int, int]
) -> np.ndarray:
  """Checks images' shape; gives those of one channel its axis.

  Args:
    images: [examples, size, size, channels], or [examples, size, size].
    client_id: The client, for messages.
    key: The field of the images, for messages.
    shape: What the model takes, (size, size, channels).

  Returns:
    [examples, size, size, channels].

  Raises:
    DataError: Another shape.
  """
  if images.shape[1:] == shape[:2] and shape[2] == 1:
    images = images[..., None]
  if images.shape[1:] != shape:
    raise errors.DataError(
      f"client {client_id!r}: field {key!r} holds images of "
      f"{list(images.shape[1:])}, but the model's are {list(shape)}"
    )
  return images


def check_labels(
  source: ClientSource, num_classes: int, label_key: str = "label"
) -> None:
  """Reads all clients, and checks their labels before a run.

  Args:
    source: The clients.
    num_classes: Labels are in [0, num_classes).
    label_key: The field of the labels.

  Raises:
    DataError: No such field, not integers, or one out of range.
  """
  for client_id in source.ids:
    _labels(source, client_id, label_key, num_classes)


def _frozen(arrays: Examples) -> Examples:
  for x in arrays.values():
    x.flags.writeable = False
  return arrays


def field(arrays: Examples, client_id: str, key: str) -> np.ndarray:
  """Picks a client's field; DataError where it has none of the name."""
  if key not in arrays:
    raise errors.DataError(
      f"client {client_id!r}: no field {key!r}{errors.nearest(key, arrays)}"
    )
  return arrays[key]


def _labels(
  source: ClientSource, client_id: str, key: str, num_classes: int
) -> np.ndarray:
  """Reads labels, int32 [examples]; one out of range would one-hot to zero."""
  labels = field(source.read(client_id), client_id, key)
  if labels.ndim != 1 or labels.dtype.kind not in "iu":
    raise errors.DataError(
      f"client {client_id!r}: field {key!r} is {labels.dtype} of shape "
      f"{list(labels.shape)}, expected integers [examples]"
    )
  bad = (labels < 0) | (labels >= num_classes)
  if bad.any():
    raise errors.DataError(
      f"client {client_id!r}: field {key!r} holds label {labels[bad][0]}, "
      f"expected 0 to {num_classes - 1}"
    )
  return labels.astype(np.int32)
