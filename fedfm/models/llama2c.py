"""Reads llama2.c's model files, version 0 (github.com/karpathy/llama2.c).

A header of seven int32 (dim, hidden_dim, layers, heads, kv_heads, vocabulary,
seq_len), then float32 weights. Rotary positions turn neighbouring elements of a
head there, and its halves here: rows of queries and keys change places.
"""

import os
import pathlib
import struct
from typing import Any, NamedTuple

from jax.sharding import Mesh
import numpy as np

from fedfm import errors
from fedfm.models import huggingface
from fedfm.models.decoder_config import DecoderConfig
from fedfm.models.families.family import Family, TensorRow
from fedfm.models.model import Model

PyTree = Any
_HEADER = struct.Struct("<7i")
_FAMILY = Family(
  architecture="llama2.c",
  model_type="llama2.c",
  fields=(),
  prefix="",
  ignored="freq_cis_(real|imag)",
  tensors=(
    TensorRow("embed", "token_embedding"),
    TensorRow("final_norm", "rms_final"),
    TensorRow("lm_head", "wcls", True),
    TensorRow("layers/attention_norm", "{i}.rms_att"),
    TensorRow("layers/mlp_norm", "{i}.rms_ffn"),
    *(
      TensorRow(f"layers/{ours}", "{i}." + theirs, True)
      for ours, theirs in (
        ("q_proj", "wq"),
        ("k_proj", "wk"),
        ("v_proj", "wv"),
        ("o_proj", "wo"),
        ("gate_proj", "w1"),
        ("down_proj", "w2"),
        ("up_proj", "w3"),
      )
    ),
  ),
)


class _Tensor(NamedTuple):
  """A tensor in the file, mapped into memory; see `parameter_source.Tensor`.

  Attributes:
    path: The file.
    name: Its name in `_FAMILY`.
    values: The mapped tensor.
    rows: Order to read its rows in; None as they are.
  """

  path: pathlib.Path
  name: str
  values: np.ndarray
  rows: np.ndarray | None

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  @property
  def dtype(self) -> str:
    return "float32"

  def read(self, index: tuple[slice, ...]) -> np.ndarray:
    if self.rows is None:
      return np.array(self.values[index])
    return self.values[self.rows[index[0]], index[1]]


def find(path: str | os.PathLike) -> pathlib.Path | None:
  """Finds the model file in a folder.

  Args:
    path: A folder, or the file itself.

  Returns:
    The only file `*.bin` that is as large as its header says, or None.
  """
  path = pathlib.Path(path)
  files = sorted(path.glob("*.bin")) if path.is_dir() else [path]
  found = [file for file in files if file.is_file() and _is_model(file)]
  return found[0] if len(found) == 1 else None


def read_config(file: pathlib.Path) -> DecoderConfig:
  """Reads the header.

  Args:
    file: The model file.

  Returns:
    The model's config.

  Raises:
    CheckpointError: It is no model file, or damaged.
  """
  with open(file, "rb") as f:
    header = f.read(_HEADER.size)
  if len(header) < _HEADER.size:
    raise errors.CheckpointError(f"{file}: truncated llama2.c file")
  dim, hidden, layers, heads, kv_heads, vocab, length = _HEADER.unpack(header)
  try:
    return DecoderConfig(
      vocab_size=abs(vocab),  # Below zero, the head is not the table.
      width=dim,
      mlp_width=hidden,
      num_layers=layers,
      num_heads=heads,
      num_kv_heads=kv_heads,
      max_length=length,
      tie_embeddings=vocab > 0,
    )
  except (errors.ConfigError, ZeroDivisionError) as e:
    raise errors.CheckpointError(
      f"{file}: no llama2.c file of version 0: {e}"
    ) from None


def load(
  path: str | os.PathLike,
  mesh: Mesh | None = None,
  dtype: Any = None,
  compute_dtype: str = "float32",
  **overrides: Any,
) -> tuple[Model, PyTree]:
  """Loads a model from a llama2.c file.

  Args:
    path: The file, or a folder with one.
    mesh: As in `huggingface.load`.
    dtype: Likewise; None is the file's float32.
    compute_dtype: Likewise.
    **overrides: Likewise.

  Returns:
    The model, a Llama as `huggingface.save` writes it, and its parameters.

  Raises:
    CheckpointError: There is no such file, or it is damaged.
    ConfigError: As in `huggingface.load`.
  """
  file = find(path)
  if file is None:
    given = pathlib.Path(path)
    if not given.is_file():
      raise errors.CheckpointError(
        f"{path}: found no single llama2.c model file"
      )
    read_config(given)
    raise errors.CheckpointError(
      f"{path}: {given.stat().st_size} bytes, not what its header says"
    )
  config = read_config(file)
  return huggingface.load_tensors(
    file,
    _FAMILY,
    config,
    {t.name: t for t in _tensors(file, config)},
    mesh=mesh,
    dtype=dtype,
    compute_dtype=compute_dtype,
    **overrides,
  )


def _is_model(file: pathlib.Path) -> bool:
  try:
    layout = _layout(read_config(file))
  except errors.CheckpointError:
    return False
  numbers = sum(int(np.prod(shape)) for _, shape in layout)
  return file.stat().st_size == _HEADER.size + 4 * numbers


def _layout(config: DecoderConfig) -> list[tuple[str, tuple[int, ...]]]:
  """Names and shapes in the file's order; stacked over layers where it is."""
  c = config
  n, d, hidden = c.num_layers, c.width, c.mlp_width
  heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  layout: list[tuple[str, tuple[int, ...]]] = [
    ("token_embedding", (c.vocab_size, d)),
    ("{i}.rms_att", (n, d)),
    ("{i}.wq", (n, heads, d)),
    ("{i}.wk", (n, kv_heads, d)),
    ("{i}.wv", (n, kv_heads, d)),
    ("{i}.wo", (n, d, heads)),
    ("{i}.rms_ffn", (n, d)),
    ("{i}.w1", (n, hidden, d)),
    ("{i}.w2", (n, d, hidden)),
    ("{i}.w3", (n, hidden, d)),
    ("rms_final", (d,)),
    ("freq_cis_real", (c.max_length, c.head_dim // 2)),
    ("freq_cis_imag", (c.max_length, c.head_dim // 2)),
  ]
  if not c.tie_embeddings:
    layout.append(("wcls", (c.vocab_size, d)))
  return layout


def _tensors(file: pathlib.Path, config: DecoderConfig) -> list[_Tensor]:
  """Maps the file's tensors into memory, layers apart."""
  values = np.memmap(file, np.dtype("<f4"), "r", offset=_HEADER.size)
  tensors, begin = [], 0
  for name, shape in _layout(config):
    end = begin + int(np.prod(shape))
    whole = values[begin:end].reshape(shape)
    begin = end
    rows = None
    if name in ("{i}.wq", "{i}.wk"):
      pairs = np.arange(shape[1]).reshape(-1, config.head_dim // 2, 2)
      rows = pairs.transpose(0, 2, 1).reshape(-1)
    if "{i}" in name:
      tensors += [
        _Tensor(file, name.format(i=i), layer, rows)
        for i, layer in enumerate(whole)
      ]
    else:
      tensors.append(_Tensor(file, name, whole, rows))
  return tensors
