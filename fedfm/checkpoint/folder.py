"""The names in a folder of checkpoints, and how rounds come and go.

`7` is a round and `7.items` its host state. A round that goes is renamed first,
to `7.damaged`, `7.deleted` or `7.replaced`, so that a reader never finds half
of one; what a killed process left of those is removed by the next. What was to
be replaced goes once the new round is whole, and comes back if it never is.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import math
import pathlib
import re
import shutil

import jax
from jax.experimental import multihost_utils
import numpy as np
from orbax.checkpoint import v1 as ocp

from fedfm import errors

METADATA = "_CHECKPOINT_METADATA"  # Orbax's name
_ROUND = re.compile(r"0|[1-9]\d*")
_ITEMS = re.compile(r"(\d+)\.items")
_TEMPORARY = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|items\.part)")
_DISCARDED = re.compile(r"(\d+)\.(deleted|replaced)(\.\d+)?(\.items)?")


class RoundFolder:
  """A folder of checkpoints; what changes it is called by all processes."""

  def __init__(self, path: pathlib.Path):
    """Looks at a folder.

    Args:
      path: The folder, which may be missing.
    """
    self.path = path

  def at(self, round: int) -> pathlib.Path:
    """Returns a round's place."""
    return self.path / str(round)

  def items_at(self, round: int) -> pathlib.Path:
    """Returns the place of a round's items."""
    return self.path / f"{round}.items"

  def entries(self) -> list[int]:
    """Returns every round that has a name here, whole or not, ascending."""
    names = [path.name for path in self._paths()]
    return sorted(int(name) for name in names if _ROUND.fullmatch(name))

  def complete(self) -> list[int]:
    """Returns the rounds that were written to their end, ascending."""
    # pyrefly: ignore[bad-argument-type]
    return [r for r in self.entries() if ocp.is_orbax_checkpoint(self.at(r))]

  def set_aside(self) -> list[str]:
    """Returns the names of the rounds that were found damaged."""
    return sorted(
      p.name
      for p in self._paths()
      if ".damaged" in p.name and not p.name.endswith(".items")
    )

  def _paths(self) -> list[pathlib.Path]:
    try:
      return list(self.path.iterdir())
    except OSError as e:
      raise errors.StorageError(
        f"{self.path}: cannot be listed: {e.strerror}"
      ) from e

  def move(self, round: int, label: str) -> pathlib.Path:
    """Renames a round, and its items after it.

    Args:
      round: The round.
      label: What to add to its name.

    Returns:
      Its new place.

    Raises:
      SaveError: It cannot be renamed.
    """
    place, count = self.path / f"{round}.{label}", 1
    while place.exists():
      count += 1
      place = self.path / f"{round}.{label}.{count}"
    synchronize(f"before {place.name}")
    if jax.process_index() == 0:
      with self._renaming():
        self.at(round).rename(place)
        if self.items_at(round).exists():
          self.items_at(round).rename(_items_of(place))
    synchronize(f"after {place.name}")
    return place

  def put_back(self) -> None:
    """Undoes replacements that did not get to their end."""
    if jax.process_index() == 0:
      for path in self._paths():
        found = _DISCARDED.fullmatch(path.name)
        if not found or path.name != f"{found[1]}.replaced":
          continue
        place = self.at(int(found[1]))
        if place.exists():
          continue
        with self._renaming():
          if _items_of(path).exists():  # A round that is there has its items.
            shutil.rmtree(_items_of(place), ignore_errors=True)
            _items_of(path).rename(_items_of(place))
          path.rename(place)
    synchronize("put back")

  @contextlib.contextmanager
  def _renaming(self) -> Iterator[None]:
    try:
      yield
    except OSError as e:
      raise errors.SaveError(
        f"{e.filename or self.path}: cannot be renamed: {e.strerror}"
      ) from e

  def sweep(self, temporary: bool = False) -> None:
    """Removes what is no checkpoint any more.

    Args:
      temporary: Remove what is no checkpoint yet, too; no save may be under
        way.
    """
    if jax.process_index() == 0:
      rounds = set(self.entries())
      for path in self._paths():
        orphan = _ITEMS.fullmatch(path.name)
        discarded = _DISCARDED.fullmatch(path.name)
        if (
          (
            discarded
            and (discarded[2] == "deleted" or int(discarded[1]) in rounds)
          )
          or (orphan and temporary and int(orphan[1]) not in rounds)
          or (temporary and _TEMPORARY.fullmatch(path.name))
        ):
          shutil.rmtree(path, ignore_errors=True)
    synchronize("swept")


def to_keep(
  rounds: Sequence[int],
  last: int | None,
  every: int | None,
  regular: int,
  scores: Mapping[int, float],
) -> set[int]:
  """Chooses the rounds that are not deleted.

  Args:
    rounds: All, ascending.
    last: How many of the newest; None for all.
    every: Those that this divides, or None.
    regular: The newest that this divides.
    scores: By round; the one with the lowest finite score stays.

  Returns:
    The rounds to keep.

  Examples:
    >>> sorted(to_keep([1, 2, 3, 4, 5], 1, None, 2, {1: 0.5, 2: math.inf}))
    [1, 4, 5]
  """
  keep = set(rounds if last is None else rounds[-last:])
  keep |= set([r for r in rounds if r % regular == 0][-1:])
  if every:
    keep |= {r for r in rounds if r % every == 0}
  finite = {
    r: scores[r] for r in rounds if math.isfinite(scores.get(r, math.inf))
  }
  if finite:
    keep.add(min(finite, key=finite.__getitem__))
  return keep


def _items_of(place: pathlib.Path) -> pathlib.Path:
  return place.with_name(f"{place.name}.items")


def synchronize(name: str) -> None:
  """Waits for every process; a no-op with one."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def on_any_process(flag: bool) -> bool:
  """Whether the flag is set in some process; all of them must call this."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.int32(flag)).any())
