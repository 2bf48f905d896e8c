"""Opens a model's folder, whatever format its weights have.

A Hugging Face folder, a llama2.c file or the folder of one, or weights that
`convert` has put in Orbax's layout, for a fast start.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from fedfm import errors, sharding
from fedfm.checkpoint import weights
from fedfm.models import families, huggingface, llama2c, quantization
from fedfm.models.build import build
from fedfm.models.model import Model

PyTree = Any
FORMATS = ("huggingface", "orbax")


def read_config(path: str | os.PathLike) -> Any:
  """Reads what a folder says of its model, and no weights.

  Args:
    path: The folder, or a llama2.c file.

  Returns:
    The model's config.

  Raises:
    CheckpointError: There is no model, or none that is supported.
  """
  path = _checked(path)
  if _is_orbax(path):
    return _orbax_config(path)
  if _is_huggingface(path):
    return families.read_config(path / huggingface.CONFIG)[1]
  return llama2c.read_config(_llama2c(path))


def load(
  path: str | os.PathLike,
  mesh: Mesh | None = None,
  dtype: Any = None,
  compute_dtype: str = "float32",
  quantize: str = "",
  **overrides: Any,
) -> tuple[Model, PyTree]:
  """Loads a model of any format.

  Args:
    path: The folder, or a llama2.c file.
    mesh: As in `huggingface.load`.
    dtype: Likewise.
    compute_dtype: Likewise.
    quantize: Likewise.
    **overrides: Likewise.

  Returns:
    The model and its parameters.

  Raises:
    CheckpointError: There is no model, or it is damaged or not supported.
    ConfigError: As in `huggingface.load`.
  """
  path, load_fn = _checked(path), huggingface.load
  if _is_orbax(path):
    load_fn = load_orbax
  elif not _is_huggingface(path):
    path, load_fn = _llama2c(path), llama2c.load
  return load_fn(
    path, mesh, dtype, compute_dtype, quantize=quantize, **overrides
  )


def load_orbax(
  path: str | os.PathLike,
  mesh: Mesh | None = None,
  dtype: Any = None,
  compute_dtype: str = "float32",
  quantize: str = "",
  **overrides: Any,
) -> tuple[Model, PyTree]:
  """Loads what `convert` wrote in Orbax's layout; see `load`."""
  path = pathlib.Path(path)
  of_folder = _orbax_config(path)
  config = huggingface.with_overrides(of_folder, compute_dtype, overrides)
  if config.architecture != of_folder.architecture:
    raise errors.ConfigError(
      "model.num_classes: a new classifier needs a Hugging Face folder, got "
      f"{path}"
    )
  if dtype is not None:
    dtype = huggingface.float_dtype("dtype", dtype)
  model = build(config)
  target = model.shapes
  if mesh is not None:
    target = jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      target,
      sharding.shardings(mesh, model.axes, target),
    )
  params = weights.load(path, target, dtype)
  table = params.get("embed", jax.tree.leaves(params)[0])
  model = build(dataclasses.replace(config, param_dtype=table.dtype.name))
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params
  )
  model = model._replace(shapes=shapes)
  if not quantize:
    return model, params
  leaves = jax.tree.leaves(params)
  del params  # Each leaf is let go when it is quantised.
  return quantization.quantize(
    model, quantize, (leaves.pop(0) for _ in range(len(leaves))), mesh
  )


def convert(
  source: str | os.PathLike,
  directory: str | os.PathLike,
  output_format: str,
  mesh: Mesh | None = None,
  dtype: Any = None,
) -> None:
  """Writes a model in another format, its tokenizer along.

  Args:
    source: A model of any format.
    directory: Folder to write.
    output_format: "huggingface" or "orbax".
    mesh: Where the parameters are meanwhile.
    dtype: Dtype to write them in; None keeps theirs.

  Raises:
    ConfigError: An unknown format.
    CheckpointError: The source cannot be read, or the folder not written: it
      is a file, or holds weights that would be mixed with these.
  """
  if output_format not in FORMATS:
    raise errors.ConfigError(
      f"format: got {output_format!r}{errors.nearest(output_format, FORMATS)}"
    )
  source, directory = pathlib.Path(source), pathlib.Path(directory)
  if directory.is_file():
    raise errors.CheckpointError(f"{directory}: a file, expected a folder")
  is_orbax, others = weights.exist(directory), _safetensors(directory)
  if is_orbax if output_format == "huggingface" else others:
    held = "weights in Orbax's layout" if is_orbax else others[0].name
    raise errors.CheckpointError(
      f"{directory}: holds {held}; write to another folder"
    )
  model, params = load(source, mesh, dtype)
  if output_format == "huggingface":
    huggingface.save(directory, model, params, like=source)
  else:
    config = huggingface.config_file(model, params, source)
    weights.save(directory, params, {"config": config})
    if jax.process_index() == 0:
      text = json.dumps(config, indent=2) + "\n"
      (directory / huggingface.CONFIG).write_text(text)
      huggingface.copy_companions(source, directory)


def _is_orbax(path: pathlib.Path) -> bool:
  """Whether the weights are Orbax's; two kinds might be of two models."""
  if not weights.exist(path):
    return False
  others = _safetensors(path)
  if others:
    raise errors.CheckpointError(
      f"{path}: holds both {others[0].name} and weights in Orbax's layout; "
      "expected one of them"
    )
  return True


def _safetensors(path: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path.glob("model*.safetensors*"))


def _checked(path: str | os.PathLike) -> pathlib.Path:
  path = pathlib.Path(path)
  errors.check_path(path, errors.CheckpointError)
  return path


def _is_huggingface(path: pathlib.Path) -> bool:
  return (path / huggingface.CONFIG).is_file()


def _llama2c(path: pathlib.Path) -> pathlib.Path:
  file = llama2c.find(path)
  if file is None:
    raise errors.CheckpointError(
      f"{path}: found no model; expected {huggingface.CONFIG} and safetensors "
      "files, one llama2.c file, or a folder that scripts/convert.py wrote"
    )
  return file


def _orbax_config(path: pathlib.Path) -> Any:
  config = weights.describe(path).get("config")
  if not isinstance(config, dict):
    raise errors.CheckpointError(f"{path}: its weights are of no model")
  return families.parse_config(path, config)[1]
