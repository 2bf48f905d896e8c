"""TPU topologies that are not here: their devices, for compilation only."""

import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from fedfm import errors
from fedfm.scaling.chips import CHIPS, Chip


class Topology(NamedTuple):
  """One or more equal slices of one kind of chip.

  Attributes:
    chip: The kind.
    sizes: Chips along each dimension of a slice.
    slices: Number of slices, joined by the data center network.
  """

  chip: Chip
  sizes: tuple[int, ...]
  slices: int = 1

  @property
  def chips(self) -> int:
    """Chips of all slices."""
    return math.prod(self.sizes) * self.slices

  def __str__(self) -> str:
    name = f"{self.chip.name}:{'x'.join(map(str, self.sizes))}"
    return name if self.slices == 1 else f"{self.slices}*{name}"


def parse(name: str, slices: int | None = None) -> Topology:
  """Reads a topology's name.

  Args:
    name: Such as "v5e:16x16", or "4*v5e:16x16" for four slices.
    slices: Slices, where the name does not say it; default 1.

  Returns:
    The `Topology`.

  Raises:
    ConfigError: A name of another form, an unknown chip, sizes that do not
      go with it, or slices said twice.

  Examples:
    >>> parse("4*v5e:16x16").sizes, str(parse("v5p:4x4x8", slices=2))
    ((16, 16), '2*v5p:4x4x8')
  """
  found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", name.strip())
  known = ", ".join(
    f"{c.name}:{'x'.join(['2'] * c.torus)} to {c.name}:{c.largest}"
    for c in CHIPS.values()
  )
  if not found or found[2] not in CHIPS:
    raise errors.ConfigError(
      f"topology: got {name!r}, expected one of {known}, and SLICES*NAME for "
      "several slices"
    )
  chip = CHIPS[found[2]]
  sizes = tuple(int(n) for n in found[3].split("x"))
  largest = [int(n) for n in chip.largest.split("x")]
  if len(sizes) != chip.torus or not all(
    1 <= n <= most for n, most in zip(sorted(sizes), sorted(largest))
  ):
    raise errors.ConfigError(
      f"topology: got {name!r}, expected {chip.torus} sizes up to "
      f"{chip.name}:{chip.largest}"
    )
  if found[1] and slices is not None:
    raise errors.ConfigError(
      f"slices: got {slices}, but topology {name!r} says it; expected one of "
      "them"
    )
  count = int(found[1]) if found[1] else 1 if slices is None else slices
  if count < 1:
    raise errors.ConfigError(f"slices: got {count}, expected at least 1")
  return Topology(chip, sizes, count)


def devices(topology: Topology) -> list[Any]:
  """Returns the topology's devices; programs can be compiled for them only.

  Args:
    topology: From `parse`.

  Returns:
    A device a chip, with `coords` and, of several slices, `slice_index`.

  Raises:
    ConfigError: libtpu is not installed, or it does not know the topology.
  """
  # libtpu looks for the machine that it runs on, complains on others, and wants
  # a TPU to itself; here it only compiles.
  for name, value in {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
  }.items():
    os.environ.setdefault(name, value)
  one = topology._replace(slices=1)
  several = {"num_slices": topology.slices} if topology.slices > 1 else {}
  try:
    found = topologies.get_topology_desc(str(one), "tpu", **several)
  except (RuntimeError, ImportError, jax.errors.JaxRuntimeError) as e:
    reason = " ".join(str(e).split())
    if "not installed" in reason or isinstance(e, ImportError):
      reason = (
        "libtpu is not installed, expected the extra `tpu` (pip install "
        "'jax[tpu]')"
      )
    raise errors.ConfigError(f"topology: {topology}: {reason}") from None
  return list(found.devices)
