"""Client states in a run's folder, for populations that fit no device."""

import contextlib
import dataclasses
import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedfm import checkpoint, errors
from fedfm.assembly import Experiment
from fedfm.clients.host_store import COPIES, HostStore
from fedfm.clients.row_files import RowFiles
from fedfm.clients.sealing import DamagedRowsError
from fedfm.types import ServerState

FOLDER = "clients"  # In the run's.
_CHUNK = 1 << 26  # Bytes that are checked at a time.


def open_store(
  experiment: Experiment, folder: pathlib.Path, **options: Any
) -> Experiment:
  """Opens the store of clients' states, where it is one on the host.

  Args:
    experiment: What is run.
    folder: The run's; the store is in `clients/` below it.
    **options: `read_only`, `may_create` and `oldest` of `HostStore`.

  Returns:
    The experiment, with an open store where it needs one; a reader goes
    without where the folder has none.

  Raises:
    CheckpointError: A store that cannot be opened, or one of another run.
  """
  new_client, place = experiment.algorithm.client_state, folder / FOLDER
  if experiment.client_store == "device" or new_client is None:
    return experiment
  if options.get("read_only") and not place.exists():
    return experiment
  with jax.set_mesh(experiment.mesh):
    state = jax.device_get(jax.jit(new_client)(experiment.trainable))
  num_clients = len(experiment.data.train)
  opened = HostStore(place, state, num_clients, **options)
  return dataclasses.replace(experiment, host=opened)


def check(experiment: Experiment, state: ServerState) -> None:
  """Checks that the store has the version that a checkpoint's state names.

  Args:
    experiment: With an open store, if it has one.
    state: As restored.

  Raises:
    DamagedError: What leads to the version is damaged or missing.
    CheckpointError: The version is no longer known.
  """
  if experiment.host is None:
    return
  try:
    experiment.host.check(int(state.clients))
  except DamagedRowsError as e:
    raise checkpoint.DamagedError(str(e)) from e


def take_back(experiment: Experiment, state: ServerState) -> None:
  """Makes the store what it was when a state was saved, or new.

  Args:
    experiment: With an open store, if it has one.
    state: As restored, or the first.

  Raises:
    CheckpointError: The version is missing, or no longer known.
    SaveError: The store cannot be written.
  """
  if experiment.host is not None:
    experiment.host.roll_back(int(state.clients))


def verify(folder: pathlib.Path, version: int) -> tuple[str, list[str]]:
  """Reads every client's state, as a checkpoint has it, in both copies.

  Args:
    folder: The run's, with a store.
    version: Of the store, `state.clients` of the checkpoint.

  Returns:
    A SHA-256 of all states, and a line for everything that is damaged in one of
    the copies.

  Raises:
    DamagedError: What is damaged in both, a version that is not known any more,
      or a store that cannot be read.
  """
  place = folder / FOLDER
  damaged, digest = [], hashlib.sha256()
  try:
    with contextlib.closing(_reader(place)) as store:
      size = sum(x.nbytes for x in jax.tree.leaves(store.initial))
      rows = max(1, _CHUNK // max(size, 1))
      for first in range(0, store.num_clients, rows):
        chunk = np.arange(first, min(first + rows, store.num_clients))
        damaged += store.damage(chunk, version)
        for leaf in jax.tree.leaves(store.read(chunk, version)):
          digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
  except errors.CheckpointError as e:
    raise checkpoint.DamagedError(str(e)) from e
  return digest.hexdigest(), damaged


def _reader(place: pathlib.Path) -> HostStore:
  """Opens a store by what it says of itself; its states are path -> array."""
  found = [RowFiles(place / name, 0, 0).description() for name in COPIES]
  known = [content["store"] for content in found if content is not None]
  if not known:
    raise checkpoint.DamagedError(f"{place}: both files store.json are damaged")
  leaves = known[0]["leaves"].items()
  state = {p: np.zeros(shape, jnp.dtype(dtype)) for p, (dtype, shape) in leaves}
  return HostStore(place, state, known[0]["num_clients"], read_only=True)
