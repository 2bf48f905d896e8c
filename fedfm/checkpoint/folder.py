"""The names in a folder of checkpoints, and how rounds come and go.

`7` is a round and `7.items` its host state. A round that goes is renamed first,
to `7.damaged`, `7.deleted` or `7.replaced`, so that a reader never finds half
of one; what a killed process left of those is removed by the next.
"""

import pathlib
import re
import shutil

import jax
from jax.experimental import multihost_utils
import numpy as np
from orbax.checkpoint import v1 as ocp

METADATA = "_CHECKPOINT_METADATA"  # Orbax's name
_ROUND = re.compile(r"0|[1-9]\d*")
_ITEMS = re.compile(r"(\d+)\.items")
_TEMPORARY = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|items\.part)")
_DISCARDED = re.compile(r"\d+\.(deleted|replaced)(\.\d+)?(\.items)?")


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
    names = (path.name for path in self.path.iterdir())
    return sorted(int(name) for name in names if _ROUND.fullmatch(name))

  def complete(self) -> list[int]:
    """Returns the rounds that were written to their end, ascending."""
    # pyrefly: ignore[bad-argument-type]
    return [r for r in self.entries() if ocp.is_orbax_checkpoint(self.at(r))]

  def set_aside(self) -> list[str]:
    """Returns the names of the rounds that were found damaged."""
    return sorted(
      p.name
      for p in self.path.iterdir()
      if ".damaged" in p.name and not p.name.endswith(".items")
    )

  def move(self, round: int, label: str) -> pathlib.Path:
    """Renames a round, and its items after it.

    Args:
      round: The round.
      label: What to add to its name.

    Returns:
      Its new place.
    """
    place, count = self.path / f"{round}.{label}", 1
    while place.exists():
      count += 1
      place = self.path / f"{round}.{label}.{count}"
    synchronize(f"before {place.name}")
    if jax.process_index() == 0:
      self.at(round).rename(place)
      if self.items_at(round).exists():
        self.items_at(round).rename(place.with_name(f"{place.name}.items"))
    synchronize(f"after {place.name}")
    return place

  def sweep(self, temporary: bool = False) -> None:
    """Removes what is no checkpoint any more.

    Args:
      temporary: Remove what is no checkpoint yet, too; no save may be under
        way.
    """
    if jax.process_index() == 0:
      rounds = set(self.entries())
      for path in self.path.iterdir():
        orphan = _ITEMS.fullmatch(path.name)
        if (
          _DISCARDED.fullmatch(path.name)
          or (orphan and temporary and int(orphan[1]) not in rounds)
          or (temporary and _TEMPORARY.fullmatch(path.name))
        ):
          shutil.rmtree(path, ignore_errors=True)
    synchronize("swept")


def synchronize(name: str) -> None:
  """Waits for every process; a no-op with one."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def on_any_process(flag: bool) -> bool:
  """Whether the flag is set in some process; all of them must call this."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.int32(flag)).any())
