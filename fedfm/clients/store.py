"""The client store: what clients keep from round to round.

Leaves are [num_clients, ...], a row a client of the population, in the order of
`ClientSource.ids`. The cohort's rows are gathered once before its lanes run,
into slots [lanes, slots, ...], and scattered once after. An aligned cohort runs
every client where its row lies: the slots are the store itself, reshaped, and
nothing crosses the mesh axis `clients`.
"""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from fedfm import errors
from fedfm.types import Cohort

PyTree = Any
_LOG = logging.getLogger("fedfm")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InSlots:
  """In place of a store: the cohort's rows only, where the store is elsewhere.

  Attributes:
    states: Leaves [lanes, slots, ...]; slots without a client hold any state.
  """

  states: PyTree


def init(client_state: PyTree, num_clients: int) -> PyTree:
  """Gives every client of the population the same state.

  Args:
    client_state: One client's state, a tree of arrays.
    num_clients: Size of the population.

  Returns:
    The store, leaves [num_clients, ...].
  """
  return jax.tree.map(
    lambda x: jnp.broadcast_to(x, (num_clients, *jnp.shape(x))), client_state
  )


def shardings(mesh: Mesh, row: PyTree, num_clients: int) -> PyTree:
  """Splits the store's rows over mesh axis `clients`, where they divide.

  Args:
    mesh: The mesh.
    row: A `NamedSharding` per leaf of one client's state.
    num_clients: Rows of the store.

  Returns:
    A `NamedSharding` per leaf of the store.
  """
  axis = "clients"
  if num_clients % mesh.shape[axis]:
    axis = None
    if jax.tree.leaves(row):
      _LOG.info(
        "client store: mesh.clients = %d does not divide %d rows: all devices "
        "hold them all",
        mesh.shape["clients"],
        num_clients,
      )
  return jax.tree.map(lambda s: NamedSharding(mesh, jax.P(axis, *s.spec)), row)


def gather(store: PyTree, cohort: Cohort) -> PyTree:
  """Reads the cohort's rows into slots.

  Args:
    store: Leaves [num_clients, ...], or `InSlots`.
    cohort: Says which client is where.

  Returns:
    Leaves [lanes, slots, ...]; a slot without a client holds any row.

  Raises:
    ConfigError: An aligned cohort whose slots are not the store's rows.
  """
  if isinstance(store, InSlots):
    return store.states
  if cohort.aligned:
    return jax.tree.map(lambda x: _rows_to_slots(x, cohort), store)
  return jax.tree.map(lambda x: x[cohort.row], store)


def scatter(store: PyTree, cohort: Cohort, states: PyTree) -> PyTree:
  """Writes the slots back to the cohort's rows.

  Args:
    store: Leaves [num_clients, ...], or `InSlots`.
    cohort: Says which client is where.
    states: Leaves [lanes, slots, ...]; slots without a client are not read.

  Returns:
    The store, changed in the cohort's rows.
  """
  if isinstance(store, InSlots):
    return InSlots(
      jax.tree.map(lambda x, new: new.astype(x.dtype), store.states, states)
    )
  if cohort.aligned:  # The engine leaves slots without a client as they were.
    return jax.tree.map(
      lambda x, new: new.reshape(x.shape).astype(x.dtype), store, states
    )
  present = cohort.num_steps > 0

  def one(x, new):
    rows = jnp.where(present, cohort.row, x.shape[0])
    return x.at[rows].set(new.astype(x.dtype), mode="drop")

  return jax.tree.map(one, store, states)


def _rows_to_slots(x: jax.Array, cohort: Cohort) -> jax.Array:
  """Reshapes [lanes * slots, ...] to [lanes, slots, ...]."""
  lanes, slots = cohort.row.shape
  if x.shape[0] != lanes * slots:
    raise errors.ConfigError(
      f"lanes: an aligned cohort of {lanes} lanes and {slots} slots does not "
      f"hold the {x.shape[0]} rows of the client store"
    )
  return x.reshape((lanes, slots, *x.shape[1:]))
