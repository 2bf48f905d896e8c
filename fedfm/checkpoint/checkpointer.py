"""Saves and restores rounds: whole, checked, the newest intact one.

Orbax writes a round's folder beside its place and renames it, so a reader only
ever sees complete ones. On top of that a manifest with a SHA-256 of every leaf
lies in its custom metadata; what does not match it on restoring is set aside
and the round before is used.
"""

from collections.abc import Callable
import json
import logging
import pathlib
import re
import shutil
from typing import Any, Self

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from fedfm import errors
from fedfm.checkpoint import manifest as manifests

PyTree = Any
_logger = logging.getLogger(__name__)
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's name
_ROUND = re.compile(r"0|[1-9]\d*")
_TEMPORARY = re.compile(r"\d+\.orbax-checkpoint-tmp.*")
_DISCARDED = re.compile(r"\d+\.(deleted|replaced)(\.\d+)?")
# The machine's failures, not the files': no reason to set a checkpoint aside.
_MACHINE = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
_MACHINE_CODES = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")

# Orbax's threads log the traceback of a failed save, which `wait` raises too.
logging.getLogger("absl").addFilter(
  lambda record: "_SignalingThread.run()" not in record.getMessage()
)


class Checkpointer:
  """Saves and restores the rounds of one run; all processes call it together.

  Saving is asynchronous: `save` returns when the arrays are copied, so the
  state may be donated at once. One save is in flight at a time; the next
  `save`, `wait`, `restore` or `close` raises if it failed.
  """

  def __init__(
    self,
    folder: str | pathlib.Path,
    *,
    keep_last: int | None = 3,
    keep_every: int | None = None,
    keep_best: Callable[[dict[str, Any]], float] | None = None,
    read_only: bool = False,
  ):
    """Opens a folder of checkpoints, `folder/<round>/`.

    Args:
      folder: Such as `WORKDIR/checkpoints`; created unless `read_only`.
      keep_last: How many of the newest rounds to keep; None keeps all.
      keep_every: Rounds that this divides are never deleted.
      keep_best: Maps a checkpoint's `extra` to a score; the round with the
        lowest is never deleted.
      read_only: For a reader beside a running job: renames, creates and deletes
        nothing.

    Raises:
      ConfigError: `keep_last` or `keep_every` below 1.
      CheckpointError: The folder is a file, missing (for a reader) or cannot be
        created.
    """
    for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
      if value is not None and value < 1:
        raise errors.ConfigError(f"{name}: got {value}, expected at least 1")
    self._folder = pathlib.Path(folder).absolute()
    self._keep_last = keep_last
    self._keep_every = keep_every
    self._keep_best = keep_best
    self._read_only = read_only
    self._scores: dict[int, float] = {}
    self._pending: tuple[int, Any] | None = None
    try:
      if not read_only:
        self._folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise errors.CheckpointError(
        f"{folder}: cannot be a folder of checkpoints: {e.strerror}"
      ) from e
    if not self._folder.is_dir():
      raise errors.CheckpointError(f"{folder}: not a folder of checkpoints")

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def all_rounds(self) -> list[int]:
    """Returns the rounds of all complete checkpoints, ascending."""
    # pyrefly: ignore[bad-argument-type]
    return [r for r in self._entries() if ocp.is_orbax_checkpoint(self._at(r))]

  def latest(self) -> int | None:
    """Returns the newest complete round, or None."""
    return max(self.all_rounds(), default=None)

  def save(
    self,
    round: int,
    state: PyTree,
    extra: dict[str, Any] | None = None,
    block: bool = False,
  ) -> bool:
    """Starts to save one round, after the save before has ended.

    Args:
      round: The round's number, at least 0.
      state: Tree of jax or numpy arrays; typed PRNG keys are fine.
      extra: JSON data to save along, such as the privacy ledger.
      block: Wait until the checkpoint is complete.

    Returns:
      True if it is being written; False if this round is already saved with
      the same content. Other content of the same round is replaced.

    Raises:
      CheckpointError: This save, or the one in flight before, failed (the older
        checkpoints are whole, and saving again is fine); a leaf that is not an
        array; `extra` that is not JSON.
    """
    round = int(round)
    if self._read_only:
      raise errors.CheckpointError(f"{self._folder}: opened for reading only")
    if round < 0:
      raise errors.CheckpointError(f"round: got {round}, expected at least 0")
    self.wait()
    leaves = manifests.named_leaves(state)
    manifest = manifests.make(round, leaves, extra or {})
    if round in self._entries():
      try:
        if self.manifest(round) == manifest:
          return False
        self._move(round, "replaced")
      except manifests.DamagedError as e:
        self._set_aside(round, e)
    self._remove(_TEMPORARY)
    arrays: PyTree = {path: x for path, x in leaves.items() if _has_content(x)}
    try:
      response = ocp.save_async(
        # pyrefly: ignore[bad-argument-type]
        self._at(round),
        arrays,
        custom_metadata={"fedfm": manifest},
      )
    except Exception as e:
      raise self._save_error(round, e) from e
    self._pending = round, response
    if block:
      self.wait()
    return True

  def wait(self) -> None:
    """Waits for the save in flight, then deletes what is not to be kept.

    Raises:
      CheckpointError: The save failed, for example on a full disk.
    """
    if self._pending is None:
      return
    round, response = self._pending
    try:
      response.result()
    except Exception as e:
      self._pending = None
      raise self._save_error(round, e) from e
    self._pending = None
    # pyrefly: ignore[bad-argument-type]
    if not ocp.is_orbax_checkpoint(self._at(round)):
      raise self._save_error(round, FileNotFoundError("it is not there"))
    self._prune()

  def close(self) -> None:
    """Waits for the save in flight; raises as `wait` does."""
    self.wait()

  def manifest(self, round: int) -> dict[str, Any]:
    """Reads and checks what a checkpoint says it holds.

    Args:
      round: A saved round.

    Returns:
      `{"format", "round", "extra", "digest", "leaves"}`, see `manifest.py`.

    Raises:
      CheckpointError: Missing, damaged, or of a newer format.
    """
    if round not in self._entries():
      raise errors.CheckpointError(
        f"{self._at(round)}: no such checkpoint; there are {self._entries()}"
      )
    try:
      # Orbax's own reader would open every array for this.
      text = (self._at(round) / _METADATA).read_text(encoding="utf-8")
      manifest = json.loads(text)["custom_metadata"]["fedfm"]
      manifests.check(manifest, round)
    except Exception as e:
      raise self._load_error(round, e) from e
    return manifest

  def restore(
    self, target: PyTree, round: int | None = None
  ) -> tuple[int, PyTree, dict[str, Any]] | None:
    """Restores the newest checkpoint that is whole.

    Damaged ones are renamed to `<round>.damaged`, with a warning that names the
    leaf (a reader only skips them).

    Args:
      target: Tree like the state, of arrays or `jax.ShapeDtypeStruct`s with
        shardings on any mesh; a numpy leaf comes back as numpy.
      round: Restore exactly this one.

    Returns:
      `(round, state, extra)`, or None if no checkpoint is left.

    Raises:
      CheckpointError: The checkpoint has other leaves, shapes or dtypes than
        `target`, or `round` was given and is missing or damaged.
    """
    self.wait()
    if round is not None:
      return self._load(round, target)
    for candidate in reversed(self._entries()):
      try:
        return self._load(candidate, target)
      except manifests.DamagedError as e:
        self._set_aside(candidate, e)
    return None

  def _load(self, round, target):
    manifest = self.manifest(round)
    wanted = manifests.named_leaves(target)
    specs = {path: _abstract(x) for path, x in wanted.items()}
    loaded: Any = {}
    error: Exception | None = None
    try:
      manifests.check_target(manifest, wanted)
      content: PyTree = {p: x for p, x in specs.items() if _has_content(x)}
      # pyrefly: ignore[bad-argument-type]
      loaded = ocp.load(self._at(round), content)
    except Exception as e:
      error = e
    if _on_any_process(error is not None):
      error = error or manifests.DamagedError("another process cannot read it")
      raise self._load_error(round, error) from error
    loaded |= {p: _empty(x) for p, x in specs.items() if not _has_content(x)}
    try:
      manifests.check_content(manifest, loaded)
    except manifests.DamagedError as e:
      raise self._load_error(round, e) from e
    leaves = [_placed_as(loaded[path], x) for path, x in wanted.items()]
    state = jax.tree.unflatten(jax.tree.structure(target), leaves)
    return round, state, manifest["extra"]

  def _at(self, round: int) -> pathlib.Path:
    return self._folder / str(round)

  def _entries(self) -> list[int]:
    """Returns every round that has a name here, whole or not."""
    names = (path.name for path in self._folder.iterdir())
    return sorted(int(name) for name in names if _ROUND.fullmatch(name))

  def _set_aside(self, round: int, error: Exception) -> None:
    if self._read_only:
      _logger.warning("skipped: %s", error)
      return
    place = self._move(round, "damaged")
    if jax.process_index() == 0:
      _logger.warning("set aside as %s: %s", place.name, error)

  def _move(self, round: int, label: str) -> pathlib.Path:
    place, count = self._folder / f"{round}.{label}", 1
    while place.exists():
      count += 1
      place = self._folder / f"{round}.{label}.{count}"
    _synchronize(f"before {place.name}")
    if jax.process_index() == 0:
      self._at(round).rename(place)
    _synchronize(f"after {place.name}")
    self._scores.pop(round, None)
    return place

  def _remove(self, pattern: re.Pattern[str]) -> None:
    if jax.process_index() == 0:
      for path in self._folder.iterdir():
        if pattern.fullmatch(path.name):
          shutil.rmtree(path, ignore_errors=True)
    _synchronize(f"removed {pattern.pattern}")

  def _prune(self) -> None:
    rounds = self.all_rounds()
    keep = set(
      rounds if self._keep_last is None else rounds[-self._keep_last :]
    )
    if self._keep_every:
      keep |= {r for r in rounds if r % self._keep_every == 0}
    if self._keep_best:
      for r in set(rounds) - set(self._scores):
        self._scores[r] = self._keep_best(self.manifest(r)["extra"])
      keep.add(min(rounds, key=lambda r: self._scores[r]))
    for r in rounds:
      if r not in keep:
        # Renamed first: a reader never finds half a checkpoint.
        self._move(r, "deleted")
    self._remove(_DISCARDED)

  def _save_error(self, round, error) -> errors.CheckpointError:
    return errors.CheckpointError(
      f"{self._at(round)}: not saved: {_one_line(error)}; whole checkpoints: "
      f"{self.all_rounds()}"
    )

  def _load_error(self, round, error) -> errors.CheckpointError:
    """Tells what is wrong with the files from everything else."""
    if isinstance(error, errors.CheckpointError):
      return type(error)(f"{self._at(round)}: {error}")
    text = f"{self._at(round)}: unreadable: {_one_line(error)}"
    machine = isinstance(error, _MACHINE) or any(
      code in str(error) for code in _MACHINE_CODES
    )
    return (errors.CheckpointError if machine else manifests.DamagedError)(text)


def abstract(tree: PyTree) -> PyTree:
  """Returns shapes, dtypes and shardings, a target for `restore`.

  Args:
    tree: Tree of arrays; numpy ones stay as they are.

  Returns:
    Tree of `jax.ShapeDtypeStruct` and numpy arrays.
  """
  return jax.tree.map(_abstract, tree)


def _abstract(x) -> Any:
  if isinstance(x, np.ndarray):
    return x
  sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _has_content(x) -> bool:
  """Whether Orbax gets it: it refuses empty arrays, the manifest has those."""
  return x.size > 0 or jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _empty(x):
  if isinstance(x, np.ndarray):
    return np.empty_like(x)
  return jax.device_put(np.empty(x.shape, x.dtype), x.sharding)


def _placed_as(x, target):
  """Gives an array exactly its target's sharding, so that jit sees no change.

  One that was free to move between devices stays so.
  """
  if isinstance(x, np.ndarray):
    return x
  if getattr(target, "committed", True):
    wanted = _abstract(target).sharding
    return x if x.sharding == wanted else jax.device_put(x, wanted)
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    impl = jax.random.key_impl(x)
    # pyrefly: ignore[bad-argument-type]
    return jax.random.wrap_key_data(manifests.host(x), impl=impl)
  return jax.device_put(manifests.host(x))


def _synchronize(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _on_any_process(flag: bool) -> bool:
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def _one_line(error: Any) -> str:
  # TensorStore appends its whole specification, as [name='...'].
  text = re.split(r" \[\w+='", " ".join(str(error).split()))[0]
  return f"{type(error).__name__}: {text[:400]}" if text else repr(error)
