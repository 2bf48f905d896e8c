"""Writes parameters as the tensors of files, one by one."""

from collections.abc import Iterator, Mapping
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from fedfm import errors
from fedfm.models import tensor_files
from fedfm.models.families.family import Family, TensorRow


class Written(NamedTuple):
  """A tensor to write: one parameter of one layer, or several side by side."""

  name: str
  parts: list[Any]
  layer: int | None
  transpose: bool

  @property
  def dtype(self) -> str:
    return jnp.result_type(*self.parts).name

  @property
  def shape(self) -> tuple[int, ...]:
    first = self.parts[0].shape
    own = first if self.layer is None else first[1:]
    if len(self.parts) == 1:
      whole = own
    else:
      whole = (*own[:-1], sum(x.shape[-1] for x in self.parts))
    return whole[::-1] if self.transpose else whole

  @property
  def num_bytes(self) -> int:
    return int(np.prod(self.shape)) * jnp.dtype(self.dtype).itemsize

  def value(self) -> np.ndarray:
    """Brings it to the host."""
    parts = [
      _to_host(x if self.layer is None else x[self.layer]) for x in self.parts
    ]
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    whole = whole.astype(self.dtype, copy=False)
    return whole.T if self.transpose else whole


def _tensors(family: Family, arrays: Mapping[str, Any]) -> Iterator[Written]:
  """Yields what a family's files hold, in the order of its table."""
  by_name: dict[str, list[TensorRow]] = {}
  for row in family.tensors:
    if row.path in arrays:
      by_name.setdefault(row.name, []).append(row)
  for name, rows in by_name.items():
    parts = [arrays[row.path] for row in rows]
    layers = range(parts[0].shape[0]) if "{i}" in name else (None,)
    for i in layers:
      yield Written(name.format(i=i), parts, i, rows[0].transpose)


def write(
  directory: pathlib.Path,
  family: Family,
  arrays: Mapping[str, Any],
  others: Mapping[str, Any],
  max_shard_bytes: int,
) -> None:
  """Writes shards one by one, then their index, then other JSON files.

  In a run of several processes all call it and the first one writes.

  Args:
    directory: Folder to write; made if needed.
    family: The table of names.
    arrays: Path -> parameter.
    others: File name -> JSON object.
    max_shard_bytes: Larger models are split over several files.

  Raises:
    CheckpointError: The folder holds weights that would be mixed with these,
      or cannot be made.
  """
  shards: list[list[Written]] = [[]]
  free = max_shard_bytes
  for tensor in _tensors(family, arrays):
    if tensor.num_bytes > free and shards[-1]:
      shards.append([])
      free = max_shard_bytes
    shards[-1].append(tensor)
    free -= tensor.num_bytes
  files = [
    tensor_files.SINGLE
    if len(shards) == 1
    else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
    for i in range(len(shards))
  ]
  writes = jax.process_index() == 0
  index: dict[str, Any] = {} if len(files) == 1 else {tensor_files.INDEX: None}
  if writes:
    tensor_files.make_folder(directory)
    for path in sorted(directory.glob("model*.safetensors*")):
      if path.name not in {*files, *index}:
        raise errors.CheckpointError(
          f"{path}: belongs to other weights; save into an empty folder"
        )
  weight_map, total = {}, 0
  for file, shard in zip(files, shards):
    for tensor in shard:
      weight_map[tensor.name], total = file, total + tensor.num_bytes
    # All processes gather each tensor, whoever writes it.
    values = (tensor.value() for tensor in shard)
    if writes:
      part = directory / f"{file}.part"
      layout = {t.name: (t.dtype, t.shape) for t in shard}
      tensor_files.write_file(part, layout, values)
      os.replace(part, directory / file)
    else:
      for _ in values:
        pass
  if index:
    index[tensor_files.INDEX] = {
      "metadata": {"total_size": total},
      "weight_map": weight_map,
    }
  for file, value in {**index, **others}.items():
    if writes:
      part = directory / f"{file}.part"
      part.write_text(json.dumps(value, indent=2) + "\n")
      os.replace(part, directory / file)


def _to_host(x: Any) -> np.ndarray:
  """Brings one array to the host, from all processes if it is spread."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)
