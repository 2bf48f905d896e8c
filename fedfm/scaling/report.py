"""Compiles a round for a topology; says what it takes and what bounds it."""

import collections
from collections.abc import Callable
import dataclasses
import math
import re
import time
from typing import Any

import jax

from fedfm import errors, goodput, trees
from fedfm.models import attention
from fedfm.scaling import costs as costs_lib
from fedfm.scaling import estimate as estimate_lib
from fedfm.scaling import hlo
from fedfm.scaling.costs import Costs
from fedfm.scaling.pod import PodRound
from fedfm.scaling.tables import gib

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "B": 1, "": 1}
_LARGEST = 6


def compile_round(
  pod: PodRound, keep_text: Callable[[str], Any] | None = None
) -> dict[str, Any]:
  """Compiles a round and reports on it.

  Args:
    pod: From `pod.build`.
    keep_text: Called with the text of the optimized HLO.

  Returns:
    A JSON object: "topology", "chips", "mesh", "layout", "parameters",
    "memory" and "collectives" (bytes, of one device), "flops" (of all
    devices), "seconds" (of a round), "bound", "utilization",
    "tokens_per_second" or "examples_per_second", and "compilation" (what it
    took here).

  Raises:
    ConfigError: The round does not fit in the chips' memory.
  """
  began, busy = time.perf_counter(), time.process_time()
  lowered = pod.lower()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    raise errors.ConfigError(too_large(str(e), pod)) from None
  took = time.perf_counter() - began, time.process_time() - busy
  text = compiled.as_text() or ""
  if keep_text is not None:
    keep_text(text)
  module = hlo.parse(text)
  layout, chip = pod.layout, pod.topology.chip
  tiles = attention.mean_tiles(layout.length)
  costs = costs_lib.measure(
    module,
    pod.mesh.shape,
    (layout.slots, layout.local_steps, *([tiles] if tiles else [])),
    chip.matrix_unit,
    pod.topology.slices,
  )
  times = estimate_lib.estimate(costs, pod.topology, pod.mesh.devices)
  in_program = costs.flops * pod.mesh.size

  def share(flops, seconds=times.total):
    return estimate_lib.utilization(flops, seconds, pod.topology)

  return {
    "topology": str(pod.topology),
    "chips": pod.mesh.size,
    "mesh": dict(pod.mesh.shape),
    "layout": layout._asdict() | {layout.unit: layout.units},
    "parameters": {
      "model": trees.num_elements(pod.model.shapes),
      "trainable": trees.num_elements(pod.arguments[0].trainable),
    },
    "memory": _memory(compiled.memory_analysis(), module, chip.hbm_bytes),
    "flops": {
      "program": in_program,
      "formula": pod.flops.run,
      "useful": pod.flops.useful,
      "kernels_not_counted": len(costs.unknown),
    },
    "collectives": _by_axis(costs, pod.mesh.size // pod.topology.slices),
    "seconds": {
      **dataclasses.asdict(times),
      "round": times.total,
      "round_by_compiler": times.compiler + times.exposed,
    },
    "bound": times.bound,
    "utilization": {
      "model": share(pod.flops.useful),
      "hardware": share(in_program),
      "model_by_compiler": share(
        pod.flops.useful, times.compiler + times.exposed
      ),
    },
    f"{layout.unit}_per_second": layout.units / times.total,
    "compilation": {
      "seconds": took[0],
      "processor_seconds": took[1],
      "peak_bytes": goodput.memory()["memory/host_peak_bytes"],
    },
  }


def _memory(analysis: Any, module: hlo.Module, limit: float) -> dict[str, Any]:
  sizes = {
    "arguments": analysis.argument_size_in_bytes,
    "outputs": analysis.output_size_in_bytes,
    "aliased": analysis.alias_size_in_bytes,
    "temporaries": analysis.temp_size_in_bytes,
    "code": analysis.generated_code_size_in_bytes,
  }
  # Of the worst moment; the sizes alone count reused memory twice.
  total = analysis.peak_memory_in_bytes + sizes["code"]
  return {
    **sizes,
    "total": total,
    "limit": limit,
    "largest": _largest_buffers(module),
  }


def _largest_buffers(module: hlo.Module) -> list[dict[str, Any]]:
  """The largest arrays in main memory: arguments, and results of operations."""
  fused = {
    name
    for where in module.computations.values()
    for one in where.instructions.values()
    if one.opcode == "fusion"
    for name in one.called("calls")
  }
  found: dict[tuple[str, str], int] = {}
  for where in module.computations.values():
    if where.name in fused:
      continue
    for one in where.instructions.values():
      is_argument = one.opcode == "parameter" and where.name == module.entry
      # A broadcast without a place in the program begins another's array.
      begins = one.name.startswith("broadcast") and not one.op_name
      if not is_argument and (begins or not costs_lib.makes_buffer(one)):
        continue
      for shape in one.shapes:
        if shape.space == 0:
          what = one.op_name or one.name
          what = f"argument {what}" if is_argument else what
          found[what, str(shape)] = shape.num_bytes
  largest = sorted(found.items(), key=lambda item: -item[1])[:_LARGEST]
  return [
    {"bytes": size, "shape": shape, "what": what}
    for (what, shape), size in largest
  ]


def _by_axis(costs: Costs, slice_size: int) -> list[dict[str, Any]]:
  """Bytes that a device sends in a round, by mesh axes and kind."""
  sums: dict[tuple[str, str], list[float]] = collections.defaultdict(
    lambda: [0.0, 0]
  )
  for one in costs.collectives:
    axes = "+".join(one.axes) or "none"
    if any(len({i // slice_size for i in group}) > 1 for group in one.groups):
      axes += " (between slices)"
    row = sums[axes, one.kind]
    row[0] += one.wire_bytes * one.times
    row[1] += one.times
  return [
    {"axes": axes, "kind": kind, "bytes": size, "times": times}
    for (axes, kind), (size, times) in sorted(sums.items())
  ]


def too_large(message: str, pod: PodRound) -> str:
  """Turns the compiler's out-of-memory error into what, by how much, and why.

  Args:
    message: The error's text.
    pod: What was compiled.

  Returns:
    One line.
  """
  used = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
  used = used or re.search(
    r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    message,
  )
  if not used:
    return f"memory: {pod.topology}: {' '.join(message.split())[:300]}"
  needs = float(used[1]) * _UNITS[used[2]]
  limit = float(used[3]) * _UNITS[used[4]]
  buffers = [
    f"{size} {shape} {'/'.join(name.split('/')[-2:]) or 'temporary'}"
    for size, name, shape in re.findall(
      r"\. Size: ([\d.]+[KMGT]?)\s+(?:Operator: op_name=\"([^\"]*)\".*\s+)?"
      r"Shape: (\w+\[[\d,]*\])",
      message,
    )[:3]
  ]
  arguments = _argument_bytes(pod)
  buffers += [f"{gib(v)} of {k}" for k, v in arguments.items() if v]
  base = arguments["base"] + arguments["state"]
  of_tokens = pod.layout.unit == "tokens"
  chunk = "a smaller model.loss_chunk, " if of_tokens else ""
  change = (
    "a larger mesh.fsdp or mesh.tensor (fewer mesh.clients)"
    if base > limit / 2
    else "fewer lanes, fewer rows or more client.accumulate, model.remat="
    f"'full', {chunk}or a larger mesh.fsdp"
  )
  return (
    f"memory: a chip of {pod.topology} needs {gib(needs)} of {gib(limit)}, "
    f"{gib(needs - limit)} too much (largest: {'; '.join(buffers)}); try "
    f"{change}"
  )


def _argument_bytes(pod: PodRound) -> dict[str, int]:
  """Bytes of each argument on a device."""

  def on_device(tree):
    return sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree)
    )

  return dict(zip(("state", "base", "cohort"), map(on_device, pod.arguments)))
