"""Chooses a run's lanes and buffer sizes from the cohorts it will see."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from fedfm import errors, host_memory, trees
from fedfm.clients import check_lanes, own_lanes
from fedfm.data import layout, packing
from fedfm.data.continual import Schedule
from fedfm.data.realism import Costs, Realism
from fedfm.data.sampling import Sampler
from fedfm.data.source import ClientSource
from fedfm.settings import Settings
from fedfm.types import Cohort, FederatedAlgorithm

PyTree = Any

# What clients keep may take so much of the devices, in all; more is in a file.
_MOST_DEVICE_BYTES = 2**30
# Most bytes that a device's float32 logits may take at once.
_LOGITS_BYTES = 256 << 20
# Rounds whose cohorts are planned, to choose the sizes that are compiled.
_PLANNED_ROUNDS = 200


def pack_options(settings: Settings) -> dict[str, Any]:
  """The part of the client settings that shapes its batches, in all rounds."""
  c = settings.client
  return {
    "batch_size": c.batch_size,
    "epochs": c.epochs,
    "max_examples": c.max_examples or None,
  }


class Work(NamedTuple):
  """Who works in a round, and how much.

  Attributes:
    ids: The clients that report.
    local_steps: Of each.
    rates: Multiplies each one's learning rate.
    contacted: How many were given work; more than report where some drop out.
  """

  ids: list[str]
  local_steps: list[int]
  rates: list[float]
  contacted: int


class Sizes(NamedTuple):
  """Sizes that a cohort's buffers may have, of which the smallest is taken.

  Attributes:
    steps: Of the step axis.
    slots: Clients a lane.
    clients: Clients of the cohort.
  """

  steps: tuple[int, ...]
  slots: tuple[int, ...]
  clients: tuple[int, ...]


def plan(
  settings: Settings,
  algorithm: FederatedAlgorithm,
  sampler: Sampler,
  schedule: Schedule,
  realism: Realism,
  costs: Costs,
) -> Callable[[int], Work]:
  """Plans rounds, each a pure function of its number.

  Args:
    settings: The run's settings.
    algorithm: Says how many local steps a round has, or leaves it to settings.
    sampler: Gives the cohorts.
    schedule: What the clients hold in a round.
    realism: How they behave.
    costs: Of a client's round, for deadlines.

  Returns:
    `plan(round) -> Work`.
  """
  options = pack_options(settings)

  def work(round_index: int) -> Work:
    ids = sampler.sample(round_index)
    source = schedule.source(round_index)
    cap = settings.client.local_steps or None
    if algorithm.local_steps is not None:
      cap = algorithm.local_steps(round_index)
    asked = [
      packing.steps_per_client(source.size(i), local_steps=cap, **options)
      for i in ids
    ]
    got = realism.attend(ids, round_index, asked, costs)
    there = [i for i, reports in zip(ids, got.reports) if reports]
    return Work(
      ids=there,
      local_steps=got.steps[got.reports].tolist(),
      rates=realism.rates(there).tolist(),
      contacted=len(ids),
    )

  return work


def is_aligned(
  settings: Settings, algorithm: FederatedAlgorithm, source: ClientSource
) -> bool:
  """Whether every client of the population keeps its place on the lanes."""
  return algorithm.aligned and settings.clients_per_round == len(source)


def choose_store(settings: Settings, clients: PyTree) -> str:
  """Resolves `client.store`: where clients' states are between rounds.

  Args:
    settings: The run's settings.
    clients: Shapes of the store, leaves [num_clients, ...], or ().

  Returns:
    "device" or "host".

  Raises:
    ConfigError: "host" with several processes, in deterministic rounds, or
      with several rounds a dispatch.
  """
  several = jax.process_count() > 1
  if settings.client.store == "host" and several:
    raise errors.ConfigError(
      f"client.store: got 'host', but {jax.process_count()} processes expect "
      "'device': the file has one writer"
    )
  if settings.client.store == "host" and settings.deterministic:
    raise errors.ConfigError(
      "client.store: got 'host', but deterministic = True expects 'device'"
    )
  several = several or settings.deterministic
  size = trees.num_bytes(clients)
  if not size or several or settings.client.store == "device":
    return "device"
  if settings.client.store == "auto" and size <= _MOST_DEVICE_BYTES:
    return "device"
  if settings.rounds_per_dispatch > 1:
    raise errors.ConfigError(
      f"rounds_per_dispatch: got {settings.rounds_per_dispatch}, but clients' "
      f"states of {size} bytes, with client.store = "
      f"{settings.client.store!r}, are on the host, which expects 1"
    )
  return "host"


def choose_lanes(
  settings: Settings,
  source: ClientSource,
  plan_round: Callable[[int], Work],
  mesh: Mesh,
  aligned: bool = False,
) -> int:
  """Resolves `lanes` from the first cohorts, the same in every round.

  Args:
    settings: The run's settings.
    source: The clients.
    plan_round: From `plan`.
    mesh: The mesh; lanes are a multiple of its `clients` axis.
    aligned: Whether the clients keep their places; lanes divide their number.

  Returns:
    The number of lanes.

  Raises:
    ConfigError: A number that `mesh.clients` does not divide, or that does not
      divide the clients of an aligned layout.
  """
  axis = mesh.shape["clients"]
  if settings.lanes != "auto":
    lanes = int(settings.lanes)
    check_lanes(lanes, mesh)
  else:
    steps = plan_round(0).local_steps
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    rows = len(source) if aligned else None
    lanes = layout.auto_lanes(steps, axis, on_cpu, rows)
  if aligned:
    layout.align([], len(source), lanes)
  return lanes


def say_lanes(
  settings: Settings, plan_round: Callable[[int], Work], mesh: Mesh, lanes: int
) -> str:
  """Says how many lanes there are, and why where they were chosen.

  Args:
    settings: The run's settings.
    plan_round: From `plan`.
    mesh: The mesh.
    lanes: From `choose_lanes`.

  Returns:
    A part of a line.
  """
  if settings.lanes != "auto":
    return f"{lanes} lanes"
  axis = mesh.shape["clients"]
  why = f"one for each of {axis} along mesh.clients, as these are CPU devices"
  if mesh.devices.flat[0].platform != "cpu":
    steps = plan_round(0).local_steps
    why = (
      f"up to {layout.LANES_PER_ACCELERATOR} for each of {axis} along "
      f"mesh.clients, and the first cohort keeps "
      f"{layout.busy_lanes(steps) if steps else 0} busy"
    )
  return f"{lanes} lanes (lanes = 'auto': {why})"


def loss_chunk(settings: Settings, mesh: Mesh, vocab_size: int) -> int:
  """Resolves `model.loss_chunk`.

  "auto" is the plain loss where a device's logits, in float32 and over its
  lanes, take at most 256 MiB; otherwise as many tokens of each lane as do, a
  power of two.

  Args:
    settings: The run's settings; of automatic lanes, the most that may be
      chosen are counted.
    mesh: The mesh.
    vocab_size: Size of the vocabulary.

  Returns:
    Tokens of a lane whose logits exist at once; 0 for all.

  Examples:
    >>> import jax
    >>> from fedfm import sharding
    >>> mesh = sharding.make_mesh({"clients": 1}, jax.devices()[:1])
    >>> loss_chunk(Settings(), mesh, vocab_size=272)
    0
    >>> loss_chunk(Settings(lanes=16), mesh, vocab_size=128_256)
    32
  """
  chosen = settings.model.loss_chunk
  if chosen != "auto":
    return int(chosen)
  rows = max(
    settings.client.batch_size // settings.client.accumulate,
    settings.eval.batch_size,
  )
  axis = mesh.shape["clients"]
  if settings.lanes == "auto":
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    lanes_here = 1 if on_cpu else layout.LANES_PER_ACCELERATOR
  else:
    lanes_here = -(-int(settings.lanes) // axis)
  a_token = 4 * lanes_here * vocab_size
  a_token //= mesh.shape["fsdp"] * mesh.shape["tensor"]
  most = _LOGITS_BYTES // max(a_token, 1)
  if most >= rows * settings.data.sequence_length:
    return 0
  return 1 << max(most.bit_length() - 1, 0)


def plan_buckets(
  settings: Settings,
  source: ClientSource,
  plan_round: Callable[[int], Work],
  lanes: int,
  aligned: bool = False,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Plans the padded sizes of a run, so that it compiles a handful of programs.

  Cohorts are pure functions of the round: the largest of the run (of its first
  200 rounds) is known before it starts.

  Args:
    settings: The run's settings.
    source: The clients.
    plan_round: From `plan`.
    lanes: Number of lanes.
    aligned: Whether the clients keep their places.

  Returns:
    Allowed step counts and allowed clients a lane, as `layout.plan_buckets`.

  Raises:
    ConfigError: Rows that the host's memory does not hold.
  """
  each = host_memory.row_bytes(source)
  host_memory.check_steps(settings, each, lanes)
  rounds = range(min(settings.rounds, _PLANNED_ROUNDS))
  cohorts = (_steps(plan_round(r), source, aligned) for r in rounds)
  rows = len(source) if aligned else None
  buckets = layout.plan_buckets(cohorts, lanes, rows)
  host_memory.check_round(settings, each, lanes, max(buckets[0]))
  return buckets


def _steps(work: Work, source: ClientSource, aligned: bool) -> list[int]:
  """Steps of the clients to lay out: of every row, where they are aligned."""
  if not aligned:
    return work.local_steps
  by_row = [0] * len(source)
  for client_id, count in zip(work.ids, work.local_steps):
    by_row[source.index(client_id)] = count
  return by_row


def _shared_sizes(
  works: Sequence[Work],
  source: ClientSource,
  allowed: Sizes,
  lanes: int,
  aligned: bool,
) -> Sizes:
  """The largest sizes that any of several cohorts needs."""
  rows = len(source) if aligned else None
  needed = [
    (*layout.needed_sizes(_steps(w, source, aligned), lanes, rows), len(w.ids))
    for w in works
  ]
  return Sizes(
    *(
      (layout.bucket(max(1, *sizes), choices),)
      for sizes, choices in zip(zip(*needed), allowed, strict=True)
    )
  )


def pack(
  settings: Settings,
  sources: Sequence[ClientSource],
  rounds: Sequence[int],
  works: Sequence[Work],
  sizes: Sizes,
  lanes: int,
  mesh: Mesh,
  aligned: bool = False,
) -> list[Cohort]:
  """Packs this process's part of some rounds, in buffers of one size.

  Args:
    settings: The run's settings.
    sources: The clients, with what they hold in each round.
    rounds: Their numbers.
    works: Who works in each.
    sizes: What their buffers may have.
    lanes: Number of lanes.
    mesh: Says which of them this process's devices hold.
    aligned: Whether the clients keep their places.

  Returns:
    For each round, a `Cohort` of NumPy arrays.
  """
  if len(works) > 1:
    sizes = _shared_sizes(works, sources[0], sizes, lanes, aligned)
  return [
    packing.pack(
      source,
      work.ids,
      local_steps=work.local_steps,
      rates=work.rates,
      aligned=aligned,
      lanes=lanes,
      shuffle=True,
      seed=settings.seed,
      round=round_index,
      own_lanes=own_lanes(mesh, lanes),
      step_buckets=sizes.steps,
      slot_buckets=sizes.slots,
      client_buckets=sizes.clients,
      **pack_options(settings),
    )
    for source, round_index, work in zip(sources, rounds, works, strict=True)
  ]
