"""Times rounds by how many are one program, and by where their rows are.

As a run does it: the next cohort is packed and sent in a thread while a program
runs, and metrics are fetched after every program.
"""

from collections.abc import Callable, Sequence
import statistics
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from fedfm import blueprint, clients, dispatch, prefetch, trees, types
from fedfm.data import resident
from fedfm.scaling import measure
from fedfm.scaling.workloads import Workload

PyTree = Any
_TURN_SECONDS = 2.0  # What each is timed over, or a program where that is more.


class _Case(NamedTuple):
  """A way to run rounds.

  Attributes:
    each: Rounds of a program.
    run: Runs so many programs to their end.
    sent_bytes: Bytes of the cohort of a round.
  """

  each: int
  run: Callable[[int], None]
  sent_bytes: float


def measure_dispatches(
  work: Workload,
  mesh: Mesh,
  *,
  lanes: int | str = "auto",
  counts: Sequence[int] = (1, 2, 5, 10),
  repeats: int = 5,
) -> list[dict[str, Any]]:
  """Measures rounds of one workload in all ways, in turn.

  Args:
    work: The workload.
    mesh: The mesh.
    lanes: Number of lanes, or "auto".
    counts: Rounds of a program.
    repeats: How often all are timed, after a warm-up each.

  Returns:
    A row for each count and each place of the rows to train on, the host or the
    device: "rounds_per_second", the median, and "ratio_to_first", the median
    of its ratios to the first row of the same turn.

  Raises:
    ConfigError: As `measure.place`.
  """
  placed = measure.place(work, mesh, lanes)
  numbers, table = resident.rows(placed.source)
  on_device = resident.place(table, mesh)
  ways = [(each, held) for held in (False, True) for each in counts]
  cases = [
    _case(
      placed,
      each,
      numbers if held else placed.source,
      on_device if held else None,
    )
    for each, held in ways
  ]
  for case in cases:
    case.run(1)
  began = time.perf_counter()
  cases[0].run(1)
  rounds = _TURN_SECONDS / (time.perf_counter() - began)
  turns: list[list[float]] = []
  for _ in range(repeats):
    turns.append([])
    for case in cases:
      programs = max(1, round(rounds / case.each))
      began = time.perf_counter()
      case.run(programs)
      seconds = time.perf_counter() - began
      turns[-1].append(programs * case.each / seconds)
  return [
    {
      "workload": work.name,
      "device": mesh.devices.flat[0].device_kind,
      "clients": work.num_clients,
      "lanes": placed.num_lanes,
      "batch": work.batch_size,
      "steps": work.local_steps,
      "rounds_per_dispatch": each,
      "rows": "device" if held else "host",
      "sent_bytes": case.sent_bytes,
      "rounds_per_second": statistics.median(turn[i] for turn in turns),
      "ratio_to_first": statistics.median(turn[i] / turn[0] for turn in turns),
    }
    for i, ((each, held), case) in enumerate(zip(ways, cases, strict=True))
  ]


def _case(
  placed: measure.Placed,
  each: int,
  source: Any,
  table: dict[str, jax.Array] | None,
) -> _Case:
  """Builds one way to run rounds."""
  round_fn, base = placed.algorithm.round, placed.base
  if table is not None:
    round_fn, base = resident.looked_up(round_fn), (base, table)
  if each > 1:
    round_fn = dispatch.many_rounds(round_fn)
  # Own copies: what is run is donated.
  state = [jax.tree.map(lambda x: x.copy(), placed.state)]
  places = jax.tree.map(lambda x: x.sharding, placed.state)
  run_program = blueprint.jit_round(placed.mesh, round_fn, places)

  def make(index: int) -> types.Cohort:
    rounds = range(index * each, index * each + each)
    packed = [placed.pack(round_index, source) for round_index in rounds]
    if each == 1:
      return clients.put(packed[0], placed.mesh)
    return clients.put_rounds(packed, placed.mesh)

  def run(programs: int) -> None:
    with jax.set_mesh(placed.mesh):
      for _, cohort in prefetch.prefetch(make, 0, programs):
        state[0], metrics = run_program(state[0], base, cohort)
        jax.device_get(metrics)  # Also waits: one program at a time.

  return _Case(each, run, trees.num_bytes(make(0)) / each)
