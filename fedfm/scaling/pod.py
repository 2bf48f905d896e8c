"""A config's round as shapes on a topology's devices: no weights, no data."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from fedfm import (
  blueprint,
  errors,
  models,
  planning,
  sharding,
  types,
)
from fedfm.scaling import cohort_shapes, formula
from fedfm.scaling import topology as topology_lib
from fedfm.scaling.cohort_shapes import Layout
from fedfm.scaling.formula import RoundFlops
from fedfm.scaling.topology import Topology
from fedfm.settings import Settings

PyTree = Any


class PodRound(NamedTuple):
  """A round that can be compiled.

  Attributes:
    topology: The machine.
    mesh: Its devices.
    model: The foundation model.
    layout: The cohort.
    flops: What it is expected to compute.
    program: The jitted `round(state, base, cohort)`.
    arguments: Its arguments, as shapes with shardings.
  """

  topology: Topology
  mesh: Mesh
  model: models.Model
  layout: Layout
  flops: RoundFlops
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
  to. The population of an algorithm whose clients keep a state is the cohort,
  and its states are on the devices. It is one round also with several a
  dispatch, and is sent its rows also where a run has them on the device.

  Args:
    settings: The run's settings.
    topology: The machine.

  Returns:
    A `PodRound`; nothing is compiled yet.

  Raises:
    ConfigError: A mesh that does not match the topology, lanes or rows that do
      not divide, clients whose number of steps is not said, or deterministic
      rounds, which are several programs.
    CheckpointError: The model's config.json.
  """
  if settings.deterministic:
    raise errors.ConfigError(
      "deterministic: got True, but a round of it is several programs, which "
      "cannot be compiled as one: expected False"
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
  layout = cohort_shapes.lay_out(settings, algorithm, mesh)
  rows = cohort_shapes.rows(settings.data, model.config)
  trainable = _placed(
    jax.eval_shape(adapter.init, jax.random.key(0), model.shapes),
    blueprint.trainable_shardings(mesh, model, adapter),
  )
  with jax.set_mesh(mesh):
    state_shardings = blueprint.state_shardings(
      mesh, algorithm, base, trainable, num_clients
    )
    state = _placed(jax.eval_shape(algorithm.init, trainable), state_shardings)
  chunk = 0
  if settings.data.task == "language_model":
    chunk = planning.loss_chunk(settings, mesh, model.config.vocab_size)
  return PodRound(
    topology=topology,
    mesh=mesh,
    model=model,
    layout=layout,
    flops=formula.round_flops(
      model,
      adapter,
      layout,
      settings.data.sequence_length,
      chunk,
      algorithm.passes,
    ),
    program=blueprint.jit_round(mesh, algorithm.round, state_shardings),
    arguments=(
      state,
      base,
      cohort_shapes.cohort(layout, rows, mesh, algorithm.aligned),
    ),
  )


def _placed(shapes: PyTree, shardings: PyTree) -> PyTree:
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    shardings,
  )
