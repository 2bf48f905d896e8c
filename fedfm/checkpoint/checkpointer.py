"""Saves and restores rounds: whole, checked, the newest intact one.

Orbax writes a round's folder beside its place and renames it, so a reader only
ever sees complete ones. On top of that a manifest with a digest of every leaf
lies in its custom metadata; what does not match it on restoring is set aside
and the round before is used.
"""

from collections.abc import Callable, Mapping
import json
import logging
import pathlib
from typing import Any, Self

import jax
from orbax.checkpoint import v1 as ocp

from fedfm import errors
from fedfm.checkpoint import failures, placing
from fedfm.checkpoint import folder as folders
from fedfm.checkpoint import items as host_items
from fedfm.checkpoint import manifest as manifests

PyTree = Any
_logger = logging.getLogger(__name__)
# Orbax's threads log the traceback of a failed save, which `wait` raises too.
logging.getLogger("absl").addFilter(
  lambda record: "_SignalingThread.run()" not in record.getMessage()
)


class Checkpointer:
  """Saves and restores the rounds of one run; all processes call it together.

  Saving is asynchronous: `save` returns when the arrays are copied, so the
  state may be donated at once. One save is in flight at a time; the next
  `save`, `wait`, `restore` or `close` raises if it failed.

  Attributes:
    run: JSON data that every manifest gets.
  """

  def __init__(
    self,
    folder: str | pathlib.Path,
    *,
    keep_last: int | None = 3,
    keep_every: int | None = None,
    keep_best: Callable[[dict[str, Any]], float] | None = None,
    regular: int = 1,
    items: Mapping[str, host_items.Item] | None = None,
    run: dict[str, Any] | None = None,
    read_only: bool = False,
  ):
    """Opens a folder of checkpoints, `folder/<round>/`.

    Args:
      folder: Such as `WORKDIR/checkpoints`; created unless `read_only`.
      keep_last: How many of the newest rounds to keep; None keeps all.
      keep_every: Rounds that this divides are never deleted.
      keep_best: Maps a checkpoint's `extra` to a score; the round with the
        lowest is never deleted. One that is not finite does not count.
      regular: The newest round that this divides is kept too.
      items: State on the host to save and restore along, by name.
      run: JSON data for every manifest, the same in all rounds.
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
    self._folder = folders.RoundFolder(pathlib.Path(folder).absolute())
    self._keep_last = keep_last
    self._keep_every = keep_every
    self._keep_best = keep_best
    self._regular = regular
    self._items = items or {}
    self.run = run or {}
    self._read_only = read_only
    self._scores: dict[int, float] = {}
    self._pending: tuple[int, Any] | None = None
    try:
      if not read_only:
        self._folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise errors.CheckpointError(
        f"{folder}: cannot be a folder of checkpoints: {e.strerror}"
      ) from e
    if not self._folder.path.is_dir():
      raise errors.CheckpointError(f"{folder}: not a folder of checkpoints")
    if not read_only:
      self._folder.put_back()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, error: type[BaseException] | None, *_) -> None:
    # A process that fails does not wait for what the others are to do too.
    if error is None or jax.process_count() == 1:
      self.close()

  def all_rounds(self) -> list[int]:
    """Returns the rounds of all complete checkpoints, ascending."""
    return self._folder.complete()

  def set_aside(self) -> list[str]:
    """Returns the names of checkpoints that were found damaged."""
    return self._folder.set_aside()

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
      the same content. Other content of the same round is replaced, and is
      there again if that fails.

    Raises:
      SaveError: This save, or the one in flight before, failed (the older
        checkpoints are whole, and saving again is fine).
      CheckpointError: A leaf that is not an array; `extra` that is not JSON.
    """
    round = int(round)
    if self._read_only:
      raise errors.CheckpointError(
        f"{self._folder.path}: opened for reading only"
      )
    if round < 0:
      raise errors.CheckpointError(f"round: got {round}, expected at least 0")
    self.wait()
    leaves = manifests.named_leaves(state)
    manifest = manifests.make(round, leaves, extra or {}, self.run)
    self._folder.sweep(temporary=True)
    if round in self._folder.entries():
      try:
        if manifests.is_same(self.manifest(round), manifest):
          return False
        self._move(round, "replaced")
      except manifests.DamagedError as e:
        self._set_aside(round, e)
    arrays: PyTree = {
      path: x for path, x in leaves.items() if placing.has_content(x)
    }
    try:
      records = {}
      if self._items and jax.process_index() == 0:
        records = host_items.save(self._items, self._folder.items_at(round))
      manifest = manifests.seal(manifest, records)
      response = ocp.save_async(
        # pyrefly: ignore[bad-argument-type]
        self._folder.at(round),
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
      SaveError: The save failed, for example on a full disk.
    """
    if self._pending is None:
      return
    round, response = self._pending
    self._pending = None
    try:
      response.result()
    except Exception as e:
      raise self._save_error(round, e) from e
    if round not in self.all_rounds():
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
      The manifest, see `manifest.py`.

    Raises:
      CheckpointError: Missing, damaged, or of another format.
    """
    entries = self._folder.entries()
    if round not in entries:
      raise errors.CheckpointError(
        f"{self._folder.at(round)}: no such checkpoint; there are {entries}"
      )
    try:
      # Orbax's own reader would open every array for this.
      file = self._folder.at(round) / folders.METADATA
      text = file.read_text(encoding="utf-8")
      manifest = json.loads(text)["custom_metadata"]["fedfm"]
      manifests.check(manifest, round)
    except Exception as e:
      raise self._load_error(round, e) from e
    return manifest

  def restore(
    self,
    target: PyTree,
    round: int | None = None,
    choose: Callable[[int], bool] = lambda round: True,
    check: Callable[[PyTree], None] = lambda state: None,
  ) -> tuple[int, PyTree, dict[str, Any]] | None:
    """Restores the newest checkpoint that is whole.

    Damaged ones are renamed to `<round>.damaged`, with a warning that names the
    leaf (a reader only skips them).

    Args:
      target: Tree like the state, of arrays or `jax.ShapeDtypeStruct`s with
        shardings on any mesh; a numpy leaf comes back as numpy.
      round: Restore exactly this one.
      choose: Which rounds may be taken.
      check: Raises DamagedError if what a restored state refers to, outside of
        the checkpoint, is damaged; the checkpoint counts as damaged then.

    Returns:
      `(round, state, extra)`, or None if no checkpoint is left.

    Raises:
      CheckpointError: The checkpoint has other leaves, shapes or dtypes than
        `target`, or `round` was given and is missing or damaged.
    """
    self.wait()
    if round is not None:
      return self._load(round, target, check)
    tried: set[int] = set()
    while True:
      left = [r for r in self._folder.entries() if r not in tried and choose(r)]
      if not left:
        return None
      candidate = left[-1]
      try:
        return self._load(candidate, target, check)
      except errors.CheckpointError as e:
        # Beside a running job a round may go while it is read, and another be
        # there by then.
        gone = candidate not in self._folder.entries()
        if not gone and not isinstance(e, manifests.DamagedError):
          raise
        tried.add(candidate)
        if not gone:
          self._set_aside(candidate, e)

  def verify(self, round: int) -> dict[str, Any]:
    """Reads a checkpoint whole and compares it with its manifest.

    Args:
      round: A saved round.

    Returns:
      Path -> array.

    Raises:
      CheckpointError: Missing, damaged, or of another format.
    """
    manifest = self.manifest(round)
    try:
      leaves = placing.targets(manifest["leaves"])
      arrays = self._read(round, manifest, leaves)
      for name, files in manifest["items"].items():
        host_items.check_files(name, files, self._folder.items_at(round))
    except manifests.DamagedError as e:
      raise self._load_error(round, e) from e
    return arrays

  def _load(self, round, target, check):
    manifest = self.manifest(round)
    wanted = manifests.named_leaves(target)
    try:
      manifests.check_target(manifest, wanted)
      place = self._folder.items_at(round)
      host_items.check(manifest["items"], self._items, place)
    except errors.CheckpointError as e:
      raise self._load_error(round, e) from e
    loaded = self._read(round, manifest, wanted)
    leaves = [placing.placed_as(loaded[p], x) for p, x in wanted.items()]
    state = jax.tree.unflatten(jax.tree.structure(target), leaves)
    try:
      check(state)
    except manifests.DamagedError as e:
      raise self._load_error(round, e) from e
    for name, item in self._items.items():
      item.restore(self._folder.items_at(round) / name)
    return round, state, manifest["extra"]

  def _read(self, round, manifest, wanted: dict[str, Any]) -> dict[str, Any]:
    """Reads the arrays, path -> array, and checks their content."""
    specs = {path: placing.spec_of(x) for path, x in wanted.items()}
    content: PyTree = {p: x for p, x in specs.items() if placing.has_content(x)}
    loaded: Any = {}
    error: Exception | None = None
    try:
      # pyrefly: ignore[bad-argument-type]
      loaded = ocp.load(self._folder.at(round), content)
    except Exception as e:
      error = e
    if folders.on_any_process(error is not None):
      error = error or _elsewhere()
      raise self._load_error(round, error) from error
    empty = {p: x for p, x in specs.items() if not placing.has_content(x)}
    loaded |= {path: placing.empty_like(x) for path, x in empty.items()}
    try:
      manifests.check_content(manifest, loaded)
    except manifests.DamagedError as e:
      raise self._load_error(round, e) from e
    return loaded

  def _set_aside(self, round: int, error: Exception) -> None:
    if self._read_only:
      _logger.warning("skipped: %s", error)
      return
    place = self._move(round, "damaged")
    if jax.process_index() == 0:
      _logger.warning("set aside as %s: %s", place.name, error)

  def _move(self, round: int, label: str) -> pathlib.Path:
    self._scores.pop(round, None)
    return self._folder.move(round, label)

  def _prune(self) -> None:
    self._score()
    rounds = self.all_rounds()
    keep = folders.to_keep(
      rounds, self._keep_last, self._keep_every, self._regular, self._scores
    )
    for r in rounds:
      if r not in keep:
        self._move(r, "deleted")
    self._folder.sweep()

  def _score(self) -> None:
    """Scores rounds that are new; a damaged one is set aside."""
    if self._keep_best is None:
      return
    for r in self.all_rounds():
      if r in self._scores:
        continue
      error: errors.CheckpointError | None = None
      try:
        self._scores[r] = self._keep_best(self.manifest(r)["extra"])
      except manifests.DamagedError as e:
        error = e
      if folders.on_any_process(error is not None):
        self._set_aside(r, error or _elsewhere())

  def _save_error(self, round, error) -> errors.SaveError:
    if jax.process_count() == 1:
      self._folder.sweep(temporary=True)  # It may hold the last free bytes.
      self._folder.put_back()
    return errors.SaveError(
      f"{self._folder.at(round)}: not saved: {failures.one_line(error)}; "
      f"whole checkpoints: {self.all_rounds()}"
    )

  def _load_error(self, round, error) -> errors.CheckpointError:
    return failures.of_reading(self._folder.at(round), error)


def _elsewhere() -> manifests.DamagedError:
  return manifests.DamagedError("another process cannot read it")
