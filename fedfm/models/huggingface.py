"""Reads and writes Hugging Face folders: config.json and safetensors files.

`fedfm.models.families` holds the table of each architecture; what is here is
the same for all. Only safetensors is read: pickles run code.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
from safetensors import numpy as safetensors_numpy

from fedfm import errors, sharding, trees
from fedfm.models import families, tensor_files
from fedfm.models.decoder import DecoderConfig, decoder
from fedfm.models.model import Model

PyTree = Any
CONFIG = "config.json"


def load(
  directory: str | os.PathLike,
  mesh: Mesh | None = None,
  dtype: Any = None,
  compute_dtype: str = "float32",
  **overrides: Any,
) -> tuple[Model, PyTree]:
  """Loads a model from a Hugging Face folder.

  With a mesh every array is built shard by shard from slices of the file, so
  that host memory holds one stacked parameter at most, not the model.

  Args:
    directory: Folder with config.json and either model.safetensors or shards
      with model.safetensors.index.json.
    mesh: Where to put the parameters; None is the default device.
    dtype: Dtype of the parameters; None keeps the file's.
    compute_dtype: Dtype of the activations: `DecoderConfig.dtype`.
    **overrides: Other fields of `DecoderConfig`, such as `scan_layers`.

  Returns:
    The model and its parameters.

  Raises:
    CheckpointError: The folder is incomplete, damaged or not supported.
    ConfigError: An unknown override, or a mesh that does not divide a size.
  """
  directory = pathlib.Path(directory)
  known = {f.name for f in dataclasses.fields(DecoderConfig)}
  for name in overrides:
    if name not in known - {"dtype", "param_dtype"}:
      raise errors.ConfigError(
        f"model.{name}: unknown override{errors.nearest(name, known)}"
      )
  family, config = families.read_config(directory / CONFIG)
  config = dataclasses.replace(
    config, dtype=_float_dtype("compute_dtype", compute_dtype), **overrides
  )
  files = tensor_files.open_folder(directory)
  leaves = _match(directory, family, config, files)
  if dtype is not None:
    dtype = _float_dtype("dtype", dtype)
    leaves = [leaf._replace(dtype=dtype) for leaf in leaves]
  if not jax.config.read("jax_enable_x64"):
    for leaf in leaves:
      if leaf.dtype == "float64":
        raise errors.CheckpointError(
          f"{directory}: {leaf.sources[0].name} would be float64, which needs"
          " jax_enable_x64; give dtype='float32'"
        )
  model = decoder(dataclasses.replace(config, param_dtype=leaves[0].dtype))
  treedef = jax.tree.structure(model.shapes)
  shapes = treedef.unflatten(
    [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
  )
  if mesh is None:
    arrays = [jnp.asarray(leaf.read()) for leaf in leaves]
  else:
    places = sharding.shardings(mesh, model.axes, shapes)
    arrays = [_build(*pair) for pair in zip(leaves, jax.tree.leaves(places))]
  return model._replace(shapes=shapes), treedef.unflatten(arrays)


def save(
  directory: str | os.PathLike,
  model: Model,
  params: PyTree,
  max_shard_bytes: int = 4 << 30,
) -> None:
  """Writes a folder that Hugging Face (and `load`) reads.

  In a run of several processes all call it and the first one writes.

  Args:
    directory: Folder to write; made if needed.
    model: The model, with a `DecoderConfig`.
    params: Its parameters (adapters merged), in any float dtype.
    max_shard_bytes: Larger models are split over several files; host memory
      holds one of them.

  Raises:
    CheckpointError: The parameters are not the model's, or the folder holds
      weights that would be mixed with these.
  """
  if not isinstance(model.config, DecoderConfig):
    raise errors.CheckpointError(
      f"{directory}: only decoders can be saved, got a model with config "
      f"{type(model.config).__name__}"
    )
  names, leaves = trees.paths(params), jax.tree.leaves(params)
  got = {n: getattr(x, "shape", None) for n, x in zip(names, leaves)}
  want = zip(trees.paths(model.shapes), jax.tree.leaves(model.shapes))
  want = {n: x.shape for n, x in want}
  for name in sorted(got.keys() | want.keys()):
    if got.get(name) != want.get(name):
      raise errors.CheckpointError(
        f"{directory}: parameter {name} has shape {got.get(name)}, expected "
        f"{want.get(name)}"
      )
  family = families.FAMILIES["LlamaForCausalLM"]
  arrays = dict(zip(names, leaves))
  shards: list[list[tuple[str, jax.Array, int | None, bool]]] = [[]]
  free = max_shard_bytes
  for row in family.tensors:
    if row.path not in arrays:
      continue
    x = arrays[row.path]
    stacked = "{i}" in row.name
    size = x.nbytes // (x.shape[0] if stacked else 1)
    for i in range(x.shape[0]) if stacked else (None,):
      if size > free and shards[-1]:
        shards.append([])
        free = max_shard_bytes
      shards[-1].append((row.name.format(i=i), x, i, row.transpose))
      free -= size
  count = len(shards)
  files = [
    tensor_files.SINGLE
    if count == 1
    else f"model-{i + 1:05}-of-{count:05}.safetensors"
    for i in range(count)
  ]
  dtype = jnp.dtype(arrays["embed"].dtype).name
  config = families.write_config(family, model.config, dtype)
  _write(pathlib.Path(directory), files, shards, config)


def _write(directory, files, shards, config) -> None:
  """Writes shards one by one, then the index, then config.json."""
  writes = jax.process_index() == 0
  index: dict[str, Any] = {} if len(files) == 1 else {tensor_files.INDEX: None}
  if writes:
    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(directory.glob("model*.safetensors*")):
      if path.name not in {*files, *index}:
        raise errors.CheckpointError(
          f"{path}: belongs to other weights; save into an empty folder"
        )
  weight_map, total = {}, 0
  for file, shard in zip(files, shards):
    tensors = {}
    for name, x, layer, transpose in shard:
      value = _to_host(x if layer is None else x[layer])
      # safetensors writes a transposed view in the wrong order: copy it.
      tensors[name] = np.ascontiguousarray(value.T if transpose else value)
      weight_map[name], total = file, total + value.nbytes
    if writes:
      part = directory / f"{file}.part"
      safetensors_numpy.save_file(tensors, part, metadata={"format": "pt"})
      os.replace(part, directory / file)
  if index:
    index[tensor_files.INDEX] = {
      "metadata": {"total_size": total},
      "weight_map": weight_map,
    }
  for file, value in {**index, CONFIG: config}.items():
    if writes:
      part = directory / f"{file}.part"
      part.write_text(json.dumps(value, indent=2) + "\n")
      os.replace(part, directory / file)


def _to_host(x: jax.Array) -> np.ndarray:
  """Brings one array to the host, from all processes if it is spread."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


class _Leaf(NamedTuple):
  """One of our parameters and the tensors it is read from.

  Attributes:
    sources: One per layer, or just one.
    shape: Our shape, stacked over layers where `stacked`.
    dtype: Dtype to build it in.
    stacked: Whether it has a leading axis of layers.
    transpose: Whether the sources are transposed.
  """

  sources: Sequence[tensor_files.TensorEntry]
  shape: tuple[int, ...]
  dtype: str
  stacked: bool
  transpose: bool

  def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
    """Reads our slice `index` from the files, refusing NaN and infinity."""
    if index is None:
      index = tuple(slice(0, n) for n in self.shape)
    own = index[1:] if self.stacked else index
    sources = self.sources[index[0]] if self.stacked else self.sources
    parts = []
    for source in sources:
      part = source.read(own[::-1] if self.transpose else own)
      with np.errstate(over="ignore"):  # Overflow is refused just below.
        part = (part.T if self.transpose else part).astype(self.dtype)
      if not np.isfinite(part).all():
        raise errors.CheckpointError(
          f"{source.path}: tensor {source.name} holds NaN or infinity as "
          f"{self.dtype}"
        )
      parts.append(part)
    return np.stack(parts) if self.stacked else parts[0]


def _build(leaf: _Leaf, place: jax.sharding.Sharding) -> jax.Array:
  """Builds a sharded array; what several devices share is read once."""
  done: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

  def read(index):
    bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape))
    if bounds not in done:
      done[bounds] = leaf.read(tuple(slice(*pair) for pair in bounds))
    return done[bounds]

  return jax.make_array_from_callback(leaf.shape, place, read)


def _match(
  directory: pathlib.Path,
  family: families.Family,
  config: DecoderConfig,
  entries: Mapping[str, tensor_files.TensorEntry],
) -> list[_Leaf]:
  """Pairs our parameters, in leaf order, with the tensors of the files."""
  rows = {row.path: row for row in family.tensors}
  shapes = decoder(config).shapes
  used: set[str] = set()

  def leaf(path: str, shape: tuple[int, ...]) -> _Leaf:
    row = rows[path]
    stacked = "{i}" in row.name
    layers = range(shape[0]) if stacked else (None,)
    expected = shape[1:] if stacked else shape
    expected = expected[::-1] if row.transpose else expected
    sources = []
    for name in (row.name.format(i=i) for i in layers):
      if name not in entries:
        raise errors.CheckpointError(f"{directory}: tensor {name} is missing")
      source = entries[name]
      if source.shape != expected:
        hint = " (transposed?)" if source.shape == expected[::-1] else ""
        raise errors.CheckpointError(
          f"{source.path}: tensor {name} has shape {list(source.shape)}, "
          f"expected {list(expected)}{hint}"
        )
      sources.append(source)
      used.add(name)
    dtype = sources[0].dtype
    for source in sources:
      dtype = jnp.promote_types(dtype, source.dtype).name
    return _Leaf(sources, shape, dtype, stacked, row.transpose)

  leaves = [
    leaf(path, x.shape)
    for path, x in zip(trees.paths(shapes), jax.tree.leaves(shapes))
  ]
  extra = [
    name
    for name in sorted(entries.keys() - used)
    if not re.fullmatch(family.ignored, name)
  ]
  if config.tie_embeddings and rows["lm_head"].name in extra:
    # Some files of tied models spell the head out; it must be the table.
    head, table = entries[rows["lm_head"].name], entries[rows["embed"].name]
    whole = (slice(None), slice(None))
    if head.shape == table.shape and np.array_equal(
      head.read(whole), table.read(whole)
    ):
      extra.remove(head.name)
  if extra:
    raise errors.CheckpointError(
      f"{entries[extra[0]].path}: tensor {extra[0]} {entries[extra[0]].shape} "
      f"is not part of the model ({len(extra)} such)"
    )
  return leaves


def _float_dtype(name: str, dtype: Any) -> str:
  """Returns the name of a float dtype that files and models can hold."""
  allowed = ("float64", "float32", "float16", "bfloat16")
  try:
    value = jnp.dtype(dtype).name
  except TypeError:
    value = str(dtype)
  if value not in allowed:
    raise errors.ConfigError(
      f"{name}: got {dtype!r}, expected one of {', '.join(allowed)}"
    )
  return value
