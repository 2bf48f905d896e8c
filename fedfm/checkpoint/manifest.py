"""What a checkpoint says it holds: a path, shape, dtype and digest per leaf.

`{"format": 1, "round": 7, "extra": {...}, "digest": "<of the rest>", "leaves":
[{"path", "shape", "dtype", "digest"}, ...]}`; digests are SHA-256 of a leaf's
global content in C order, so they are the same on every mesh.
"""

import concurrent.futures
import hashlib
import json
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from fedfm import errors, trees

FORMAT = 1
PyTree = Any


class DamagedError(errors.CheckpointError):
  """A checkpoint's files do not hold what was saved."""


def digest(tree: PyTree) -> str:
  """Names a tree by its paths, shapes, dtypes and contents.

  Args:
    tree: Tree of arrays, on any mesh.

  Returns:
    `"sha256:<64 hex digits>"`, the same on every mesh.

  Examples:
    >>> digest({"a": np.zeros(2)}) == digest({"a": np.zeros(2)})
    True
    >>> digest({"a": np.zeros(2)}) == digest({"b": np.zeros(2)})
    False
  """
  return "sha256:" + _json_digest(_records(named_leaves(tree)))


def named_leaves(tree: PyTree) -> dict[str, Any]:
  """Returns path -> leaf, in leaf order.

  Args:
    tree: Tree of arrays or of `jax.ShapeDtypeStruct`s.

  Raises:
    CheckpointError: No leaf, two with one path, or one that is not an array.
  """
  leaves = jax.tree.leaves(tree)
  named = dict(zip((p or "value" for p in trees.paths(tree)), leaves))
  if len(named) != len(leaves) or not leaves:
    raise errors.CheckpointError(
      f"state: {len(leaves)} leaves with {len(named)} distinct paths, "
      "expected at least one leaf and a path of its own for each"
    )
  for path, leaf in named.items():
    if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
      raise errors.CheckpointError(
        f"state: leaf {path} is {type(leaf).__name__}, expected an array"
      )
  return named


def make(
  round: int, leaves: dict[str, Any], extra: dict[str, Any]
) -> dict[str, Any]:
  """Makes the manifest of one round.

  Args:
    round: The round's number.
    leaves: Path -> array.
    extra: JSON data to keep along.

  Returns:
    The manifest, as in the module's docstring.

  Raises:
    CheckpointError: `extra` is not JSON, or holds NaN or infinity.
  """
  try:
    extra = json.loads(json.dumps(extra, allow_nan=False))
  except (TypeError, ValueError) as e:
    raise errors.CheckpointError(f"extra: not JSON: {e}") from e
  body = {
    "format": FORMAT,
    "round": round,
    "leaves": _records(leaves),
    "extra": extra,
  }
  return body | {"digest": _json_digest(body)}


def check(manifest: dict[str, Any], round: int) -> None:
  """Checks a manifest that was read back.

  Raises:
    CheckpointError: It is of a newer format.
    DamagedError: It is not what was written for this round.
  """
  body = {k: v for k, v in manifest.items() if k != "digest"}
  if manifest["digest"] != _json_digest(body):
    raise DamagedError("the manifest was changed")
  if manifest["format"] > FORMAT:
    raise errors.CheckpointError(
      f"format {manifest['format']} is newer than {FORMAT}, the newest that "
      "this version reads"
    )
  if body["round"] != round:
    raise DamagedError(f"holds round {body['round']}")


def check_target(manifest: dict[str, Any], wanted: dict[str, Any]) -> None:
  """Checks that a target asks for what was saved.

  Args:
    manifest: The manifest of a checkpoint.
    wanted: Path -> leaf with `.shape` and `.dtype`.

  Raises:
    CheckpointError: A leaf is missing, unknown, or of another shape or dtype.
  """
  saved = {leaf["path"]: leaf for leaf in manifest["leaves"]}
  for path in sorted(wanted.keys() - saved.keys()):
    raise errors.CheckpointError(
      f"leaf {path}: not in the checkpoint{errors.nearest(path, saved)}"
    )
  for path in sorted(saved.keys() - wanted.keys()):
    raise errors.CheckpointError(
      f"leaf {path}: not in the target{errors.nearest(path, wanted)}"
    )
  for path, x in wanted.items():
    for field, expected in (("shape", list(x.shape)), ("dtype", str(x.dtype))):
      if saved[path][field] != expected:
        raise errors.CheckpointError(
          f"leaf {path}: got {field} {saved[path][field]}, expected {expected}"
        )


def check_content(manifest: dict[str, Any], leaves: dict[str, Any]) -> None:
  """Checks that what was read back is what was saved.

  Args:
    manifest: The manifest of a checkpoint.
    leaves: Path -> array, as read.

  Raises:
    DamagedError: Naming the first leaf that differs.
  """
  found = {record["path"]: record for record in _records(leaves)}
  for saved in manifest["leaves"]:
    got = found[saved["path"]]
    for field in ("shape", "dtype", "digest"):
      if got[field] != saved[field]:
        raise DamagedError(
          f"leaf {saved['path']}: got {field} {got[field]}, expected "
          f"{saved[field]}"
        )


def host(x: jax.Array | np.ndarray) -> np.ndarray:
  """Fetches an array's global content; keys give their data.

  An array split over processes is gathered, so all of them must call this.
  """
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    if x.is_fully_replicated:
      return np.asarray(x.addressable_data(0))
    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


def _sha256(x: np.ndarray) -> str:
  flat = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
  return hashlib.sha256(flat.data).hexdigest()


def _records(leaves: dict[str, Any]) -> list[dict[str, Any]]:
  # hashlib lets go of the interpreter lock, so threads do help.
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    digests = pool.map(_sha256, map(host, leaves.values()))
    return [
      {
        "path": path,
        "shape": list(x.shape),
        "dtype": str(x.dtype),
        "digest": hex_digest,
      }
      for (path, x), hex_digest in zip(leaves.items(), digests)
    ]


def _json_digest(obj: Any) -> str:
  text = json.dumps(obj, sort_keys=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()
