"""Every parameter of a decoder, declared once.

A plain dict: kernels are [in, out], and layers are stacked on a leading axis
whether they run scanned or unrolled, so that one checkpoint serves both. A bias
has the name of its kernel, or LayerNorm, with "_bias".
"""

from typing import Any

from fedfm.models.decoder_config import DecoderConfig
from fedfm.models.model import ParamSpec

PyTree = Any
KERNELS = (
  "q_proj",
  "k_proj",
  "v_proj",
  "o_proj",
  "gate_proj",
  "up_proj",
  "down_proj",
)


def decoder_specs(config: DecoderConfig) -> PyTree:
  """Declares every parameter of the decoder, once.

  Args:
    config: Sizes and options.

  Returns:
    A dict tree of `ParamSpec`.
  """
  c = config
  n, d = c.num_layers, c.width
  heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  residual = 0.02 / (2 * n) ** 0.5  # GPT-2's scaling of residual outputs.

  def kernel(name, rows, cols, axes, bias, stddev=0.02):
    specs = {name: ParamSpec((n, rows, cols), ("layers", *axes), stddev)}
    if bias:
      out = axes[1] if axes[1] != "embed" else "norm"
      specs[name + "_bias"] = ParamSpec((n, cols), ("layers", out))
    return specs

  def norm(name, *shape, axis="norm", kind=c.norm):
    axes = ("layers", axis)[-len(shape) :]
    fill = 0.0 if kind == "rms_unit_offset" else 1.0
    specs = {name: ParamSpec(shape, axes, fill=fill)}
    if kind == "layer":
      specs[name + "_bias"] = ParamSpec(shape, axes)
    return specs

  layer: dict[str, ParamSpec] = {}
  for part in ("attention", "mlp"):
    if c.norm_placement != "post":
      layer |= norm(f"{part}_norm", n, d)
    if c.norm_placement != "pre":
      layer |= norm(f"post_{part}_norm", n, d)
  kind = "rms" if c.norm == "layer" else c.norm
  for name, axis, size in (("q", "heads", heads), ("k", "kv_heads", kv_heads)):
    if c.qk_norm == "head":
      layer |= norm(f"{name}_norm", n, c.head_dim, kind=kind)
    elif c.qk_norm == "projection":
      layer |= norm(f"{name}_norm", n, size, axis=axis, kind=kind)
  layer |= kernel("q_proj", d, heads, ("embed", "heads"), c.qkv_bias)
  for name in ("k_proj", "v_proj"):
    layer |= kernel(name, d, kv_heads, ("embed", "kv_heads"), c.qkv_bias)
  layer |= kernel(
    "o_proj", heads, d, ("heads", "embed"), c.output_bias, residual
  )
  for name in ("gate_proj", "up_proj") if c.gated_mlp else ("up_proj",):
    layer |= kernel(name, d, c.mlp_width, ("embed", "mlp"), c.mlp_bias)
  layer |= kernel(
    "down_proj", c.mlp_width, d, ("mlp", "embed"), c.mlp_bias, residual
  )
  specs: dict[str, Any] = {
    "embed": ParamSpec((c.vocab_size, d), ("vocab", "table_width"), 0.02),
    "layers": layer,
    **norm("final_norm", d),
  }
  if c.positions == "learned":
    specs["position_embed"] = ParamSpec(
      (c.max_length, d), (None, "table_width"), 0.02
    )
  if not c.tie_embeddings:
    specs["lm_head"] = ParamSpec(
      (d, c.vocab_size), ("table_width", "vocab"), 0.02
    )
  return specs
