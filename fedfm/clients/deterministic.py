"""Rounds that give the same bits on any mesh and number of processes.

XLA rounds a client differently by how many lanes share its device, and the
server's step by how many devices the program is compiled for. So here every
lane runs alone, by a program for one device, on the device that holds it; what
the lanes bring is copied together, and one more program for one device, the
same in every process, makes the server's step of it. The lanes are part of the
result: their number must not change.
"""

from collections.abc import Callable
import contextvars
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from fedfm import errors, sharding
from fedfm.clients import cohort as cohorts
from fedfm.types import Cohort

PyTree = Any
# While a round is traced: where to leave what lanes bring, or what they did.
_TAKEN: contextvars.ContextVar[list[PyTree] | None] = contextvars.ContextVar(
  "taken", default=None
)
_GIVEN: contextvars.ContextVar[PyTree | None] = contextvars.ContextVar(
  "given", default=None
)
# What would make one device's result depend on the machine around it.
_OPTIONS = {
  "cpu": {"xla_cpu_multi_thread_eigen": False},
  "gpu": {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0},
}


def deterministic(fn: Callable, mesh: Mesh) -> Callable:
  """Makes a function of a cohort give the same bits on any mesh.

  Args:
    fn: Runs one cohort, such as a `FederatedAlgorithm.round`, not jitted.
    mesh: Its mesh, of which only `clients` may be larger than 1.

  Returns:
    `run(*args)` with the arguments of `fn`, placed on the mesh: a cohort from
    `put`, everything else replicated. It compiles what it needs, is not to be
    jitted, and returns replicated arrays.

  Raises:
    ConfigError: (when run) A function of two cohorts.
  """

  def bring(*args):
    taken: list[PyTree] = []
    token = _TAKEN.set(taken)
    try:
      fn(*args)
    finally:
      _TAKEN.reset(token)
    if len(taken) != 1:
      raise errors.ConfigError(
        f"deterministic: this algorithm runs {len(taken)} cohorts a round, "
        "expected one that runs one"
      )
    return taken[0]

  def conclude(brought, *args):
    token = _GIVEN.set(brought)
    try:
      return fn(*args)
    finally:
      _GIVEN.reset(token)

  run_lane = _jit(bring, mesh)
  serve = on_one_device(conclude, mesh)
  take = jax.jit(_one_lane)
  stack = jax.jit(lambda *lanes: jax.tree.map(_concatenate, *lanes))
  gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, jax.P()))

  def run(*args):
    (index,) = (i for i, x in enumerate(args) if isinstance(x, Cohort))
    cohort = args[index]
    of_devices = []
    for device in mesh.local_devices:
      own = _shards(args, device)
      with jax.set_mesh(_alone(device)):
        brought = []
        for lane in range(own[index].num_lanes):
          own_args = [*own]
          own_args[index] = take(own[index], lane)
          brought.append(run_lane(*own_args))
        of_devices.append(stack(*brought))
    with jax.set_mesh(mesh):
      rest = dataclasses.replace(cohort, batches={}, aligned=False)
      lanes = _from_devices(of_devices, mesh, cohort.num_lanes)
      # The one program with collectives, so nothing is queued behind it.
      brought, rest = jax.block_until_ready(gather((lanes, rest)))
    return serve(brought, *args[:index], rest, *args[index + 1 :])

  return run


def jit_cohort(fn: Callable, mesh: Mesh, is_deterministic: bool) -> Callable:
  """Jits a function of a cohort whose results every device has whole.

  Args:
    fn: As in `deterministic`.
    mesh: Its mesh.
    is_deterministic: Whether as `deterministic` does it, or as one program.

  Returns:
    The jitted function.
  """
  if is_deterministic:
    return deterministic(fn, mesh)
  return jax.jit(fn, out_shardings=NamedSharding(mesh, jax.P()))


def on_one_device(fn: Callable, mesh: Mesh) -> Callable:
  """Jits a function for one device and copies its results to the mesh's.

  Args:
    fn: A function of arrays.
    mesh: The mesh that its arguments are replicated on.

  Returns:
    `run(*args)`, which is not to be jitted and returns replicated arrays.
  """
  jitted = _jit(fn, mesh)
  home = mesh.local_devices[0]

  def run(*args):
    with jax.set_mesh(_alone(home)):
      result = jitted(*_shards(args, home))
    return jax.tree.map(lambda x: _replicated(x, mesh), result)

  return run


def brought(outputs: PyTree) -> PyTree:
  """Called by the engine with what the lanes of this program bring."""
  taken = _TAKEN.get()
  if taken is not None:
    taken.append(outputs)
  return outputs


def given() -> PyTree | None:
  """Called by the engine: what the lanes brought, if they have run already."""
  return _GIVEN.get()


def _jit(fn, mesh: Mesh) -> Callable:
  options = _OPTIONS.get(mesh.devices.flat[0].platform)
  return jax.jit(fn, compiler_options=options)


def _alone(device: jax.Device) -> Mesh:
  return sharding.make_mesh({"clients": 1}, [device])


def _one_lane(cohort: Cohort, lane: Any) -> Cohort:
  """Cuts a cohort of several lanes down to one."""

  def cut(x):
    return jax.lax.dynamic_slice_in_dim(x, lane, 1)

  parts = {
    field.name: jax.tree.map(cut, getattr(cohort, field.name))
    for field in dataclasses.fields(cohort)
    if field.name not in cohorts.REPLICATED and not field.metadata.get("static")
  }
  # A lane alone finds the states of its clients by their rows.
  return dataclasses.replace(cohort, **parts, aligned=False)


def _concatenate(*xs: jax.Array) -> jax.Array:
  return jnp.concatenate(xs)


def _shards(tree: PyTree, device: jax.Device) -> PyTree:
  """The part of global arrays that lies on a device, as arrays of its own."""

  def one(x):
    if isinstance(x, jax.Array):
      for shard in x.addressable_shards:
        if shard.device == device:
          return shard.data
    return jax.device_put(x, device)

  return jax.tree.map(one, tree)


def _from_devices(parts: list[PyTree], mesh: Mesh, num_lanes: int) -> PyTree:
  """Makes global arrays [lanes, ...] of each local device's lanes."""
  place = NamedSharding(mesh, jax.P("clients"))

  def one(*xs):
    shape = (num_lanes, *xs[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, place, list(xs))

  return jax.tree.map(one, *parts)


def _replicated(x: jax.Array, mesh: Mesh) -> jax.Array:
  copies = [jax.device_put(x, device) for device in mesh.local_devices]
  place = NamedSharding(mesh, jax.P())
  return jax.make_array_from_single_device_arrays(x.shape, place, copies)
