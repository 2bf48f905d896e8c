"""Reads the text of an optimized HLO module: what runs, how often, on what.

Only what a cost report needs: instructions with shapes, who calls whom, the
trip counts of loops, and which devices a collective joins.
"""

from collections.abc import Iterator, Mapping
import math
import re
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
# One array type, such as bf16[8,512]{1,0:T(8,128)(2,1)S(1)}.
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_PASS_THROUGH = ("copy", "bitcast", "convert", "copy-start", "copy-done")


class Shape(NamedTuple):
  """One array: dtype, dimensions, and the memory that it lives in.

  Attributes:
    dtype: HLO's name, such as "bf16".
    dims: The dimensions.
    space: Memory space; 0 is the device's main memory (HBM).
  """

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def num_bytes(self) -> int:
    """Bytes without the padding of tiles."""
    bits = re.search(r"\d+", self.dtype)
    if self.dtype == "pred":
      return self.size
    return -(-self.size * int(bits[0]) // 8) if bits else 0

  def __str__(self) -> str:
    return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
  """One instruction.

  Attributes:
    name: Its name, without "%".
    shapes: Its results; several for a tuple.
    opcode: Such as "fusion" or "all-gather-start".
    operands: Names of its operands; the text of a constant.
    attributes: The rest of the line.
  """

  name: str
  shapes: tuple[Shape, ...]
  opcode: str
  operands: tuple[str, ...]
  attributes: str

  @property
  def op_name(self) -> str:
    """Where in the traced program it comes from, or ""."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""

  @property
  def num_bytes(self) -> int:
    return sum(s.num_bytes for s in self.shapes)

  def called(self, *roles: str) -> list[str]:
    """Names of the computations that it calls in these roles."""
    names = []
    for role in roles:
      for group in re.findall(
        rf"\b{role}=(\{{[^}}]*\}}|%[\w.-]+)", self.attributes
      ):
        names += re.findall(r"%([\w.-]+)", group)
    return names


class Computation(NamedTuple):
  """Instructions in the order that they are printed (a schedule, on TPU)."""

  name: str
  instructions: dict[str, Instruction]
  root: str


class Module(NamedTuple):
  """A module: computations by name, and the one that runs first."""

  computations: dict[str, Computation]
  entry: str


def shapes_in(text: str) -> tuple[Shape, ...]:
  """Every array type in a piece of HLO, in order.

  Examples:
    >>> [str(s) for s in shapes_in("(f32[2,3]{1,0}, s32[]{:S(1)})")]
    ['f32[2,3]', 's32[]']
  """
  shapes = []
  for dtype, dims, layout in _ARRAY.findall(text):
    space = re.search(r"S\((\d+)\)", layout)
    sizes = [int(n) for n in dims.replace("<=", "").split(",") if n]
    shapes.append(Shape(dtype, tuple(sizes), int(space[1]) if space else 0))
  return tuple(shapes)


def _matching(text: str, begin: int) -> int:
  """Index after the parenthesis that closes the one at `begin`."""
  depth = 0
  for i in range(begin, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if not depth:
      return i + 1
  raise ValueError(f"unbalanced parentheses in {text[:200]!r}")


def parse(text: str) -> Module:
  """Parses the text of `jax.stages.Compiled.as_text()`.

  Args:
    text: An HLO module.

  Returns:
    The `Module`.

  Raises:
    ValueError: No entry computation, or a malformed line.
  """
  computations: dict[str, Computation] = {}
  entry, name, instructions, root = "", "", {}, ""
  for line in _logical_lines(text):
    header = _COMPUTATION.match(line)
    if header:
      name, instructions, root = header[2], {}, ""
      entry = name if header[1] else entry
    elif name and _END.match(line):
      computations[name] = Computation(name, instructions, root)
      name = ""
    elif name:
      found = _INSTRUCTION.match(line)
      if found:
        one = _instruction(found[2], line[found.end() :])
        instructions[one.name] = one
        root = one.name if found[1] else root
  if not entry:
    raise ValueError("no ENTRY computation: not the text of an HLO module")
  return Module(computations, entry)


def _logical_lines(text: str) -> Iterator[str]:
  """Lines, with those joined that an instruction's attributes go over."""
  kept = ""
  for line in text.splitlines():
    continues = kept and not (_INSTRUCTION.match(line) or _END.match(line))
    if kept and not continues:
      yield kept
      kept = ""
    if continues or _INSTRUCTION.match(line):
      kept += line
    else:
      yield line
  if kept:
    yield kept


def _instruction(name: str, rest: str) -> Instruction:
  """Parses `TYPE opcode(operands), attributes`."""
  end = _matching(rest, 0) if rest.startswith("(") else rest.index(" ")
  shapes = shapes_in(rest[:end])
  rest = rest[end:].lstrip()
  begin = rest.index("(")
  end = _matching(rest, begin)
  opcode, inside = rest[:begin], rest[begin + 1 : end - 1]
  operands = tuple(re.findall(r"%([\w.-]+)", inside))
  if opcode in ("constant", "parameter"):
    operands = (inside,)
  return Instruction(name, shapes, opcode, operands, rest[end:])


def trip_count(
  module: Module, where: Computation, loop: Instruction
) -> int | None:
  """How often the body of a `while` runs, counting up by one as jax's do.

  Args:
    module: The module.
    where: The computation that holds the loop.
    loop: The `while`.

  Returns:
    The number, or None where only the run time knows it.
  """
  known = re.search(r'known_trip_count[^}]*?"n":\s*"(\d+)"', loop.attributes)
  if known:
    return int(known[1])
  (condition,), (body,) = loop.called("condition"), loop.called("body")
  test = module.computations[condition]
  compare = test.instructions[test.root]
  if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
    return None
  counter, bound = (
    _source(test, test.instructions[n]) for n in compare.operands
  )
  begin = _before(where, loop, counter)
  if bound.opcode == "constant":
    stop = _integer(bound)
  elif _is_carried(module.computations[body], bound):
    stop = _before(where, loop, bound)
  else:
    stop = None
  return None if begin is None or stop is None else max(0, stop - begin)


def _before(
  where: Computation, loop: Instruction, element: Instruction
) -> int | None:
  """The constant that a loop starts with in an element of its tuple."""
  start = where.instructions.get(loop.operands[0])
  if element.opcode != "get-tuple-element" or start is None:
    return None
  if start.opcode != "tuple":
    return None
  value = where.instructions[start.operands[_index(element)]]
  value = _source(where, value)
  return _integer(value) if value.opcode == "constant" else None


def _is_carried(body: Computation, element: Instruction) -> bool:
  """Whether a loop's body hands an element of its tuple on as it was."""
  root = body.instructions[body.root]
  if element.opcode != "get-tuple-element" or root.opcode != "tuple":
    return False
  index = _index(element)
  value = _source(body, body.instructions[root.operands[index]])
  return value.opcode == "get-tuple-element" and _index(value) == index


def _source(where: Computation, value: Instruction) -> Instruction:
  """Follows copies back to where a value comes from."""
  while value.opcode in _PASS_THROUGH and value.operands:
    before = where.instructions.get(value.operands[0])
    if before is None:
      break
    value = before
  return value


def _integer(constant: Instruction) -> int | None:
  text = constant.operands[0]
  return int(text) if re.fullmatch(r"-?\d+", text) else None


def _index(element: Instruction) -> int:
  found = re.search(r"\bindex=(\d+)", element.attributes)
  assert found is not None, element
  return int(found[1])


def _integers(text: str) -> list[int]:
  return [int(n) for n in text.split(",")]


def _device_order(dims: str, permutation: str, num_devices: int) -> np.ndarray:
  """Partition ids counted in another order, as HLO's `[4,2]T(1,0)` says it."""
  ids = np.arange(num_devices)
  if dims:
    ids = ids.reshape(_integers(dims))
  if permutation:
    ids = ids.transpose(_integers(permutation))
  return ids.reshape(-1)


def replica_groups(attributes: str, num_devices: int) -> list[list[int]]:
  """Groups of partition ids of a collective, in any of HLO's forms.

  Args:
    attributes: Of the instruction.
    num_devices: Partitions of the module.

  Returns:
    The groups.

  Raises:
    ValueError: No groups in `attributes`.

  Examples:
    >>> replica_groups("replica_groups=[2,2]<=[4], dimensions={0}", 4)
    [[0, 1], [2, 3]]
  """
  listed = re.search(
    r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", attributes
  )
  if listed:
    return [_integers(g) for g in re.findall(r"\{([\d,]+)\}", listed[1])]
  iota = re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
  )
  if iota:
    ids = _device_order(iota[2], iota[3], num_devices)
    return ids.reshape(_integers(iota[1])).tolist()
  mesh = re.search(
    r"replica_groups=mesh\[((?:'\w+'=\d+,?)+)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    r" \{((?:'\w+',?)*)\}",
    attributes,
  )
  if mesh:
    axes = re.findall(r"'(\w+)'=(\d+)", mesh[1])
    over = re.findall(r"'(\w+)'", mesh[4])
    names = [name for name, _ in axes]
    ids = _device_order(mesh[2], mesh[3], num_devices)
    ids = ids.reshape([int(size) for _, size in axes])
    rest = [i for i, name in enumerate(names) if name not in over]
    inside = [names.index(name) for name in over]
    size = math.prod(ids.shape[i] for i in inside)
    return ids.transpose(rest + inside).reshape(-1, size).tolist()
  if "replica_groups={}" in attributes:
    return [list(range(num_devices))]
  raise ValueError(f"no replica groups in {attributes[:200]!r}")


def group_axes(
  groups: list[list[int]], mesh_shape: Mapping[str, int]
) -> tuple[str, ...]:
  """The mesh axes along which the members of a group differ.

  Args:
    groups: Partition ids, counted along the mesh's axes, the last fastest.
    mesh_shape: Size of each axis, in order.

  Returns:
    Names, in the mesh's order; empty where every group is one device.

  Examples:
    >>> group_axes([[0, 2], [1, 3]], {"clients": 2, "fsdp": 2, "tensor": 1})
    ('clients',)
  """
  differ = set()
  for group in groups:
    coordinates = np.unravel_index(group, tuple(mesh_shape.values()))
    for name, along in zip(mesh_shape, coordinates):
      if len(set(along.tolist())) > 1:
        differ.add(name)
  return tuple(name for name in mesh_shape if name in differ)
