"""FLOPs of one matrix product or convolution of HLO.

The TPU compiler writes products as convolutions, with batch dimensions as
spatial ones: counted as XLA counts them, by the positions that meet the input.
"""

from collections.abc import Mapping
import itertools
import math
import re

from fedfm.scaling import hlo


def flops_of(
  where: hlo.Computation, one: hlo.Instruction, matrix_unit: int = 1
) -> tuple[float, float]:
  """FLOPs of a dot or a convolution, two a multiply-add.

  Args:
    where: The computation that holds it.
    one: Any instruction; one that is no product has 0.
    matrix_unit: Side that the contracted and the output features are rounded
      up to, for the second figure.

  Returns:
    (FLOPs, FLOPs that the matrix unit spends).
  """
  if one.opcode == "dot":
    left = where.instructions[one.operands[0]].shapes[0].dims
    right = where.instructions[one.operands[1]].shapes[0].dims
    contract = _dims(one.attributes, "rhs_contracting_dims")
    batch = _dims(one.attributes, "rhs_batch_dims")
    inner = math.prod(right[d] for d in contract)
    columns = math.prod(
      n for d, n in enumerate(right) if d not in (*contract, *batch)
    )
    rows = math.prod(left) // inner
    return (
      2.0 * rows * inner * columns,
      2.0 * rows * _up(inner, matrix_unit) * _up(columns, matrix_unit),
    )
  if one.opcode != "convolution":
    return 0.0, 0.0
  left = where.instructions[one.operands[0]].shapes[0].dims
  kernel = where.instructions[one.operands[1]].shapes[0].dims
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
  assert labels is not None, one
  lhs, rhs, out = labels.groups()
  groups = _number(one.attributes, "batch_group_count")
  # The kernel's input features are those of one feature group already.
  inner = kernel[rhs.index("i")]
  columns = kernel[rhs.index("o")]
  rows = left[lhs.index("b")] // groups
  for spatial in (c for c in rhs if c.isdigit()):
    rows *= _valid_positions(
      _window(one.attributes),
      int(spatial),
      left[lhs.index(spatial)],
      one.shapes[0].dims[out.index(spatial)],
    )
  return (
    2.0 * rows * inner * columns,
    2.0 * rows * _up(inner, matrix_unit) * _up(columns, matrix_unit),
  )


def _up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def _dims(attributes: str, name: str) -> list[int]:
  found = re.search(rf"{name}=\{{([\d,]*)\}}", attributes)
  return [int(n) for n in found[1].split(",") if n] if found else []


def _number(attributes: str, name: str) -> int:
  found = re.search(rf"{name}=(\d+)", attributes)
  return int(found[1]) if found else 1


def _window(attributes: str) -> dict[str, list[str]]:
  """`window={size=3x3 pad=0_1x0_1}` as {"size": ["3", "3"], ...}."""
  found = re.search(r"window=\{([^}]*)\}", attributes)
  fields = found[1].split() if found else []
  return {
    name: value.split("x")
    for name, value in (field.split("=") for field in fields)
  }


def _valid_positions(
  window: Mapping[str, list[str]], dim: int, size: int, out: int
) -> int:
  """Pairs of output and kernel positions that meet the input, along one dim."""

  def field(name: str, default: int) -> int:
    return int(window[name][dim]) if name in window else default

  kernel, stride = field("size", 1), field("stride", 1)
  base, dilation = field("lhs_dilate", 1), field("rhs_dilate", 1)
  low = int(window["pad"][dim].split("_")[0]) if "pad" in window else 0
  last = (size - 1) * base
  count = 0
  for position, tap in itertools.product(range(out), range(kernel)):
    at = position * stride + tap * dilation - low
    count += 0 <= at <= last and at % base == 0
  return count
