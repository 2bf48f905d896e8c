"""Reads the text of compiled programs."""

import re


def shapes_in(text):
  """All array shapes in a piece of HLO: [(3, 4), ...]."""
  found = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]*)\]", text)
  return [tuple(int(n) for n in dims.split(",") if n) for dims in found]


def dots(text):
  """Yields (operand shapes, whether it has batch dimensions) of every dot."""
  shapes = {}
  for name, value in re.findall(r"%([\w.-]+) = (\S+\[[\d,]*\])", text):
    shapes[name] = shapes_in(value)[0]
  for operands, rest in re.findall(r" dot\(([^)]*)\)(.*)", text):
    names = re.findall(r"%([\w.-]+)", operands)
    assert len(names) == 2, operands
    yield [shapes[n] for n in names], "batch_dims={" in rest
