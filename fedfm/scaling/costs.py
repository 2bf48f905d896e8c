"""What an optimized module costs a device: FLOPs, memory traffic, messages.

XLA's own cost analysis counts a loop's body once; here every instruction is
counted as often as it runs.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re

from fedfm.scaling import hlo, products

# They move nothing: views, bookkeeping, and what is counted elsewhere.
_FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "after-all",
  "add-dependency",
  "partition-id",
  "replica-id",
  "iota",
  "opt-barrier",
  "send",
  "recv",
}
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """One collective of the program.

  Attributes:
    kind: Such as "all-gather".
    axes: Mesh axes that it joins.
    groups: Partition ids that are joined.
    num_bytes: Of its results on a device.
    times: How often it runs in a round, on average.
    shapes: Its results.
    op_name: Where in the traced program it comes from.
    overlaps: Whether it runs beside computation.
  """

  kind: str
  axes: tuple[str, ...]
  groups: list[list[int]]
  num_bytes: int
  times: float
  shapes: tuple[hlo.Shape, ...]
  op_name: str
  overlaps: bool

  @property
  def wire_bytes(self) -> float:
    """Bytes that a device sends each time, by the ring algorithm."""
    size = max(len(group) for group in self.groups)
    return wire_bytes(self.kind, self.num_bytes, size)


def wire_bytes(kind: str, num_bytes: float, size: int) -> float:
  """Bytes that a member of a collective sends, by the ring algorithm.

  Args:
    kind: Such as "all-gather".
    num_bytes: Of the result on a member.
    size: Members.

  Returns:
    Bytes.

  Examples:
    >>> wire_bytes("all-reduce", 100, 4), wire_bytes("reduce-scatter", 25, 4)
    (150.0, 75.0)
  """
  if kind in ("collective-permute", "collective-broadcast"):
    return float(num_bytes)
  if kind == "reduce-scatter":  # Its result is a part of what it reads.
    return float(num_bytes * (size - 1))
  once = num_bytes * (size - 1) / size
  return 2 * once if kind == "all-reduce" else once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """One instruction that takes time on a device's core.

  Attributes:
    instruction: It.
    flops: Of its matrix products, each time.
    padded_flops: The same with sides rounded up to the matrix unit's.
    num_bytes: Read and written in main memory, each time.
    cycles: What the compiler expects it to take; 0 where it does not say.
    times: How often it runs in a round.
  """

  instruction: hlo.Instruction
  flops: float
  padded_flops: float
  num_bytes: float
  cycles: int
  times: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
  """What a round costs one device.

  Attributes:
    blocks: A list of steps and one of collectives for every computation that
      runs, each with its own trip count in `times`.
    unknown: Custom calls, whose FLOPs the text does not say.
  """

  blocks: Sequence[tuple[Sequence[Step], Sequence[Collective]]]
  unknown: Sequence[str]

  @property
  def flops(self) -> float:
    return sum(s.flops * s.times for s in self.steps)

  @property
  def num_bytes(self) -> float:
    return sum(s.num_bytes * s.times for s in self.steps)

  @property
  def steps(self) -> list[Step]:
    return [s for steps, _ in self.blocks for s in steps]

  @property
  def collectives(self) -> list[Collective]:
    return [c for _, collectives in self.blocks for c in collectives]


def measure(
  module: hlo.Module,
  mesh_shape: Mapping[str, int],
  run_time_trips: Sequence[float] = (),
  matrix_unit: int = 1,
  slices: int = 1,
) -> Costs:
  """Counts what the module costs a device.

  Args:
    module: The module of one partition.
    mesh_shape: Size of each mesh axis, in order.
    run_time_trips: Trip counts of the loops whose bound only the run time
      knows, the outermost first (nested in one another); means, where they
      differ.
    matrix_unit: Side of the chip's matrix unit.
    slices: Slices that the first mesh axis is split over.

  Returns:
    The `Costs`. Of a conditional every branch is counted.

  Raises:
    ValueError: More nested run-time loops than `run_time_trips`.
  """
  blocks, unknown = [], []

  def visit(name: str, times: float, depth: int) -> None:
    where = module.computations[name]
    steps: list[Step] = []
    joined: dict[tuple[str, str, str], Collective] = {}
    for one in where.instructions.values():
      if one.opcode == "while":
        trips, deeper = hlo.trip_count(module, where, one), depth
        if trips is None:
          if depth >= len(run_time_trips):
            raise ValueError(
              f"the loop {one.name} ({one.op_name}) has a run-time bound, and "
              f"{len(run_time_trips)} are given"
            )
          trips, deeper = run_time_trips[depth], depth + 1
        visit(one.called("body")[0], times * trips, deeper)
        continue
      for branch in one.called(
        "branch_computations", "true_computation", "false_computation"
      ):
        visit(branch, times, depth)
      if one.opcode == "call":
        visit(one.called("to_apply")[0], times, depth)
      inside = _inside(module, one)
      for member in (one, *inside):
        found = _collective(member, mesh_shape, slices, times)
        if found is not None:
          channel = re.search(r"channel_id=(\d+)", member.attributes)
          overlaps = member is not one or member.opcode.endswith("-start")
          # A collective that is spread over several fusions is one; those of
          # a shard_map share a channel.
          key = channel[1] if channel else member.name
          joined.setdefault(
            (key, found.kind, str(found.groups)),
            dataclasses.replace(found, overlaps=overlaps),
          )
        if member.opcode == "custom-call" and _is_kernel(member):
          unknown.append(member.op_name or member.name)
      if not makes_buffer(one):
        continue
      estimate = re.search(r'"estimated_cycles":"(\d+)"', one.attributes)
      made = [
        products.flops_of(where, one, matrix_unit),
        *_products_inside(module, one, matrix_unit),
      ]
      steps.append(
        Step(
          instruction=one,
          flops=sum(p[0] for p in made),
          padded_flops=sum(p[1] for p in made),
          num_bytes=_traffic(module, where, one),
          cycles=int(estimate[1]) if estimate else 0,
          times=times,
        )
      )
    blocks.append((steps, list(joined.values())))

  visit(module.entry, 1, 0)
  return Costs(blocks=blocks, unknown=unknown)


def makes_buffer(one: hlo.Instruction) -> bool:
  """Whether an instruction writes an array, not names or awaits one."""
  return one.opcode not in _FREE and not one.opcode.endswith("-done")


def _nested(module: hlo.Module, one: hlo.Instruction) -> list[hlo.Computation]:
  """Computations fused into an instruction, or wrapped by an async start."""
  if one.opcode not in ("fusion", "async-start", "custom-call"):
    return []
  found = [module.computations[n] for n in one.called("calls")]
  for where in list(found):
    for member in where.instructions.values():
      found += _nested(module, member)
  return found


def _inside(module, one) -> list[hlo.Instruction]:
  return [
    member
    for where in _nested(module, one)
    for member in where.instructions.values()
  ]


def _products_inside(module, one, matrix_unit):
  return [
    products.flops_of(where, member, matrix_unit)
    for where in _nested(module, one)
    for member in where.instructions.values()
  ]


def _is_kernel(one: hlo.Instruction) -> bool:
  """Whether a custom call is a hand-written kernel, such as of Pallas."""
  target = re.search(r'custom_call_target="([^"]*)"', one.attributes)
  return bool(
    target
    and re.search(r"tpu_custom_call|mosaic|triton|cudnn", target[1].lower())
  )


def _traffic(module: hlo.Module, where: hlo.Computation, one) -> float:
  """Bytes that an instruction reads and writes in main memory."""

  def in_memory(shapes):
    return sum(s.num_bytes for s in shapes if s.space == 0)

  fused = _nested(module, one)[:1] if one.opcode == "fusion" else []
  if one.opcode in _SLICES:
    return 2.0 * in_memory(one.shapes)
  if one.opcode in ("copy-start", "slice-start"):
    # (destination, source, context): each is moved once.
    size = one.shapes[0].num_bytes
    return float(size * sum(s.space == 0 for s in one.shapes[:2]))
  if one.opcode == "dynamic-update-slice":
    return 2.0 * in_memory(where.instructions[one.operands[1]].shapes)
  # What a fusion only hands on, such as the buffers of a collective that runs
  # beside it, is the same memory before and after.
  in_place = dict(
    (int(out or 0), int(operand))
    for out, operand in re.findall(
      r"\{(\d*)\}: \((\d+), \{\}(?:, [\w-]+)?\)",
      _braces(one.attributes, "output_to_operand_aliasing="),
    )
  )
  handed_on = set(in_place.values()) if _has_collective(fused) else set()
  written = in_memory(
    s for i, s in enumerate(one.shapes) if i not in in_place or not handed_on
  )
  read = 0.0
  for position, name in enumerate(one.operands):
    value = where.instructions.get(name)
    if value is None or position in handed_on:
      continue
    size = in_memory(value.shapes)
    if size and fused:
      part, updated = _part_read(fused[0], position)
      size = min(size, part)
      written -= updated if updated < written else 0
    read += size
  return written + read


def _braces(text: str, begin: str) -> str:
  """What stands in balanced braces after `begin`, or ""."""
  start = text.find(begin + "{")
  if start < 0:
    return ""
  depth = 0
  for i in range(start + len(begin), len(text)):
    depth += (text[i] == "{") - (text[i] == "}")
    if not depth:
      return text[start:i]
  return ""


def _has_collective(computations: Sequence[hlo.Computation]) -> bool:
  return any(
    i.opcode.removesuffix("-start") in hlo.COLLECTIVES
    for where in computations
    for i in where.instructions.values()
  )


def _part_read(fused: hlo.Computation, position: int) -> tuple[float, float]:
  """Bytes of a fusion's parameter that it reads; and what it leaves in place.

  A stacked operand is often read a slice at a time, or updated in place.
  """
  (parameter,) = (
    i
    for i in fused.instructions.values()
    if i.opcode == "parameter" and i.operands[0] == str(position)
  )
  users = [
    i
    for i in fused.instructions.values()
    if i.opcode != "parameter" and parameter.name in i.operands
  ]
  part = in_place = 0.0
  for user in users:
    if user.opcode in _SLICES and user.operands[0] == parameter.name:
      part += user.num_bytes
    elif (
      user.opcode == "dynamic-update-slice"
      and user.operands[0] == parameter.name
    ):
      update = fused.instructions[user.operands[1]].num_bytes
      part += update
      in_place += parameter.num_bytes - update
    else:
      return math.inf, 0.0
  return part, in_place


def _collective(
  one: hlo.Instruction, mesh_shape: Mapping[str, int], slices: int, times: float
) -> Collective | None:
  """The collective that an instruction is, if it is one."""
  num_devices = math.prod(mesh_shape.values())
  kind, shapes = one.opcode.removesuffix("-start"), one.shapes
  between = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
  if between and one.opcode == "recv":
    # Between slices, and the first of (result, context, token).
    kind = between[1].lower().replace("_", "-")
    kind = kind if kind in hlo.COLLECTIVES else "collective-permute"
    shapes = shapes[:1]
    groups = [list(range(0, num_devices, num_devices // slices))]
  elif kind in hlo.COLLECTIVES:
    groups = hlo.replica_groups(one.attributes, num_devices)
    if one.opcode.endswith("-start") and len(shapes) > 1:
      shapes = shapes[len(shapes) // 2 :]  # (operands, results).
  else:
    return None
  return Collective(
    kind=kind,
    axes=hlo.group_axes(groups, mesh_shape),
    groups=groups,
    num_bytes=sum(s.num_bytes for s in shapes),
    times=times,
    shapes=shapes,
    op_name=one.op_name,
    overlaps=False,
  )
