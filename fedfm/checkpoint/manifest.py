"""What a checkpoint says it holds: a path, shape, dtype and digest per leaf.

`{"format": 2, "round": 7, "saved": "<time>", "versions": {...}, "run": {...},
"extra": {...}, "items": {...}, "leaves": [{"path", "shape", "dtype", "digest"},
...], "digest": "<SHA-256 of the rest>"}`. A leaf's digest is of its global
content (`digests.py`), so that it is the same on every mesh. `run` says what
does not change: the config with its SHA-256, and the digest of a base that is
not in the checkpoint. `extra` is JSON that belongs to the round.
"""

import datetime
import hashlib
import importlib.metadata
import json
import platform
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from fedfm import errors, trees
from fedfm.checkpoint import digests

FORMAT = 2
PyTree = Any
_PACKAGES = ("fedfm", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint")


class DamagedError(errors.CheckpointError):
  """A checkpoint's files do not hold what was saved."""


def digest(tree: PyTree) -> str:
  """Names a tree by its paths, shapes, dtypes and contents.

  Args:
    tree: Tree of arrays, on any mesh.

  Returns:
    "sha256:" and 64 hex digits, the same on every mesh; all processes call it
    together.

  Examples:
    >>> digest({"a": np.zeros(2)}) == digest({"a": np.zeros(2)})
    True
    >>> digest({"a": np.zeros(2)}) == digest({"b": np.zeros(2)})
    False
  """
  return "sha256:" + json_digest(_records(named_leaves(tree)))


def versions() -> dict[str, str]:
  """Returns the versions that bits may depend on, by package."""
  found = {"python": platform.python_version()}
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = "unknown"
  return found


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
  round: int,
  leaves: dict[str, Any],
  extra: dict[str, Any],
  run: dict[str, Any] | None = None,
) -> dict[str, Any]:
  """Makes the manifest of one round, but for its `items` and `digest`.

  Args:
    round: The round's number.
    leaves: Path -> array.
    extra: JSON data to keep along.
    run: JSON data that is the same for every round.

  Returns:
    The manifest, as in the module's docstring, for `seal`.

  Raises:
    CheckpointError: `extra` or `run` is not JSON, or holds NaN or infinity.
  """
  now = datetime.datetime.now(datetime.UTC)
  return {
    "format": FORMAT,
    "round": round,
    "saved": now.isoformat("T", "seconds"),
    "versions": versions(),
    "run": _as_json("run", run or {}),
    "extra": _as_json("extra", extra),
    "leaves": _records(leaves),
  }


def seal(manifest: dict[str, Any], items: dict[str, Any]) -> dict[str, Any]:
  """Adds what `items.save` returned, and the digest of everything."""
  body = manifest | {"items": items}
  return body | {"digest": json_digest(body)}


def is_same(a: dict[str, Any], b: dict[str, Any]) -> bool:
  """Whether two manifests are of the same content, whenever saved."""
  return all(a[field] == b[field] for field in ("round", "leaves", "extra"))


def check(manifest: dict[str, Any], round: int) -> None:
  """Checks a manifest that was read back.

  Raises:
    CheckpointError: It is of another format.
    DamagedError: It is not what was written for this round.
  """
  body = {k: v for k, v in manifest.items() if k != "digest"}
  if manifest["digest"] != json_digest(body):
    raise DamagedError("the manifest was changed")
  if manifest["format"] != FORMAT:
    relation = "newer" if manifest["format"] > FORMAT else "older"
    raise errors.CheckpointError(
      f"format {manifest['format']} is {relation} than {FORMAT}, the one that "
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


def json_digest(obj: Any) -> str:
  """Returns the SHA-256 of JSON data, whatever the order of its fields.

  Examples:
    >>> json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1})
    True
  """
  text = json.dumps(obj, sort_keys=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()


def _as_json(field: str, value: Any) -> Any:
  try:
    return json.loads(json.dumps(value, allow_nan=False))
  except (TypeError, ValueError) as e:
    raise errors.CheckpointError(f"{field}: not JSON: {e}") from e


def _records(leaves: dict[str, Any]) -> list[dict[str, Any]]:
  found = digests.digests(leaves)
  return [
    {
      "path": path,
      "shape": list(x.shape),
      "dtype": str(x.dtype),
      "digest": found[path],
    }
    for path, x in leaves.items()
  ]
