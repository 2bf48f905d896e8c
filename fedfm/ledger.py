"""The ledger of a run: bytes, floating-point operations, simulated time."""

import dataclasses
from typing import Any

from fedfm import model_flops, models, trees
from fedfm.clients.transforms import MessageTransform
from fedfm.data.realism import Costs, Realism
from fedfm.planning import Work
from fedfm.settings import Settings
from fedfm.types import Passes

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Ledger:
  """Says what rounds cost.

  Attributes:
    flops_per_step: Of a full local step of one client.
    realism: The devices, and how long a round waits.
    flops_at_start: Of what a client does before its first step.
  """

  flops_per_step: float
  realism: Realism
  flops_at_start: float = 0.0

  def line(self, work: Work, up: int, down: int) -> dict[str, float]:
    """Returns the metrics of one round.

    Args:
      work: Who worked, and how much.
      up: Bytes that a client sends, after compression.
      down: Bytes that it receives.

    Returns:
      `comm/bytes_up` of those that reported, `comm/bytes_down` of those that
      were given work, `compute/flops` of those that reported,
      `clients/contacted`, and `simulated/seconds`, how long the server waited.
    """
    costs = Costs(self.flops_per_step, up, down, self.flops_at_start)
    steps = float(sum(work.local_steps))
    of_starts = len(work.ids) * self.flops_at_start
    return {
      "comm/bytes_up": len(work.ids) * up,
      "comm/bytes_down": work.contacted * down,
      "compute/flops": steps * self.flops_per_step + of_starts,
      "clients/contacted": work.contacted,
      "simulated/seconds": self._seconds(work, costs),
    }

  def _seconds(self, work: Work, costs: Costs) -> float:
    realism = self.realism
    if realism.deadline and len(work.ids) < work.contacted:
      return realism.deadline
    if not work.ids:
      return 0.0
    beside, a_step = realism.devices.seconds(realism.seed, work.ids, costs)
    return float((beside + a_step * work.local_steps).max())

  def planned_costs(
    self,
    trainable: PyTree,
    up: MessageTransform | None,
    down: MessageTransform | None,
  ) -> Costs:
    """What a client's round costs as far as it is known before the run.

    Deadlines are drawn before a round, on the host, when an algorithm's
    messages may still depend on rounds that run: they count the trainable,
    compressed where messages are, in both directions.

    Args:
      trainable: Arrays or shapes.
      up: Compressor of the way up, or None.
      down: Likewise down.

    Returns:
      The `Costs`.
    """
    bytes_up, bytes_down = (
      way.num_bytes(trainable)
      if way is not None and way.num_bytes is not None
      else trees.num_bytes(trainable)
      for way in (up, down)
    )
    return Costs(self.flops_per_step, bytes_up, bytes_down, self.flops_at_start)


def make_ledger(
  settings: Settings,
  model: models.Model,
  kind: str,
  trainable: PyTree,
  passes: Passes,
  realism: Realism,
) -> Ledger:
  """Builds the ledger of a run.

  Args:
    settings: Sizes of rows and batches.
    model: The model.
    kind: Of the adapter.
    trainable: What clients train, arrays or shapes.
    passes: Of the algorithm.
    realism: How clients behave.

  Returns:
    The `Ledger`.
  """
  at_start = Passes(forwards=passes.first_forwards, backwards=0)
  per_step, first = (
    settings.client.batch_size
    * model_flops.flops_per_row(
      model, kind, trainable, settings.data.sequence_length, some
    ).total
    for some in (passes, at_start)
  )
  return Ledger(per_step, realism, first)
