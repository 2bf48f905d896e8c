"""One model's weights in Orbax's layout: a fast start, sharded and checked.

`DIR/weights` is Orbax's; its custom metadata holds what the caller says of the
weights, and the shape, dtype and digests of every parameter.
"""

from collections.abc import Iterator
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from fedfm import errors, trees
from fedfm.checkpoint import failures
from fedfm.checkpoint import manifest as manifests

PyTree = Any
FORMAT = 1
_FOLDER = "weights"
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's name.
_PIECE = 1 << 28  # Bytes that are brought to the host at a time, to be checked.


def exist(directory: str | pathlib.Path) -> bool:
  """Whether a folder holds weights in Orbax's layout."""
  return ocp.is_orbax_checkpoint(str(_path(directory)))


def save(
  directory: str | pathlib.Path, params: PyTree, about: dict[str, Any]
) -> None:
  """Writes weights; all processes call it together.

  Args:
    directory: Folder to write; made if needed.
    params: Tree of dicts of arrays, on any mesh.
    about: JSON data to keep along, such as the model's config.

  Raises:
    CheckpointError: The folder holds weights already, or cannot be written.
  """
  path = _path(directory)
  if path.exists():
    raise errors.CheckpointError(f"{path}: exists; write to another folder")
  leaves: PyTree = manifests.named_leaves(params)
  body = {
    "format": FORMAT,
    "about": about,
    "leaves": {name: _record(name, x) for name, x in leaves.items()},
  }
  try:
    ocp.save(
      str(path), leaves, custom_metadata={"fedfm_weights": _sealed(body)}
    )
  except Exception as e:
    raise errors.CheckpointError(
      f"{path}: not written: {failures.one_line(e)}"
    ) from e


def describe(directory: str | pathlib.Path) -> dict[str, Any]:
  """Returns what `save` was told about the weights.

  Args:
    directory: Folder with weights.

  Raises:
    CheckpointError: There are none, they are damaged or of a newer format.
  """
  return _manifest(directory)["about"]


def load(
  directory: str | pathlib.Path, target: PyTree, dtype: Any = None
) -> PyTree:
  """Reads weights, each device its own part, and checks their digests.

  Args:
    directory: Folder with weights.
    target: Tree like the parameters of `jax.ShapeDtypeStruct`s, with a sharding
      or for the default device; their dtypes do not matter.
    dtype: Dtype of the parameters; None keeps the saved ones.

  Returns:
    The parameters.

  Raises:
    CheckpointError: There are none, they are damaged, or of other shapes.
  """
  path = _path(directory)
  saved = _manifest(directory)["leaves"]
  wanted = manifests.named_leaves(target)
  for name in sorted(wanted.keys() ^ saved.keys()):
    where = "is missing" if name in wanted else "is not part of the model"
    raise errors.CheckpointError(f"{path}: parameter {name} {where}")
  default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract: PyTree = {}
  for name, x in wanted.items():
    if list(x.shape) != saved[name]["shape"]:
      raise errors.CheckpointError(
        f"{path}: parameter {name} has shape {saved[name]['shape']}, expected "
        f"{list(x.shape)}"
      )
    abstract[name] = jax.ShapeDtypeStruct(
      x.shape,
      jnp.dtype(saved[name]["dtype"]),
      sharding=x.sharding or default,
    )
  try:
    loaded: Any = ocp.load(str(path), abstract)
  except Exception as e:
    raise failures.of_reading(path, e) from e
  for name in wanted:
    if _record(name, loaded[name]) != saved[name]:
      raise manifests.DamagedError(f"{path}: parameter {name} was changed")
    if dtype is not None:
      loaded[name] = loaded[name].astype(dtype)
  finite = jax.jit(
    lambda tree: {k: trees.all_finite(x) for k, x in tree.items()}
  )
  for name, is_finite in jax.device_get(finite(loaded)).items():
    if not is_finite:
      raise errors.CheckpointError(
        f"{path}: parameter {name} holds NaN or infinity as "
        f"{loaded[name].dtype}"
      )
  leaves = [loaded[name] for name in wanted]
  return jax.tree.unflatten(jax.tree.structure(target), leaves)


def _path(directory: str | pathlib.Path) -> pathlib.Path:
  return pathlib.Path(directory).absolute() / _FOLDER


def _manifest(directory: str | pathlib.Path) -> dict[str, Any]:
  path = _path(directory)
  if not exist(directory):
    raise errors.CheckpointError(f"{directory}: holds no weights of Orbax's")
  try:
    text = (path / _METADATA).read_text(encoding="utf-8")
    manifest = json.loads(text)["custom_metadata"]["fedfm_weights"]
    body = {k: v for k, v in manifest.items() if k != "digest"}
    intact = manifest == _sealed(body)
    newer = manifest["format"] > FORMAT
  except Exception as e:
    raise failures.of_reading(path, e) from e
  if not intact:
    raise manifests.DamagedError(f"{path}: the manifest was changed")
  if newer:
    raise errors.CheckpointError(
      f"{path}: format {manifest['format']} is newer than {FORMAT}, the newest "
      "that this version reads"
    )
  return body


def _sealed(body: dict[str, Any]) -> dict[str, Any]:
  return body | {"digest": manifests.json_digest(body)}


def _record(name: str, x: jax.Array) -> dict[str, Any]:
  """Describes one parameter; digests are of pieces, in order."""
  return {
    "shape": list(x.shape),
    "dtype": str(x.dtype),
    "digests": [manifests.digest({name: piece}) for piece in _pieces(x)],
  }


def _pieces(x: jax.Array) -> Iterator[jax.Array]:
  """Splits along the first axis, so that the host holds one at a time."""
  if x.nbytes <= _PIECE or not x.ndim:
    yield x
    return
  rows = max(1, _PIECE // (x.nbytes // x.shape[0]))
  for i in range(0, x.shape[0], rows):
    yield x[i : i + rows]
