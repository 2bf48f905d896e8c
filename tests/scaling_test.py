"""Rounds on topologies that are not here: formulas, times, errors, tables."""

import functools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import adapters, errors, models, sharding
from fedfm.scaling import (
  cohort_shapes,
  costs,
  estimate,
  formula,
  hlo,
  report,
  tables,
  topology,
)

CONFIG = models.DecoderConfig(
    vocab_size=64, width=32, num_layers=3, num_heads=2, head_dim=16,
    mlp_width=96, tie_embeddings=False, remat="full",
)  # fmt: skip
LAYOUT = cohort_shapes.Layout(6, 4, 2, 5, 2, 8)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_formula_by_hand(kind):
  model = models.decoder(CONFIG)
  if kind == "lora":
    adapter = adapters.lora(model, rank=4, targets=["q_proj"])
  else:
    adapter = adapters.full(model)
  got = formula.round_flops(model, adapter, LAYOUT, 8, chunk=4)
  layer = 4 * 32 * 32 + 3 * 32 * 96
  weights, factors = 3 * layer + 32 * 64, 3 * 2 * 32 * 4
  attention = 3 * 2 * 2 * 2 * 16 * 8 / 2  # Layers, FLOPs, products, heads ...
  useful = 4 * weights + 3 * attention
  useful += 6 * factors if kind == "lora" else 2 * weights
  again = 2 * 3 * (layer - 32 * 96) + attention + 2 * 32 * 64
  assert LAYOUT.units == 6 * 5 * 2 * 8
  assert got.useful == useful * LAYOUT.units
  assert got.run == (useful + again) * (4 * 2 * 5 * 2 * 8)


def chip_device(*coords, slice_index=None):
  return types.SimpleNamespace(coords=coords, slice_index=slice_index)


def one_collective(kind, num_bytes, group, overlaps=False):
  return costs.Collective(
    kind=kind,
    axes=("clients",),
    groups=[group],
    num_bytes=num_bytes,
    times=1,
    shapes=(),
    op_name="",
    overlaps=overlaps,
  )


def step(flops, num_bytes, cycles=0):
  instruction = hlo.Instruction("x", (), "fusion", (), "")
  return costs.Step(
    instruction=instruction,
    flops=flops,
    padded_flops=flops,
    num_bytes=num_bytes,
    cycles=cycles,
    times=1,
  )


def seconds(steps, collectives, machine, devices):
  blocks = [(steps, collectives)]
  return estimate.estimate(
    costs.Costs(blocks=blocks, unknown=[]), machine, np.array(devices)
  )


def test_time_of_instructions_is_the_longer_of_work_and_traffic():
  machine = topology.parse("v5e:4x4")
  got = seconds(
    [step(197e12, 0, cycles=int(3e9)), step(0, 819e9)], [], machine, []
  )
  assert (got.compute, got.memory, got.core) == (1, 1, 2)
  assert (got.exposed, got.total, got.compiler) == (0, 2, 3)


def test_time_of_messages_is_by_the_links_they_can_take():
  machine = topology.parse("v5e:16x16")
  row = [chip_device(0, i) for i in range(16)]
  got = seconds([], [one_collective("all-gather", 1.6e9, list(range(16)))],
                machine, row)  # fmt: skip
  assert math.isclose(got.links, 1.5e9 / (2 * 45e9))  # All of a ring.
  got = seconds([], [one_collective("all-gather", 1.6e9, list(range(8)))],
                machine, row)  # fmt: skip
  assert math.isclose(got.links, 1.4e9 / 45e9)  # A part of it is a line.
  square = [chip_device(i, j) for i in range(2) for j in range(2)]
  got = seconds([step(197e12, 0)],
                [one_collective("all-reduce", 45e9, [0, 1, 2, 3], True)],
                machine, square)  # fmt: skip
  # 1.5 times the bytes over two links take 0.75 s, beside a second of work.
  assert math.isclose(got.links, 0.75) and got.total == 1 and not got.exposed
  assert got.bound == "compute"


def test_time_between_slices_is_by_the_network():
  machine = topology.parse("2*v5e:2x2")
  devices = [
    chip_device(i, j, slice_index=s)
    for s in range(2)
    for i in range(2)
    for j in range(2)
  ]
  got = seconds([], [one_collective("all-reduce", 8e9, list(range(8)))],
                machine, devices)  # fmt: skip
  assert math.isclose(got.links, 2 * 0.75 * 8e9 / (2 * 45e9))
  assert math.isclose(got.network, 8e9 / 4 / 3.125e9)
  assert got.bound == "network"


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("v5e", ["'v5e'", "v5e:2x2 to v5e:16x16", "v5p:"]),
    ("v9:2x2", ["'v9:2x2'", "v6e:"]),
    ("v5e:2x2x2", ["2 sizes up to v5e:16x16"]),
    ("v5e:32x8", ["2 sizes up to v5e:16x16"]),
    ("v5p:16x16x32", ["3 sizes up to v5p:16x16x24"]),
    ("0*v5e:2x2", ["slices: got 0"]),
  ],
)
def test_bad_topologies_are_named(name, words):
  with pytest.raises(errors.ConfigError) as raised:
    topology.parse(name)
  for word in words:
    assert word in str(raised.value)


def test_slices_are_said_once():
  assert topology.parse("v5e:2x2", 2) == topology.parse("2*v5e:2x2")
  with pytest.raises(
    errors.ConfigError, match=r"slices: got 2, .*'4\*v5e:2x2'"
  ):
    topology.parse("4*v5e:2x2", 2)
  with pytest.raises(errors.ConfigError, match="slices: got 0"):
    topology.parse("v5e:2x2", 0)


# What libtpu prints, shortened.
TOO_LARGE = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.25G of 15.75G hbm. Exceeded hbm capacity by 4.50G.

Total hbm usage >= 20.50G:
    program          20.25G

  Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="jit(round)/while/body/local_step/dot_general" source_file="x"
     Shape: bf16[32,64,512,4096]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 8.00G
     Allocation type: HLO temp

  2. Size: 512.00M
     Shape: f32[64,512,4096]{2,1,0}
"""  # noqa: E501


def test_a_round_that_is_too_large_says_what_to_change():
  mesh = sharding.make_mesh({"clients": 4, "fsdp": 2})
  shape = functools.partial(
    jax.ShapeDtypeStruct,
    sharding=jax.NamedSharding(mesh, jax.P("fsdp")),
  )
  arguments = ({"w": shape((4 << 28,), jnp.float32)}, None, ())
  one = types.SimpleNamespace(
    topology=topology.parse("v5e:16x16"), arguments=arguments, layout=LAYOUT
  )
  line = report.too_large(TOO_LARGE, one)
  assert "\n" not in line
  for part in (
    "needs 20.25 GiB of 15.75 GiB, 4.50 GiB too much",
    "8.00G bf16[32,64,512,4096] local_step/dot_general",
    "512.00M f32[64,512,4096] temporary",
    "2.00 GiB of state",
    "try fewer lanes",
    "a smaller model.loss_chunk, or a larger mesh.fsdp",
  ):
    assert part in line
  one.layout = LAYOUT._replace(unit="examples")
  assert "loss_chunk" not in report.too_large(TOO_LARGE, one)
  other = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
    "for HLO temporaries (32.12G) exceeds available HBM (15.75G)."
  )
  arguments[0]["w"] = shape((20 << 28,), jnp.float32)
  line = report.too_large(other, one)
  assert "32.12 GiB of 15.75 GiB, 16.37 GiB too much" in line
  assert "try a larger mesh.fsdp" in line


def test_tables_show_the_report():
  one = {
    "topology": "v5e:2x2",
    "chips": 4,
    "mesh": {"clients": 2, "fsdp": 2, "tensor": 1},
    "layout": LAYOUT._asdict() | {"tokens": LAYOUT.units},
    "parameters": {"model": 2e9, "trainable": 3e6},
    "memory": {
      "arguments": 1 << 30, "temporaries": 2 << 30, "total": 3 << 30,
      "limit": 4 << 30,
      "largest": [{"bytes": 1 << 29, "shape": "f32[3]", "what": "a/b/c/d"}],
    },
    "flops": {
      "program": 3e15, "formula": 2e15, "useful": 1e15,
      "kernels_not_counted": 2,
    },
    "collectives": [
      {"axes": "fsdp", "kind": "all-gather", "bytes": 4e9, "times": 7}
    ],
    "seconds": {
      "compute": 1.0, "memory": 0.5, "links": 0.25, "network": 0.0,
      "exposed": 0.125, "round": 2.0, "round_by_compiler": 3.0,
    },
    "bound": "compute",
    "utilization": {
      "model": 0.5, "hardware": 0.75, "model_by_compiler": 0.375,
    },
    "tokens_per_second": 240.0,
    "compilation": {
      "seconds": 90.0, "processor_seconds": 60.4, "peak_bytes": 5 << 28,
    },
  }  # fmt: skip
  text = tables.markdown(json.loads(json.dumps(one)))
  for part in (
    "v5e:2x2, 4 chips", "clients 2 x fsdp 2 x tensor 1", "2.00 B",
    "6 on 4 lanes, 5 steps of 2 x 8 tokens", "3.00 GiB of 4.00 GiB",
    "1.50 of the formula's; useful 1e+15; 2 kernels are not counted",
    "2 s, 0.12 s of it waits", "50% of peak", "b/c/d",
    "90 s here, 60 s of processors; the process's peak 1.25 GiB",
    "| fsdp | all-gather |     7 |",
  ):  # fmt: skip
    assert part in text, part
  small = one | {"parameters": {"model": 9.9e7, "trainable": 3e6}}
  assert "99.00 M; trained 3.0 M" in tables.markdown(small)
  twice = one | {"topology": "v5e:2x4", "chips": 8, "tokens_per_second": 400.0}
  assert "83%" in tables.scaling_table([one, twice])
