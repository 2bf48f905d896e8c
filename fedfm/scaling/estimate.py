"""How long a round takes on a chip, by its published peaks, and what bounds it.

An instruction takes the longer of its matrix products at peak and its traffic
to main memory at peak. A collective takes its bytes over the links that its
groups span. Collectives that the schedule runs beside computation hide behind
it, within one pass of one loop; the others wait. No chip is faster; what the
compiler itself expects of its schedule is given beside it.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from fedfm.scaling import costs as costs_lib
from fedfm.scaling.costs import Collective, Costs, Step
from fedfm.scaling.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """Seconds of a round.

  Attributes:
    compute: Matrix products at the chip's peak.
    memory: Traffic to main memory at its peak.
    links: Collectives within a slice.
    network: Collectives between slices.
    core: All instructions one after the other, collectives left out.
    exposed: What collectives add to that.
    compiler: `core` by the compiler's own estimates, where it gives them and
      they are longer.
    bound: What takes longest: "compute", "memory", "links" or "network".
  """

  compute: float
  memory: float
  links: float
  network: float
  core: float
  exposed: float
  compiler: float
  bound: str

  @property
  def total(self) -> float:
    """The predicted time of a round."""
    return self.core + self.exposed


def estimate(costs: Costs, topology: Topology, devices: np.ndarray) -> Estimate:
  """Predicts the time of a round.

  Args:
    costs: Of one device.
    topology: The machine.
    devices: The mesh's, in the mesh's order.

  Returns:
    The `Estimate`.
  """
  chip = topology.chip
  flat = list(devices.flat)
  core = exposed = compiler = links = network = 0.0
  speeds: dict[tuple[int, ...], tuple[int, int]] = {}
  for steps, collectives in costs.blocks:
    seconds = [_step_seconds(s, topology) for s in steps]
    busy = sum(t * s.times for t, s in zip(seconds, steps))
    compiler += sum(
      max(t, s.cycles / chip.clock) * s.times for t, s in zip(seconds, steps)
    )
    beside = 0.0
    waits = 0.0
    for one in collectives:
      on_links, on_network = _seconds(one, topology, flat, speeds)
      links += on_links * one.times
      network += on_network * one.times
      if one.overlaps:
        beside += (on_links + on_network) * one.times
      else:
        waits += (on_links + on_network) * one.times
    core += busy
    exposed += max(0.0, beside - busy) + waits
  alone = {
    "compute": costs.flops / chip.flops,
    "memory": costs.num_bytes / chip.hbm_bandwidth,
    "links": links,
    "network": network,
  }
  return Estimate(
    **alone,
    core=core,
    exposed=exposed,
    compiler=compiler,
    bound=max(alone, key=lambda name: alone[name]),
  )


def _step_seconds(step: Step, topology: Topology) -> float:
  chip = topology.chip
  return max(
    step.padded_flops / chip.flops, step.num_bytes / chip.hbm_bandwidth
  )


def _seconds(
  one: Collective,
  topology: Topology,
  devices: Sequence[Any],
  speeds: dict[tuple[int, ...], tuple[int, int]],
) -> tuple[float, float]:
  """Seconds of a collective on a slice's links and on the network between."""
  group = tuple(max(one.groups, key=len))
  if group not in speeds:
    speeds[group] = (
      _links([devices[i] for i in group], topology),
      len({getattr(devices[i], "slice_index", None) for i in group}),
    )
  links, slices = speeds[group]
  inside = len(group) // slices
  chip = topology.chip
  on_links = on_network = 0.0
  if inside > 1:
    sent = costs_lib.wire_bytes(one.kind, one.num_bytes, inside)
    on_links = sent / (links * chip.link_bandwidth)
  if slices > 1:
    # Each chip of a slice carries its share over the network.
    sent = costs_lib.wire_bytes(one.kind, one.num_bytes, slices) / inside
    on_network = sent / chip.network_bandwidth
  return on_links, on_network


def _links(devices: Sequence[Any], topology: Topology) -> int:
  """Links of the worst placed member that lead to other members.

  All that a member receives comes over these: one for each dimension that the
  group spans, two where it closes the ring.
  """
  count = 0
  for dim, size in enumerate(topology.sizes):
    spanned = len({d.coords[dim] for d in devices})
    if spanned > 1:
      whole = spanned == size and topology.chip.is_ring(dim, topology.sizes)
      count += 2 if whole else 1
  return max(count, 1)


def utilization(flops: float, seconds: float, topology: Topology) -> float:
  """The share of the machine's peak that FLOPs in a time come to.

  Args:
    flops: Over all devices.
    seconds: The time.
    topology: The machine.

  Returns:
    A share of 1.
  """
  return flops / (seconds * topology.chips * topology.chip.flops)
