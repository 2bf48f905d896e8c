"""Chooses a run's lanes and buffer sizes from the cohorts it will see."""

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from fedfm import errors
from fedfm.data import packing
from fedfm.data.sampling import Sampler
from fedfm.data.source import ClientSource
from fedfm.settings import Settings

# Rounds whose cohorts are planned, to choose the sizes that are compiled.
_PLANNED_ROUNDS = 200


def pack_options(settings: Settings) -> dict[str, Any]:
  """The part of the client settings that shapes its batches."""
  c = settings.client
  return {
    "batch_size": c.batch_size,
    "epochs": c.epochs,
    "local_steps": c.local_steps or None,
    "max_examples": c.max_examples or None,
  }


def _client_steps(
  settings: Settings, source: ClientSource, ids: Sequence[str]
) -> list[int]:
  return [
    packing.steps_per_client(source.size(i), **pack_options(settings))
    for i in ids
  ]


def choose_lanes(
  settings: Settings, source: ClientSource, sampler: Sampler, mesh: Mesh
) -> int:
  """Resolves `lanes` from the first cohorts, the same in every round.

  Args:
    settings: The run's settings.
    source: The clients.
    sampler: Gives the cohorts.
    mesh: The mesh; lanes are a multiple of its `clients` axis.

  Returns:
    The number of lanes.

  Raises:
    ConfigError: A number that `mesh.clients` does not divide.
  """
  axis = mesh.shape["clients"]
  if settings.lanes != "auto":
    lanes = int(settings.lanes)
    if lanes % axis:
      raise errors.ConfigError(
        f"lanes: mesh.clients = {axis} does not divide {lanes} lanes"
      )
    return lanes
  steps = _client_steps(settings, source, sampler.sample(0))
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  return packing.auto_lanes(steps, axis, on_cpu)


def plan_buckets(
  settings: Settings, source: ClientSource, sampler: Sampler, lanes: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Plans the padded sizes of a run, so that it compiles a handful of programs.

  Cohorts are pure functions of the round: the largest of the run (of its first
  200 rounds) is known before it starts.

  Args:
    settings: The run's settings.
    source: The clients.
    sampler: Gives the cohorts.
    lanes: Number of lanes.

  Returns:
    Allowed step counts (the largest needed, and a quarter of it), and the
    allowed clients a lane (the largest needed).
  """
  longest, most = 1, 1
  for r in range(min(settings.rounds, _PLANNED_ROUNDS)):
    steps = _client_steps(settings, source, sampler.sample(r))
    layout = packing.assign(steps, lanes)
    longest = max(longest, *(sum(steps[c] for c in lane) for lane in layout))
    most = max(most, *map(len, layout))
  return tuple(sorted({-(-longest // 4), longest})), (most,)
