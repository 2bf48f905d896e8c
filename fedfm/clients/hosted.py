"""Rounds whose clients' states are in a store on the host."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from fedfm.clients import store
from fedfm.clients.host_store import HostStore
from fedfm.types import ServerState


def hosted(
  run_round: Callable[..., tuple[ServerState, Any]],
  host: HostStore,
  mesh: Mesh,
) -> Callable[..., tuple[ServerState, Any]]:
  """Runs rounds whose client states are in a host store.

  Args:
    run_round: The jitted round.
    host: The store, opened to write.
    mesh: The mesh that the round runs on.

  Returns:
    `run_round(state, base, cohort)` of states whose `clients` are the store's
    version, an int32 NumPy scalar. A state of an older version than the
    store's, of a checkpoint, takes the store back to it first.
  """
  place = NamedSharding(mesh, jax.P("clients"))

  def run(state, base, cohort):
    host.roll_back(int(state.clients))
    version = int(state.round) + 1
    present = np.asarray(cohort.num_steps) > 0
    rows = np.asarray(cohort.row)[present]
    states = store.InSlots(
      jax.tree.map(
        lambda x, initial: jax.device_put(_spread(x, present, initial), place),
        host.read(rows),
        host.initial,
      )
    )
    state, metrics = run_round(
      dataclasses.replace(state, clients=states), base, cohort
    )
    states = jax.device_get(state.clients.states)
    host.write(rows, jax.tree.map(lambda x: x[present], states), version)
    clients = np.asarray(version, np.int32)
    return dataclasses.replace(state, clients=clients), metrics

  return run


def _spread(
  x: np.ndarray, present: np.ndarray, initial: np.ndarray
) -> np.ndarray:
  """Puts rows [n, ...] into the slots that hold a client, [lanes, slots, ...].

  The others get the initial state.
  """
  slots = np.empty((*present.shape, *x.shape[1:]), x.dtype)
  slots[...] = initial
  slots[present] = x
  return slots
