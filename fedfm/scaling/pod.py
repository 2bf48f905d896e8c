"""A config's round as shapes on a topology's devices: no weights, no data."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedfm import (
  adapters,
  blueprint,
  clients,
  errors,
  models,
  planning,
  sharding,
  types,
)
from fedfm.data import layout as layout_lib
from fedfm.scaling import topology as topology_lib
from fedfm.scaling.topology import Topology
from fedfm.settings import Settings

PyTree = Any


class Layout(NamedTuple):
  """How a cohort of equal clients lies on lanes.

  Attributes:
    num_clients: Clients of a round.
    lanes: Lanes.
    slots: Clients that a lane runs one after the other.
    local_steps: Steps of a client.
    rows: Rows of a local step.
    length: Tokens of a row.
  """

  num_clients: int
  lanes: int
  slots: int
  local_steps: int
  rows: int
  length: int

  @property
  def tokens(self) -> int:
    """Tokens of a round that count."""
    steps = self.num_clients * self.local_steps
    return steps * self.rows * self.length

  @property
  def tokens_run(self) -> int:
    """Tokens of a round with those of lanes that wait for the longest."""
    return self.tokens * self.lanes * self.slots // self.num_clients


class PodRound(NamedTuple):
  """A round that can be compiled.

  Attributes:
    topology: The machine.
    mesh: Its devices.
    model: The foundation model.
    adapter: What clients train.
    layout: The cohort.
    chunk: Tokens whose logits exist at once, 0 for all.
    program: The jitted `round(state, base, cohort)`.
    arguments: Its arguments, as shapes with shardings.
  """

  topology: Topology
  mesh: Mesh
  model: models.Model
  adapter: adapters.Adapter
  layout: Layout
  chunk: int
  program: Any
  arguments: tuple[PyTree, PyTree, types.Cohort]

  def lower(self) -> jax.stages.Lowered:
    """Traces the round and lowers it for the topology."""
    with jax.set_mesh(self.mesh):
      return self.program.lower(*self.arguments)


def build(settings: Settings, topology: Topology) -> PodRound:
  """Builds a config's round for a topology, as shapes.

  Every client takes the same number of steps: the algorithm's, or
  `client.local_steps`, or what `client.max_examples` and `client.epochs` come
  to. The population of an algorithm whose clients keep a state is the cohort.

  Args:
    settings: The run's settings.
    topology: The machine.

  Returns:
    A `PodRound`; nothing is compiled yet.

  Raises:
    ConfigError: A task that is not 'language_model', whose batches and FLOPs
      are the ones that are known here; a mesh that does not match the topology,
      lanes or rows that do not divide, or clients whose number of steps is not
      said.
    CheckpointError: The model's config.json.
  """
  if settings.data.task != "language_model":
    raise errors.ConfigError(
      f"data.task: got {settings.data.task!r}, but only rounds of "
      "'language_model' can be compiled without their data"
    )
  devices = topology_lib.devices(topology)
  try:
    mesh = sharding.make_mesh(dataclasses.asdict(settings.mesh), devices)
  except errors.ConfigError as e:
    raise errors.ConfigError(f"{e} (topology {topology})") from None
  blueprint.check_rows(settings, mesh)
  model = blueprint.make_model(settings, mesh)
  adapter = blueprint.make_adapter(settings, model)
  places = sharding.shardings(mesh, model.axes, model.shapes)
  base = None
  if adapter.kind != "full":
    base = _placed(model.shapes, places)
  _, loss = blueprint.losses(settings, model, adapter, mesh)
  num_clients = settings.clients_per_round
  algorithm = blueprint.algorithm(settings, loss, adapter, num_clients)
  layout = _layout(settings, algorithm, mesh)
  trainable = _placed(
    jax.eval_shape(adapter.init, jax.random.key(0), model.shapes),
    blueprint.trainable_shardings(mesh, model, adapter),
  )
  with jax.set_mesh(mesh):
    state_shardings = blueprint.state_shardings(
      mesh, algorithm, base, trainable, num_clients
    )
    state = _placed(jax.eval_shape(algorithm.init, trainable), state_shardings)
  return PodRound(
    topology=topology,
    mesh=mesh,
    model=model,
    adapter=adapter,
    layout=layout,
    chunk=planning.loss_chunk(settings, mesh, model.config.vocab_size),
    program=blueprint.jit_round(mesh, algorithm.round, state_shardings),
    arguments=(state, base, _cohort(layout, mesh, algorithm.aligned)),
  )


def _placed(shapes: PyTree, shardings: PyTree) -> PyTree:
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    shardings,
  )


def _layout(
  settings: Settings, algorithm: types.FederatedAlgorithm, mesh: Mesh
) -> Layout:
  """Lays equal clients out, as `data.pack` would."""
  c, num_clients = settings.client, settings.clients_per_round
  steps = c.local_steps
  if algorithm.local_steps is not None:
    steps = algorithm.local_steps(0)
  if not steps:
    if not c.max_examples:
      raise errors.ConfigError(
        "client.local_steps: got 0, expected the steps of a client (or "
        "client.max_examples), as there is no data to count"
      )
    steps = c.epochs * -(-c.max_examples // c.batch_size)
  axis = mesh.shape["clients"]
  lanes = settings.lanes
  if lanes == "auto":
    rows = num_clients if algorithm.aligned else None
    lanes = layout_lib.auto_lanes([steps] * num_clients, axis, False, rows)
  lanes = int(lanes)
  if lanes % axis:
    raise errors.ConfigError(
      f"lanes: mesh.clients = {axis} does not divide {lanes} lanes"
    )
  if algorithm.aligned:
    layout_lib.align([], num_clients, lanes)  # Raises where it can't be.
  return Layout(
    num_clients=num_clients,
    lanes=lanes,
    slots=-(-num_clients // lanes),
    local_steps=steps,
    rows=c.batch_size,
    length=settings.data.sequence_length,
  )


def _cohort(layout: Layout, mesh: Mesh, aligned: bool) -> types.Cohort:
  """The cohort's shapes; see `types.Cohort`."""
  steps = layout.slots * layout.local_steps
  on_lane, on_slot = (layout.lanes, steps), (layout.lanes, layout.slots)
  rows = (*on_lane, layout.rows)
  i32, f32 = jnp.int32, jnp.float32
  fields: dict[str, Any] = {
    "batches": {
      "mask": (rows, f32),
      "tokens": ((*rows, layout.length), i32),
      "loss_mask": ((*rows, layout.length), f32),
    },
    "slot": (on_lane, i32),
    "start": (on_lane, jnp.bool_),
    "end": (on_lane, jnp.bool_),
    "boundaries": ((steps + 1,), i32),
    "num_segments": ((), i32),
    "id_hash": ((*on_slot, 2), jnp.uint32),
    "row": (on_slot, i32),
    "num_examples": (on_slot, i32),
    "num_steps": (on_slot, i32),
    "weight": (on_slot, f32),
    "rate": (on_slot, f32),
    "order": ((layout_lib.bucket(layout.num_clients),), i32),
  }
  places = clients.cohort.shardings(mesh)

  def shape(leaf, place) -> Any:
    if isinstance(leaf, dict):
      return {k: shape(x, place) for k, x in leaf.items()}
    return jax.ShapeDtypeStruct(*leaf, sharding=place)

  return types.Cohort(
    **{name: shape(leaf, places[name]) for name, leaf in fields.items()},
    aligned=aligned,
  )
