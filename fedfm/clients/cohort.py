"""Placing a cohort on a mesh."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from fedfm import errors
from fedfm.types import Cohort, LanePart

# Fields that every device holds whole; the others are split by lanes.
REPLICATED = ("boundaries", "num_segments", "order")


def shardings(mesh: Mesh) -> dict[str, NamedSharding]:
  """Where the leaves of a cohort's fields go.

  Args:
    mesh: The mesh.

  Returns:
    A sharding for each field of arrays: lanes over `clients`, each batch
    over `fsdp`.
  """
  specs = {
    field.name: jax.P("clients")
    for field in dataclasses.fields(Cohort)
    if not field.metadata.get("static")
  }
  specs |= {name: jax.P() for name in REPLICATED}
  specs["batches"] = jax.P("clients", None, "fsdp")
  return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def check_lanes(num_lanes: int, mesh: Mesh) -> None:
  """Raises ConfigError for lanes that `mesh.clients` does not divide."""
  parts = mesh.shape["clients"]
  if num_lanes % parts:
    raise errors.ConfigError(
      f"lanes: mesh.clients = {parts} does not divide {num_lanes} lanes"
    )


def own_lanes(
  mesh: Mesh, num_lanes: int, process_index: int | None = None
) -> list[int]:
  """Says which lanes a process's devices hold, for `data.pack`.

  Processes whose devices share a part of `clients`, as `fsdp` or `tensor`
  crosses them, hold the same lanes; each places its rows of their batches.

  Args:
    mesh: The mesh.
    num_lanes: Lanes of the cohort.
    process_index: Default this process.

  Returns:
    Their numbers, ascending.

  Raises:
    ConfigError: Lanes that `mesh.clients` does not divide.

  Examples:
    >>> from fedfm import sharding
    >>> mesh = sharding.make_mesh({"clients": 1}, jax.devices()[:1])
    >>> own_lanes(mesh, 3)
    [0, 1, 2]
  """
  check_lanes(num_lanes, mesh)
  parts = mesh.shape["clients"]
  if process_index is None:
    process_index = jax.process_index()
  axis, each = mesh.axis_names.index("clients"), num_lanes // parts
  return [
    lane
    for part, devices in enumerate(np.moveaxis(mesh.devices, axis, 0))
    if any(device.process_index == process_index for device in devices.flat)
    for lane in range(part * each, part * each + each)
  ]


def put(cohort: Cohort, mesh: Mesh) -> Cohort:
  """Places a packed cohort: lanes over `clients`, each batch over `fsdp`.

  Args:
    cohort: From `data.pack`; with several processes, all lanes or, as
      `own_lanes` gives them, those of this one's devices.
    mesh: The mesh.

  Returns:
    The cohort as global arrays.

  Raises:
    ConfigError: Lanes or batch size that their mesh axis does not divide, or
      lanes of this process's devices that were not packed.
  """
  _check(cohort, mesh)
  return _place(cohort, _part(cohort), shardings(mesh))


def put_rounds(cohorts: Sequence[Cohort], mesh: Mesh) -> Cohort:
  """Places the cohorts of several rounds, each as `put` does.

  Args:
    cohorts: Packed with the same sizes of buffers.
    mesh: The mesh.

  Returns:
    Their leaves as global arrays [rounds, ...], for `algorithms.many_rounds`.

  Raises:
    ConfigError: As `put`.
  """
  _check(cohorts[0], mesh)
  stacked = jax.tree.map(lambda *x: np.stack(x), *cohorts)
  places = {
    name: NamedSharding(mesh, jax.P(None, *place.spec))
    for name, place in shardings(mesh).items()
  }
  return _place(stacked, _part(cohorts[0]), places)


def _part(cohort: Cohort) -> LanePart:
  """The lanes that a packed cohort holds."""
  every = LanePart(cohort.num_lanes, tuple(range(cohort.num_lanes)))
  return cohort.part or every


def _check(cohort: Cohort, mesh: Mesh) -> None:
  num_lanes, packed = _part(cohort)
  needed = own_lanes(mesh, num_lanes)
  if not set(needed) <= set(packed):
    raise errors.ConfigError(
      f"lanes: process {jax.process_index()} packed lanes {list(packed)} of "
      f"{num_lanes}, but its devices hold {needed} of this mesh; expected "
      f"data.pack(own_lanes=clients.own_lanes(mesh, {num_lanes}))"
    )
  batch_size = cohort.batches["mask"].shape[2]
  if batch_size % mesh.shape["fsdp"]:
    raise errors.ConfigError(
      f"batch_size: mesh.fsdp = {mesh.shape['fsdp']} does not divide a batch "
      f"of {batch_size}"
    )


def _place(
  cohort: Cohort, part: LanePart, shardings: dict[str, NamedSharding]
) -> Cohort:
  placed = {
    name: jax.tree.map(
      lambda x, place=place: _global(np.asarray(x), part, place),
      getattr(cohort, name),
    )
    for name, place in shardings.items()
  }
  return dataclasses.replace(cohort, part=None, **placed)


def _global(x: np.ndarray, part: LanePart, place: NamedSharding) -> jax.Array:
  """Makes a global array, to which each process brings what its devices hold.

  Args:
    x: All of it, but of its lanes only those of `part`.
    part: Has all lanes of this process's devices.
    place: Where it goes.

  Returns:
    The array.
  """
  if jax.process_count() == 1:  # Whose devices hold all lanes.
    return jax.device_put(x, place)
  shape, axis = list(x.shape), None
  if "clients" in place.spec:
    axis = place.spec.index("clients")
    shape[axis] = part.num_lanes

  def read(index: Any) -> np.ndarray:
    if axis is None:
      return x[index]
    # A device's lanes follow each other, and so do they in an ascending part.
    lanes = range(part.num_lanes)[index[axis]]
    first = part.lanes.index(lanes[0])
    here = slice(first, first + len(lanes))
    return x[(*index[:axis], here, *index[axis + 1 :])]

  return jax.make_array_from_callback(tuple(shape), place, read)
