"""HLO read from hand-made pieces and from XLA, and what it costs."""

import jax
import jax.numpy as jnp
import pytest

from fedfm import sharding
from fedfm.models import attention
from fedfm.scaling import costs, hlo, products

# Of LLVM, which comes after HLO.
FAST_COMPILE = {"xla_backend_optimization_level": "0"}

MESH = {"clients": 2, "fsdp": 2, "tensor": 1}
# As the TPU compiler prints it, shortened: a loop of 7, its bound carried in
# the tuple, in a loop whose bound is not known; an all-gather that is spread
# over two fusions; what lives in vector memory, S(1), and what does not.
TPU_TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=4

%fused_start (param_0: bf16[8,16]) -> bf16[16,16] {
  %param_0 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[16,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_0), channel_id=3, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={0}
}

%fused_product (param_0.1: bf16[8,16], param_1.1: bf16[4,16,16], param_2.1: s32[]) -> bf16[8,16] {
  %param_0.1 = bf16[8,16]{1,0} parameter(0)
  %param_1.1 = bf16[4,16,16]{2,1,0} parameter(1)
  %param_2.1 = s32[]{:S(6)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %dynamic-slice.1 = bf16[1,16,16]{2,1,0} dynamic-slice(%param_1.1, %param_2.1, %zero, %zero), dynamic_slice_sizes={1,16,16}
  %bitcast.1 = bf16[16,16]{1,0} bitcast(%dynamic-slice.1)
  %all-gather.2 = bf16[16,16]{1,0} all-gather(%param_0.1), channel_id=3, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={0}
  ROOT %convolution.1 = bf16[8,16]{1,0} convolution(%param_0.1, %bitcast.1), dim_labels=bf_io->bf, metadata={op_name="jit(f)/while/body/dot_general"}
}

%inner_body (p: (s32[], bf16[8,16], bf16[4,16,16], s32[])) -> (s32[], bf16[8,16], bf16[4,16,16], s32[]) {
  %p = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,16,16]{2,1,0}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%p), index=1
  %w = bf16[4,16,16]{2,1,0} get-tuple-element(%p), index=2
  %n = s32[]{:T(128)} get-tuple-element(%p), index=3
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %start.1 = bf16[16,16]{1,0:S(1)} fusion(%x), kind=kCustom, calls=%fused_start
  %fusion.1 = bf16[8,16]{1,0} fusion(%x, %w, %i), kind=kOutput, calls=%fused_product, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %out = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,16,16]{2,1,0}, s32[]{:T(128)}) tuple(%next, %fusion.1, %w, %n)
}

%inner_cond (p.1: (s32[], bf16[8,16], bf16[4,16,16], s32[])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,16,16]{2,1,0}, /*index=3*/s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %n.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=3
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.1, %n.1), direction=LT
}

%outer_body (q: (s32[], bf16[8,16], bf16[4,16,16], s32[])) -> (s32[], bf16[8,16], bf16[4,16,16], s32[]) {
  %q = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,16,16]{2,1,0}, s32[]{:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %y = bf16[8,16]{1,0} get-tuple-element(%q), index=1
  %v = bf16[4,16,16]{2,1,0} get-tuple-element(%q), index=2
  %m = s32[]{:T(128)} get-tuple-element(%q), index=3
  %zero.1 = s32[]{:T(128)} constant(0)
  %seven = s32[]{:T(128)} constant(7)
  %copy.1 = s32[]{:T(128)} copy(%seven)
  %begin = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,16,16]{2,1,0}, s32[]{:T(128)}) tuple(%zero.1, %y, %v, %copy.1)
  %while.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,16,16]{2,1,0}, s32[]{:T(128)}) while(%begin), condition=%inner_cond, body=%inner_body
  %z = bf16[8,16]{1,0} get-tuple-element(%while.1), index=1
  %one.1 = s32[]{:T(128)} constant(1)
  %next.1 = s32[]{:T(128)} add(%j, %one.1)
  ROOT %out.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,16,16]{2,1,0}, s32[]{:T(128)}) tuple(%next.1, %z, %v, %m)
}

%outer_cond (q.1: (s32[], bf16[8,16], bf16[4,16,16], s32[])) -> pred[] {
  %q.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,16,16]{2,1,0}, s32[]{:T(128)}) parameter(0)
  %j.1 = s32[]{:T(128)} get-tuple-element(%q.1), index=0
  %m.1 = s32[]{:T(128)} get-tuple-element(%q.1), index=3
  ROOT %lt.2 = pred[]{:T(512)} compare(%j.1, %m.1), direction=LT
}

%sum (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %add.1 = bf16[] add(%a, %b)
}

ENTRY %main.1_spmd (param.1: bf16[8,16], param.2: bf16[4,16,16], param.3: s32[]) -> bf16[8,16] {
  %param.1 = bf16[8,16]{1,0} parameter(0), metadata={op_name="x"}
  %param.2 = bf16[4,16,16]{2,1,0} parameter(1), metadata={op_name="base['w']"}
  %param.3 = s32[]{:T(128)} parameter(2)
  %zero.2 = s32[]{:T(128)} constant(0)
  %begin.1 = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,16,16]{2,1,0}, s32[]{:T(128)}) tuple(%zero.2, %param.1, %param.2, %param.3)
  %while.2 = (s32[]{:T(128)}, bf16[8,16]{1,0}, bf16[4,16,16]{2,1,0}, s32[]{:T(128)}) while(%begin.1), condition=%outer_cond, body=%outer_body
  %r = bf16[8,16]{1,0} get-tuple-element(%while.2), index=1
  ROOT %all-reduce.1 = bf16[8,16]{1,0} all-reduce(%r), channel_id=4, replica_groups={{0,2},{1,3}}, to_apply=%sum
}
"""  # noqa: E501


def test_a_module_is_read():
  module = hlo.parse(TPU_TEXT)
  assert module.entry == "main.1_spmd"
  assert len(module.computations) == 8
  fusion = module.computations["inner_body"].instructions["fusion.1"]
  assert fusion.operands == ("x", "w", "i")
  assert fusion.called("calls") == ["fused_product"]
  gather = module.computations["fused_start"].instructions["all-gather.1"]
  assert gather.shapes == (hlo.Shape("bf16", (16, 16), 1),)
  assert gather.num_bytes == 512
  (carried,) = [
    i for i in module.computations["inner_cond"].instructions.values()
    if i.opcode == "parameter"
  ]  # fmt: skip
  assert [str(s) for s in carried.shapes] == [
    "s32[]", "bf16[8,16]", "bf16[4,16,16]", "s32[]",
  ]  # fmt: skip
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("HloModule nothing")


def test_attributes_may_go_over_several_lines():
  """As those of a kernel's metadata do, which are JSON."""
  module = hlo.parse(
    "ENTRY %main (x: f32[2]) -> f32[2] {\n"
    "  %x = f32[2] parameter(0)\n"
    "  %kernel = f32[2] custom-call(%x), frontend_attributes={metadata={\n"
    '"blocks": "{}"\n'
    '}}, metadata={op_name="attention"}\n'
    "  ROOT %y = f32[2] copy(%kernel)\n"
    '}, execution_thread="main"\n'
  )
  main = module.computations["main"]
  assert list(main.instructions) == ["x", "kernel", "y"] and main.root == "y"
  assert main.instructions["kernel"].op_name == "attention"


def test_trip_counts_are_found_or_said_to_be_unknown():
  module = hlo.parse(TPU_TEXT)
  outer, main = (module.computations[n] for n in ("outer_body", "main.1_spmd"))
  assert hlo.trip_count(module, outer, outer.instructions["while.1"]) == 7
  assert hlo.trip_count(module, main, main.instructions["while.2"]) is None
  # A loop that changes its own bound has none that is known.
  changed = hlo.parse(TPU_TEXT.replace("%w, %n)", "%w, %next)"))
  outer = changed.computations["outer_body"]
  assert hlo.trip_count(changed, outer, outer.instructions["while.1"]) is None


def test_costs_are_counted_as_often_as_they_run():
  got = costs.measure(hlo.parse(TPU_TEXT), MESH, (5,), matrix_unit=128)
  times = 5 * 7
  assert got.flops == times * 2 * 8 * 16 * 16
  (product,) = [s for s in got.steps if s.flops]
  assert product.padded_flops == 2 * 8 * 128 * 128
  assert product.cycles == 100
  # x is read, a slice of w, the counter, and the result is written.
  assert product.num_bytes == 8 * 16 * 2 + 16 * 16 * 2 + 4 + 8 * 16 * 2
  gather, reduce = sorted(got.collectives, key=lambda c: c.kind)
  assert (gather.kind, gather.axes, gather.times) == (
    "all-gather", ("fsdp",), times,
  )  # fmt: skip
  assert gather.overlaps and gather.wire_bytes == 16 * 16 * 2 / 2
  assert (reduce.kind, reduce.axes, reduce.times) == (
    "all-reduce", ("clients",), 1,
  )  # fmt: skip
  assert not reduce.overlaps and reduce.wire_bytes == 8 * 16 * 2
  with pytest.raises(ValueError, match="while.2 .* run-time bound"):
    costs.measure(hlo.parse(TPU_TEXT), MESH)


# A sum over devices 0, 2, 4, 6 of which each slice of four holds two: within a
# slice, between slices by the host, and within the slice again.
SLICES_TEXT = """
ENTRY %main (param: f32[64,256]) -> f32[64,256] {
  %param = f32[64,256]{1,0:T(8,128)} parameter(0)
  %after-all = token[] after-all()
  %reduce-scatter.1 = f32[32,256]{1,0:T(8,128)} reduce-scatter(%param), channel_id=1, replica_groups={{0,2},{1,3}}, dimensions={0}
  %send = (f32[32,256]{1,0:T(8,128)}, u32[], token[]) send(%reduce-scatter.1, %after-all), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[32,256]{1,0:T(8,128)}, u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=2
  %recv-done = (f32[32,256]{1,0:T(8,128)}, token[]) recv-done(%recv), channel_id=1
  %gte = f32[32,256]{1,0:T(8,128)} get-tuple-element(%recv-done), index=0
  ROOT %all-gather.6 = f32[64,256]{1,0:T(8,128)} all-gather(%gte), channel_id=1, replica_groups={{0,2},{1,3}}, dimensions={0}
}
"""  # noqa: E501


def test_a_sum_over_slices_goes_between_hosts():
  mesh = {"clients": 4, "fsdp": 2, "tensor": 1}
  found = costs.measure(hlo.parse(SLICES_TEXT), mesh, slices=2).collectives
  part = 32 * 256 * 4
  assert [(c.kind, c.axes, c.groups[0], c.wire_bytes) for c in found] == [
    ("reduce-scatter", ("clients",), [0, 2], part),
    ("all-reduce", ("clients",), [0, 4], part),
    ("all-gather", ("clients",), [0, 2], part),
  ]


@pytest.mark.parametrize(
  ("line", "shapes", "flops"),
  [
    # A batch of products as the TPU compiler writes it.
    (
      "bf16[8,512,16]{2,1,0} convolution(%a, %b), window={size=8 stride=7 "
      "lhs_dilate=8}, dim_labels=0bf_0io->0bf",
      ((8, 512, 64), (8, 64, 16)),
      2 * 8 * 512 * 64 * 16,
    ),
    # 3 x 3 kernels that meet the border; two groups of features.
    (
      "f32[5,6,6,8]{3,2,1,0} convolution(%a, %b), window={size=3x3 "
      "pad=1_1x1_1}, dim_labels=b01f_01io->b01f, feature_group_count=2",
      ((5, 6, 6, 4), (3, 3, 2, 8)),
      2 * 5 * 16 * 16 * 2 * 8,
    ),
    (
      "f32[3,4,6]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, "
      "lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}",
      ((3, 4, 5), (3, 5, 6)),
      2 * 3 * 4 * 5 * 6,
    ),
    ("f32[3,4]{1,0} add(%a, %b)", ((3, 4), (3, 4)), 0),
  ],
)
def test_flops_of_one_product(line, shapes, flops):
  text = "\n".join(
    [
      "ENTRY %main (a: f32[1], b: f32[1]) -> f32[1] {",
      *(
        f"  %{name} = f32[{','.join(map(str, dims))}] parameter({i})"
        for i, (name, dims) in enumerate(zip("ab", shapes))
      ),
      f"  ROOT %out = {line}",
      "}",
    ]
  )
  main = hlo.parse(text).computations["main"]
  got = products.flops_of(main, main.instructions["out"])
  assert got == (flops, flops)


def test_flops_of_a_compiled_loop_are_xlas_times_its_trips():
  def f(x, w, n):
    def inner(x, w):
      return jnp.tanh(x @ w), ()

    def outer(_, x):
      return jax.lax.scan(inner, x, w)[0]

    return jax.lax.fori_loop(0, n, outer, x)

  shapes = [
    jax.ShapeDtypeStruct(s, d)
    for s, d in [((8, 32), "float32"), ((6, 32, 32), "float32"), ((), "int32")]
  ]
  compiled = jax.jit(f).lower(*shapes).compile()
  got = costs.measure(
    hlo.parse(compiled.as_text()),
    dict.fromkeys(sharding.MESH_AXES, 1),
    (3,),
  )
  once = 2 * 8 * 32 * 32
  assert got.flops == 3 * 6 * once
  # XLA counts the bodies once, and the tanh beside them.
  assert once <= compiled.cost_analysis()["flops"] < 1.2 * once


def test_loops_over_tiles_run_their_mean():
  """FlashAttention forward and back, whose loops' bounds vary by tile."""
  seq, heads, head_dim = 2048, 2, 8
  tiles = 4 + 3 + 2 + 1  # Of 512 x 512; the rest lies ahead.
  x = jax.ShapeDtypeStruct((1, seq, heads, head_dim), jnp.float32)

  def total(q, k, v):
    return jnp.sum(attention.causal_attention(q, k, v, kernel="xla") ** 2)

  text = jax.jit(jax.grad(total, (0, 1, 2))).lower(x, x, x)
  module = hlo.parse(text.compile(FAST_COMPILE).as_text())
  mean = attention.mean_tiles(seq)
  got = costs.measure(module, {"clients": 1}, [mean]).flops
  # Two products forward and five back, 2 FLOPs a multiply-add.
  assert got == 7 * 2 * heads * tiles * 512 * 512 * head_dim


def test_collectives_of_a_shard_map_share_a_channel():
  """And are told apart by whom they join."""
  text = """HloModule jit_f, num_partitions=4

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %a = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0,2},{1,3}}
  ROOT %b = f32[8]{0} all-reduce(%a), channel_id=1, replica_groups={{0,1},{2,3}}
}
"""
  found = costs.measure(hlo.parse(text), MESH).collectives
  assert [c.axes for c in found] == [("clients",), ("fsdp",)]
