"""Times a round against the plain step, pair by pair, in one run.

Machines drift: only ratios of times taken in turn, A B A B, say anything.
"""

from collections.abc import Callable
import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np
import optax

from fedfm import (
  algorithms,
  blueprint,
  clients,
  data,
  prefetch,
  sharding,
  types,
)
from fedfm.data import packing
from fedfm.scaling import chips
from fedfm.scaling.workloads import Workload

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
  """A workload on a mesh, compiled.

  Attributes:
    work: The workload.
    mesh: The mesh.
    algorithm: FedAvg on the workload's loss.
    state: Server state.
    base: Frozen weights, or None.
    source: The clients.
    num_lanes: Lanes.
    round: Compiled `(state, base, cohort) -> (state, metrics)`.
    compile_seconds: What compiling the round took.
  """

  work: Workload
  mesh: Mesh
  algorithm: types.FederatedAlgorithm
  state: types.ServerState
  base: PyTree
  source: data.ClientSource
  num_lanes: int
  round: Any
  compile_seconds: float

  def pack(
    self, round_index: int = 0, source: data.ClientSource | None = None
  ) -> types.Cohort:
    """Packs all clients, of their source or of another form of it."""
    source = self.source if source is None else source
    return packing.pack(
      source,
      source.ids,
      batch_size=self.work.batch_size,
      lanes=self.num_lanes,
      round=round_index,
      shuffle=True,
    )

  def cohort(self, round_index: int = 0) -> types.Cohort:
    """Packs all clients and places them."""
    return clients.put(self.pack(round_index), self.mesh)


def place(work: Workload, mesh: Mesh, lanes: int | str = "auto") -> Placed:
  """Places a workload on a mesh and compiles its round.

  Args:
    work: The workload.
    mesh: The mesh.
    lanes: Number of lanes, or "auto".

  Returns:
    A `Placed`.

  Raises:
    ConfigError: Lanes or a batch that the mesh does not divide.
  """
  source = work.source(work.num_clients)
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  if lanes == "auto":
    lanes = packing.auto_lanes(
      [work.local_steps] * work.num_clients, mesh.shape["clients"], on_cpu
    )
  algorithm = algorithms.fedavg(
    work.loss, client_optimizer=work.client_optimizer
  )
  key = jax.random.key(0)
  with jax.set_mesh(mesh):
    places = sharding.shardings(mesh, work.model.axes, work.model.shapes)
    shapes = jax.eval_shape(work.init, key)
    out = sharding.shardings_like(mesh, shapes, work.model.shapes, places)
    trainable, base = jax.jit(work.init, out_shardings=out)(key)
    like = sharding.shardings_like(
      mesh, jax.eval_shape(algorithm.init, trainable), trainable, out[0]
    )
    state = jax.jit(algorithm.init, out_shardings=like)(trainable)
    placed = Placed(
      work=work,
      mesh=mesh,
      algorithm=algorithm,
      state=state,
      base=base,
      source=source,
      num_lanes=int(lanes),
      round=None,
      compile_seconds=0.0,
    )
    began = time.perf_counter()
    compiled = (
      blueprint.jit_round(mesh, algorithm.round, like)
      .lower(state, base, placed.cohort())
      .compile()
    )
  return dataclasses.replace(
    placed, round=compiled, compile_seconds=time.perf_counter() - began
  )


def plain_step(placed: Placed, num_rows: int) -> Callable[[], None]:
  """Compiles the centralized step that a round is measured against.

  Data-parallel over the whole mesh, on one batch of `num_rows` rows: no
  clients, no lanes, no federation.

  Args:
    placed: Gives the workload, the mesh and the weights.
    num_rows: Rows of the batch; all of a cohort's for the same total batch.

  Returns:
    A function that runs one step to its end.
  """
  work, mesh = placed.work, placed.mesh
  rows = work.make_example(np.random.default_rng(1), num_rows)
  rows["mask"] = np.ones(num_rows, np.float32)
  over = tuple(a for a in ("clients", "fsdp") if num_rows % mesh.shape[a] == 0)
  batch = jax.device_put(rows, NamedSharding(mesh, jax.P(over)))
  tx, grad_fn = work.client_optimizer, jax.grad(work.loss, has_aux=True)

  def step(carry, base, batch, key):
    trainable, state = carry
    grads, _ = grad_fn(trainable, base, batch, key)
    updates, state = tx.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state

  key = jax.random.key(0)
  with jax.set_mesh(mesh):
    trainable = jax.tree.map(jnp.copy, placed.state.trainable)
    carry = (trainable, jax.jit(tx.init)(trainable))
    places = jax.tree.map(lambda x: x.sharding, carry)
    compiled = (
      jax.jit(step, donate_argnums=0, out_shardings=places)
      .lower(carry, placed.base, batch, key)
      .compile()
    )
  held = [carry]

  def run():
    held[0] = compiled(held[0], placed.base, batch, key)
    # One dispatch at a time: virtual CPU devices deadlock with more queued.
    jax.block_until_ready(held[0])

  return run


def matmul_rate(mesh: Mesh, dtype: str, size: int = 1024) -> float:
  """Measures the rate of plain matmuls, one on each device of a mesh.

  Args:
    mesh: The devices.
    dtype: Of the factors.
    size: Side of the square factors.

  Returns:
    FLOP/s of all devices together, the best of several runs.
  """
  n = mesh.size
  spec = jax.P(mesh.axis_names)
  x = jax.device_put(
    np.ones((n, size, size), np.float32).astype(jnp.dtype(dtype)),
    NamedSharding(mesh, spec),
  )
  repeats = 4

  @jax.jit
  @jax.shard_map(mesh=mesh, in_specs=spec, out_specs=spec)
  def run(x):
    y = x[0]
    for _ in range(repeats):
      y = (y @ x[0]) * (1.0 / size)
    return y[None]

  with jax.set_mesh(mesh):
    jax.block_until_ready(run(x))
    best = min(
      _seconds(lambda: jax.block_until_ready(run(x))) for _ in range(10)
    )
  return n * repeats * 2 * size**3 / best


def _seconds(fn: Callable[[], Any]) -> float:
  began = time.perf_counter()
  fn()
  return time.perf_counter() - began


def measure(
  work: Workload, mesh: Mesh, *, lanes: int | str = "auto", repeats: int = 5
) -> dict[str, Any]:
  """Measures one workload on one mesh.

  Args:
    work: The workload.
    mesh: The mesh.
    lanes: Number of lanes, or "auto".
    repeats: Timed pairs of (a round, as many plain steps), after one warm-up.

  Returns:
    A row of figures; times are medians, seconds; memory is bytes a device.
  """
  placed = place(work, mesh, lanes)
  rows = work.batch_size * work.num_clients
  step = plain_step(placed, rows)
  cohort = placed.cohort()
  state = [placed.state]

  def run_round():
    with jax.set_mesh(mesh):
      state[0], metrics = placed.round(state[0], placed.base, cohort)
      jax.device_get(metrics)  # As a run does.

  def run_plain():
    for _ in range(work.local_steps):
      step()

  run_round(), run_plain()
  pairs = [(_seconds(run_round), _seconds(run_plain)) for _ in range(repeats)]
  gap = idle_gap(placed, state[0], rounds=max(3, repeats))
  seconds = statistics.median(a for a, _ in pairs)
  plain = statistics.median(b for _, b in pairs)
  units = rows * work.local_steps * work.units_per_example
  flops = units * work.flops_per_unit
  rate = matmul_rate(mesh, work.dtype)
  peak = device_peak(mesh, work.dtype)
  return {
    "workload": work.name,
    "device": mesh.devices.flat[0].device_kind,
    "mesh": "x".join(str(mesh.shape[a]) for a in sharding.MESH_AXES),
    "clients": work.num_clients,
    "lanes": placed.num_lanes,
    "batch": work.batch_size,
    "steps": work.local_steps,
    "unit": work.unit,
    "units_per_round": units,
    "round_seconds": seconds,
    "rounds_per_second": 1 / seconds,
    "units_per_second": units / seconds,
    "client_steps_per_second": work.num_clients * work.local_steps / seconds,
    "plain_units_per_second": units / plain,
    "ratio_to_plain": statistics.median(b / a for a, b in pairs),
    "flops_per_second": flops / seconds,
    "of_matmul_rate": flops / seconds / rate,
    "model_flops_utilisation": flops / seconds / peak if peak else None,
    "idle_gap": gap,
    "packing_efficiency": packing.efficiency(placed.pack()),
    "compile_seconds": placed.compile_seconds,
    **memory(placed.round, mesh),
  }


def device_peak(mesh: Mesh, dtype: str) -> float | None:
  """Published peak FLOP/s of a mesh's devices together, if known."""
  peak = chips.peak_flops(mesh.devices.flat[0].device_kind, dtype)
  return None if peak is None else peak * mesh.size


def memory(compiled: Any, mesh: Mesh) -> dict[str, int | None]:
  """Bytes a device: by the compiler's analysis, and the device's own peak."""
  a = compiled.memory_analysis()
  stats = mesh.devices.flat[0].memory_stats() or {}
  total = a.argument_size_in_bytes + a.temp_size_in_bytes
  total += a.output_size_in_bytes - a.alias_size_in_bytes
  return {
    "program_bytes": total,
    "temp_bytes": a.temp_size_in_bytes,
    "device_peak_bytes": stats.get("peak_bytes_in_use"),
  }


def idle_gap(placed: Placed, state: types.ServerState, rounds: int) -> float:
  """Share of time between rounds in which no round runs.

  Runs rounds as a run does: the next cohort is packed and placed in a thread
  while this one's round runs, and metrics are fetched after every round.

  Args:
    placed: The workload.
    state: Where to start; donated.
    rounds: Rounds to run, at least 2.

  Returns:
    1 - (time in rounds) / (time from the first round's start to the last's
    end).
  """
  busy, began = 0.0, None
  with jax.set_mesh(placed.mesh):
    for _, cohort in prefetch.prefetch(placed.cohort, 0, rounds):
      started = time.perf_counter()
      began = started if began is None else began
      state, metrics = placed.round(state, placed.base, cohort)
      jax.device_get(metrics)
      busy += time.perf_counter() - started
  assert began is not None
  return 1 - busy / (time.perf_counter() - began)
