"""Placing a cohort on a mesh."""

import dataclasses

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from fedfm import errors
from fedfm.types import Cohort

# Fields that every process holds whole; the others hold its own lanes only.
REPLICATED = ("boundaries", "num_segments", "order")


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

  def place(spec):
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
      return lambda x: jax.device_put(np.asarray(x), sharding)
    return lambda x: jax.make_array_from_process_local_data(
      sharding, np.asarray(x)
    )

  placed = {}
  for field in dataclasses.fields(cohort):
    if field.name in REPLICATED:
      spec = jax.P()
    elif field.name == "batches":
      spec = jax.P("clients", None, "fsdp")
    else:
      spec = jax.P("clients")
    placed[field.name] = jax.tree.map(place(spec), getattr(cohort, field.name))
  return Cohort(**placed)
