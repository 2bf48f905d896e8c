"""Reads and writes Hugging Face folders: config.json and safetensors files.

`fedfm.models.families` holds the table of each architecture; what is here is
the same for all. Only safetensors is read: pickles run code.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedfm import errors, sharding, trees
from fedfm.models import (
  families,
  field_types,
  parameter_source,
  parameter_writer,
  quantization,
  tensor_files,
)
from fedfm.models.build import build
from fedfm.models.families.family import Family
from fedfm.models.model import Model
from fedfm.models.parameter_source import Tensor

PyTree = Any
CONFIG = "config.json"
# Patterns of what `save(like=...)` brings along.
_COMPANIONS = (
  "tokenizer.json",
  "tokenizer_config.json",
  "hashed_words.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "generation_config.json",
  # Vocabularies: SentencePiece's, and llama2.c's.
  "tok*.model",
  "tok*.bin",
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LABELS = ("id2label", "label2id")
# Parameters of heads, which a folder with another head lacks; the tensors of
# other heads, which are left.
_HEADS = tuple(
  path + end
  for path in ("pooler", "classifier_dense", "classifier")
  for end in ("", "_bias")
)
_HEAD_TENSORS = r"(pooler|classifier|cls|lm_head)\..*"


def load(
  directory: str | os.PathLike,
  mesh: Mesh | None = None,
  dtype: Any = None,
  compute_dtype: str = "float32",
  quantize: str = "",
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
    compute_dtype: Dtype of the activations: the config's `dtype`.
    quantize: "int8" or "nf4" makes the kernels so, each as it is read: the
      float model is never held. See `models.quantization`.
    **overrides: Other fields of the model's config, such as `scan_layers`.
      Another `num_classes` than the folder's puts a new classifier, drawn from
      key 0, on its layers.

  Returns:
    The model and its parameters.

  Raises:
    CheckpointError: The folder is incomplete, damaged or not supported.
    ConfigError: An unknown override, or a mesh that does not divide a size.
  """
  directory = pathlib.Path(directory)
  family, config = families.read_config(directory / CONFIG)
  return load_tensors(
    directory,
    family,
    config,
    tensor_files.open_folder(directory),
    mesh=mesh,
    dtype=dtype,
    compute_dtype=compute_dtype,
    quantize=quantize,
    **overrides,
  )


def load_tensors(
  where: str | os.PathLike,
  family: Family,
  config: Any,
  tensors: Mapping[str, Tensor],
  *,
  mesh: Mesh | None = None,
  dtype: Any = None,
  compute_dtype: str = "float32",
  quantize: str = "",
  **overrides: Any,
) -> tuple[Model, PyTree]:
  """Builds a model and its parameters out of open files of any format.

  Args:
    where: What to name in messages.
    family: The table of the tensors' names.
    config: What the files say of the model.
    tensors: By name.
    mesh: As in `load`.
    dtype: Likewise.
    compute_dtype: Likewise.
    quantize: Likewise.
    **overrides: Likewise.

  Returns:
    The model and its parameters.

  Raises:
    CheckpointError: The tensors are not the model's.
    ConfigError: As `load` does.
  """
  of_folder, config = config, with_overrides(config, compute_dtype, overrides)
  shapes, new = build(config).shapes, ()
  if _num_classes(config) != _num_classes(of_folder):
    family, new = families.family_of(config), _HEADS
    family = family._replace(ignored=rf"{family.ignored}|{_HEAD_TENSORS}")
  sources = parameter_source.match(where, family, shapes, tensors, new)
  read = [source for source in sources if source is not None]
  if dtype is not None:
    dtype = float_dtype("dtype", dtype)
    read = [source._replace(dtype=dtype) for source in read]
  if not jax.config.read("jax_enable_x64"):
    for source in read:
      if source.dtype == "float64":
        raise errors.CheckpointError(
          f"{where}: {source.tensors[0].name} would be float64, which needs"
          " jax_enable_x64; give dtype='float32'"
        )
  model = build(dataclasses.replace(config, param_dtype=read[0].dtype))
  treedef = jax.tree.structure(shapes)
  found, leaves = iter(read), []
  for source, shape in zip(sources, jax.tree.leaves(model.shapes)):
    dtype_of = shape if source is None else next(found)
    leaves.append(jax.ShapeDtypeStruct(shape.shape, dtype_of.dtype))
  shapes = treedef.unflatten(leaves)
  places: Any = [None] * len(sources)
  if mesh is not None:
    places = jax.tree.leaves(sharding.shardings(mesh, model.axes, shapes))
  model = model._replace(shapes=shapes)
  read, drawn = iter(read), iter(_drawn(model, sources, places))
  arrays = (
    next(drawn) if s is None else parameter_source.build(next(read), place)
    for s, place in zip(sources, places)
  )
  if quantize:
    return quantization.quantize(model, quantize, arrays, mesh)
  return model, treedef.unflatten(arrays)


def _num_classes(config: Any) -> int:
  return getattr(config, "num_classes", 0)


def _drawn(model: Model, sources: Sequence[Any], places: Sequence[Any]) -> list:
  """Draws the parameters that no file has, and no other."""
  at = [i for i, source in enumerate(sources) if source is None]
  if not at:
    return []

  def draw(key):
    leaves = jax.tree.leaves(model.init(key))
    return [leaves[i] for i in at]

  return jax.jit(draw, out_shardings=[places[i] for i in at])(jax.random.key(0))


def with_overrides(
  config: Any, compute_dtype: str, overrides: Mapping[str, Any]
) -> Any:
  """Changes how a model runs.

  Args:
    config: What its files say.
    compute_dtype: Dtype of the activations.
    overrides: Other fields but the dtypes.

  Returns:
    The config, changed.

  Raises:
    ConfigError: An unknown field, or a value out of range.
  """
  known = {f.name for f in dataclasses.fields(config)}
  for name in overrides:
    if name not in known - {"dtype", "param_dtype"}:
      raise errors.ConfigError(
        f"model.{name}: unknown override{errors.nearest(name, known)}"
      )
  overrides = dict(overrides)
  wanted = overrides.pop("num_classes", _num_classes(config))
  if wanted != _num_classes(config):
    config = families.with_classifier(config, wanted)
  return dataclasses.replace(
    config, dtype=float_dtype("compute_dtype", compute_dtype), **overrides
  )


def save(
  directory: str | os.PathLike,
  model: Model,
  params: PyTree,
  max_shard_bytes: int = 4 << 30,
  like: str | os.PathLike | None = None,
) -> None:
  """Writes a folder that Hugging Face (and `load`) reads.

  In a run of several processes all call it and the first one writes. Tensors
  are brought to the host and written one by one.

  Args:
    directory: Folder to write; made if needed.
    model: The model, with a config of ours.
    params: Its parameters (adapters merged), in any float dtype.
    max_shard_bytes: Larger models are split over several files.
    like: A model's folder, or file, whose tokenizer and generation settings go
      along, such as the one that the model was loaded from.

  Raises:
    CheckpointError: The parameters are not the model's, or the folder holds
      weights that would be mixed with these.
    ConfigError: Options that no architecture of Hugging Face's has together.
  """
  directory = pathlib.Path(directory)
  if not hasattr(model.config, "architecture"):
    raise errors.CheckpointError(
      f"{directory}: only models of {__package__} can be saved, got one with "
      f"config {type(model.config).__name__}"
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
  arrays = dict(zip(names, leaves))
  config = config_file(model, params, like)
  parameter_writer.write(
    directory,
    families.family_of(model.config),
    arrays,
    {CONFIG: config},
    max_shard_bytes,
  )
  if jax.process_index() == 0:
    copy_companions(like, directory)


def config_file(
  model: Model, params: PyTree, like: str | os.PathLike | None = None
) -> dict[str, Any]:
  """Returns what `save` writes to config.json.

  Args:
    model: The model, with a config of ours.
    params: Its parameters.
    like: As in `save`.

  Raises:
    CheckpointError: `like` is not there.
    ConfigError: As `save` does.
  """
  table = params.get("embed", jax.tree.leaves(params)[0])
  config = families.write_config(model.config, jnp.dtype(table.dtype).name)
  # Absent, each would have a default.
  config = dict.fromkeys(_TOKEN_IDS) | config
  path = None if like is None else pathlib.Path(like)
  if path is not None and not path.exists():
    raise errors.CheckpointError(f"{path}: no such file or folder")
  # A file of llama2.c has no config.json beside it.
  if path is not None and (path / CONFIG).is_file():
    original = tensor_files.read_json(path / CONFIG)
    kept = [name for name in _TOKEN_IDS if name in original]
    labels = original.get("id2label") or ()
    if len(labels) == _num_classes(model.config) > 0:
      kept += [name for name in _LABELS if name in original]
    config |= {name: original[name] for name in kept}
  return config


def copy_companions(
  like: str | os.PathLike | None, directory: pathlib.Path
) -> None:
  """Copies a model's tokenizer and generation settings, where it has them.

  Args:
    like: As in `save`.
    directory: Where to.
  """
  if like is None:
    return
  folder = pathlib.Path(like)
  folder = folder.parent if folder.is_file() else folder
  if folder.resolve() == directory.resolve():
    return
  for pattern in _COMPANIONS:
    for path in sorted(folder.glob(pattern)):
      if path.is_file():
        shutil.copyfile(path, directory / path.name)


def float_dtype(name: str, dtype: Any) -> str:
  """Returns the name of a float dtype that files and models can hold.

  Args:
    name: What to name in messages.
    dtype: A dtype, or its name.

  Raises:
    ConfigError: It is another.
  """
  try:
    value = jnp.dtype(dtype).name
  except TypeError:
    value = str(dtype)
  if value not in field_types.FLOATS:
    raise errors.ConfigError(
      f"{name}: got {dtype!r}, expected one of {', '.join(field_types.FLOATS)}"
    )
  return value
