"""Placing a cohort on a mesh."""

from collections.abc import Sequence
import dataclasses

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from fedfm import errors
from fedfm.types import Cohort

# Fields that every process holds whole; the others hold its own lanes only.
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


def put(cohort: Cohort, mesh: Mesh) -> Cohort:
  """Places a packed cohort: lanes over `clients`, each batch over `fsdp`.

  Args:
    cohort: From `data.pack`; with several processes, this one's lanes.
    mesh: The mesh.

  Returns:
    The cohort as global arrays.

  Raises:
    ConfigError: Lanes or batch size that their mesh axis does not divide.
  """
  _check(cohort, mesh)
  return _place(cohort, shardings(mesh))


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
  return _place(stacked, places)


def _check(cohort: Cohort, mesh: Mesh) -> None:
  num_lanes = cohort.num_lanes * jax.process_count()
  if num_lanes % mesh.shape["clients"]:
    raise errors.ConfigError(
      f"lanes: mesh.clients = {mesh.shape['clients']} does not divide "
      f"{num_lanes} lanes"
    )
  batch_size = cohort.batches["mask"].shape[2]
  if batch_size % mesh.shape["fsdp"]:
    raise errors.ConfigError(
      f"batch_size: mesh.fsdp = {mesh.shape['fsdp']} does not divide a batch "
      f"of {batch_size}"
    )


def _place(cohort: Cohort, shardings: dict[str, NamedSharding]) -> Cohort:
  def place(sharding):
    if jax.process_count() == 1:
      return lambda x: jax.device_put(np.asarray(x), sharding)
    return lambda x: jax.make_array_from_process_local_data(
      sharding, np.asarray(x)
    )

  placed = {
    name: jax.tree.map(place(sharding), getattr(cohort, name))
    for name, sharding in shardings.items()
  }
  return dataclasses.replace(cohort, **placed)
