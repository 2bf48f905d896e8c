"""A decoder language model: RMSNorm, RoPE, grouped queries, SwiGLU.

The Llama architecture (arXiv 2302.13971) as pure functions on a plain dict of
parameters. Kernels are [in, out]; layers are stacked on a leading axis whether
they run scanned or unrolled, so that one checkpoint serves both.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import errors, sharding
from fedfm.models import layers
from fedfm.models import model as model_lib
from fedfm.models.model import Model, ParamSpec

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
_REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Sizes and options of a decoder.

  Attributes:
    vocab_size: Number of token ids.
    width: Size of the residual stream.
    num_layers: Number of layers.
    num_heads: Query heads; `num_heads * head_dim` may differ from `width`.
    num_kv_heads: Key/value heads; divides `num_heads`. Default `num_heads`.
    head_dim: Size of a head, even. Default `width / num_heads`.
    mlp_width: Hidden size of the SwiGLU.
    max_length: Longest sequence, in tokens.
    rope_theta: Base of the rotary wavelengths.
    norm_epsilon: Epsilon of RMSNorm.
    tie_embeddings: Whether the output head is the embedding table.
    dtype: Compute dtype, "float32" or "bfloat16" (or "float64" in tests).
    param_dtype: Dtype that `init` draws parameters in.
    scan_layers: Run layers in one `scan` (compiles once) or unrolled (faster on
      CPU, and for few layers).
    remat: "none", "full" (recompute the layer) or "dots" (keep matmuls).
  """

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  mlp_width: int
  # None only until `__post_init__`, which resolves it.
  num_kv_heads: int = None  # pyrefly: ignore[bad-assignment]
  head_dim: int = None  # pyrefly: ignore[bad-assignment]
  max_length: int = 2048
  rope_theta: float = 10_000.0
  norm_epsilon: float = 1e-5
  tie_embeddings: bool = True
  dtype: str = "float32"
  param_dtype: str = "float32"
  scan_layers: bool = True
  remat: str = "none"

  def __post_init__(self):
    if self.num_kv_heads is None:
      object.__setattr__(self, "num_kv_heads", self.num_heads)
    if self.head_dim is None:
      if self.num_heads < 1 or self.width % self.num_heads:
        raise errors.ConfigError(
          f"model.num_heads: {self.num_heads} does not divide width "
          f"{self.width}; give model.head_dim"
        )
      object.__setattr__(self, "head_dim", self.width // self.num_heads)
    for field in [
      "vocab_size",
      "width",
      "num_layers",
      "num_heads",
      "mlp_width",
      "num_kv_heads",
      "head_dim",
      "max_length",
    ]:
      if getattr(self, field) < 1:
        raise errors.ConfigError(
          f"model.{field}: got {getattr(self, field)}, expected at least 1"
        )
    if self.num_heads % self.num_kv_heads:
      raise errors.ConfigError(
        f"model.num_kv_heads: {self.num_kv_heads} does not divide num_heads "
        f"{self.num_heads}"
      )
    if self.head_dim % 2:
      raise errors.ConfigError(
        f"model.head_dim: got {self.head_dim}, expected an even number"
      )
    if self.remat not in _REMAT:
      raise errors.ConfigError(
        f"model.remat: got {self.remat!r}{errors.nearest(self.remat, _REMAT)}"
      )


def decoder_specs(config: DecoderConfig) -> PyTree:
  """Declares every parameter of the decoder, once.

  Args:
    config: Sizes.

  Returns:
    A dict tree of `ParamSpec`.
  """
  c = config
  n, d = c.num_layers, c.width
  heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  residual = 0.02 / (2 * n) ** 0.5  # GPT-2's scaling of residual outputs.

  def kernel(rows, cols, axes, stddev=0.02):
    return ParamSpec((n, rows, cols), ("layers", *axes), stddev)

  def norm(*shape):
    axes = ("layers", "norm")[-len(shape) :]
    return ParamSpec(shape, axes, fill=1.0)

  specs = {
    "embed": ParamSpec((c.vocab_size, d), ("vocab", "table_width"), 0.02),
    "layers": {
      "attention_norm": norm(n, d),
      "q_proj": kernel(d, heads, ("embed", "heads")),
      "k_proj": kernel(d, kv_heads, ("embed", "kv_heads")),
      "v_proj": kernel(d, kv_heads, ("embed", "kv_heads")),
      "o_proj": kernel(heads, d, ("heads", "embed"), residual),
      "mlp_norm": norm(n, d),
      "gate_proj": kernel(d, c.mlp_width, ("embed", "mlp")),
      "up_proj": kernel(d, c.mlp_width, ("embed", "mlp")),
      "down_proj": kernel(c.mlp_width, d, ("mlp", "embed"), residual),
    },
    "final_norm": norm(d),
  }
  if not c.tie_embeddings:
    specs["lm_head"] = ParamSpec(
      (d, c.vocab_size), ("table_width", "vocab"), 0.02
    )
  return specs


def decoder(config: DecoderConfig) -> Model:
  """Builds the decoder as pure functions.

  `apply(params, tokens, *, positions=None, segment_ids=None, cache=None,
  output="logits")` takes tokens [batch, seq] and returns logits
  [batch, seq, vocab] in float32 at least, or `(logits, cache)` when a cache
  from `init_cache(batch, length)` is given; `output="hidden"` stops before the
  output head. Positions count from 0 (or from the cache's index); tokens attend
  causally, within their segment where `segment_ids` [batch, seq] are given.

  Args:
    config: Sizes and options.

  Returns:
    A `Model`.

  Examples:
    >>> model = decoder(DecoderConfig(vocab_size=11, width=8, num_layers=2,
    ...                               num_heads=2, mlp_width=16))
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, jnp.zeros((1, 5), jnp.int32)).shape
    (1, 5, 11)
  """
  specs = decoder_specs(config)
  param_dtype = jnp.dtype(config.param_dtype)
  return Model(
    init=lambda key: model_lib.init_params(specs, key, param_dtype),
    apply=functools.partial(_apply, config),
    axes=model_lib.axes_of(specs),
    shapes=model_lib.shapes_of(specs, param_dtype),
    config=config,
    unembed=functools.partial(_unembed, config),
    init_cache=functools.partial(_init_cache, config),
  )


def _init_cache(config: DecoderConfig, batch: int, length: int) -> PyTree:
  """Zeroed keys and values [layers, batch, length, kv_heads, head_dim]."""
  shape = (config.num_layers, batch, length, config.num_kv_heads)
  zeros = jnp.zeros((*shape, config.head_dim), jnp.dtype(config.dtype))
  return {"key": zeros, "value": zeros, "index": jnp.zeros((), jnp.int32)}


def _unembed(config: DecoderConfig, params: PyTree, hidden: jax.Array):
  """Maps hidden [..., width] to logits [..., vocab], in float32 at least."""
  del config  # A trained head unties: what counts is what is there.
  if "lm_head" in params:
    logits = layers.dense(hidden, params["lm_head"])
  else:
    logits = hidden @ params["embed"].astype(hidden.dtype).T
  return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _layer(config, x, layer, cos, sin, positions, segment_ids, cache):
  """One layer; `cache` is None or this layer's (key, value, index)."""
  b, s, _ = x.shape
  heads = (b, s, -1, config.head_dim)
  with jax.named_scope("attention"):
    y = layers.rms_norm(x, layer["attention_norm"], config.norm_epsilon)
    q = layers.dense(y, layer["q_proj"]).reshape(heads)
    k = layers.dense(y, layer["k_proj"]).reshape(heads)
    v = layers.dense(y, layer["v_proj"]).reshape(heads)
    q = sharding.constrain(q, "batch", "sequence", "heads", None)
    q, k = layers.rope(q, cos, sin), layers.rope(k, cos, sin)
    if cache is None:
      out = layers.causal_attention(q, k, v, segment_ids)
    else:
      old_key, old_value, index = cache
      k = jax.lax.dynamic_update_slice_in_dim(old_key, k, index, axis=1)
      v = jax.lax.dynamic_update_slice_in_dim(old_value, v, index, axis=1)
      mask = positions[:, :, None] >= jnp.arange(k.shape[1])
      out = layers.attention(q, k, v, mask)
    x = x + layers.dense(out.reshape(b, s, -1), layer["o_proj"])
  with jax.named_scope("mlp"):
    y = layers.rms_norm(x, layer["mlp_norm"], config.norm_epsilon)
    gate = jax.nn.silu(layers.dense(y, layer["gate_proj"]))
    y = gate * layers.dense(y, layer["up_proj"])
    y = sharding.constrain(y, "batch", "sequence", "mlp")
    x = x + layers.dense(y, layer["down_proj"])
  x = sharding.constrain(x, "batch", "sequence", "width")
  return x, (None if cache is None else (k, v))


def _split_layers(stacked: PyTree, n: int) -> list[PyTree]:
  """Splits the leading axis; its transpose is one concatenate, not n pads."""
  leaves, treedef = jax.tree.flatten(stacked)
  parts = [[p[0] for p in jax.lax.split(x, [1] * n, axis=0)] for x in leaves]
  return [treedef.unflatten(layer) for layer in zip(*parts)]


def _apply(
  config: DecoderConfig,
  params: PyTree,
  tokens: jax.Array,
  *,
  positions: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  cache: PyTree | None = None,
  output: str = "logits",
):
  """See `decoder`."""
  b, s = tokens.shape
  index = jnp.zeros((), jnp.int32) if cache is None else cache["index"]
  if positions is None:
    positions = jnp.broadcast_to(index + jnp.arange(s), (b, s))
  cos, sin = layers.rope_angles(
    positions, config.head_dim, config.rope_theta, config.dtype
  )
  with jax.named_scope("embed"):
    x = params["embed"][tokens].astype(jnp.dtype(config.dtype))
    x = sharding.constrain(x, "batch", "sequence", "width")

  def run_layer(x, layer_and_cache):
    layer, kv = layer_and_cache
    kv = None if kv is None else (*kv, index)
    return _layer(config, x, layer, cos, sin, positions, segment_ids, kv)

  if config.remat != "none":
    run_layer = jax.checkpoint(run_layer, policy=_REMAT[config.remat])
  kv: PyTree = None if cache is None else (cache["key"], cache["value"])
  if config.scan_layers:
    x, kv = jax.lax.scan(run_layer, x, (params["layers"], kv))
  else:
    outs = []
    for layer in _split_layers((params["layers"], kv), config.num_layers):
      x, out = run_layer(x, layer)
      outs.append(out)
    kv = jax.tree.map(lambda *ys: jnp.stack(ys), *outs)
  x = layers.rms_norm(x, params["final_norm"], config.norm_epsilon)
  if output == "logits":
    with jax.named_scope("unembed"):
      x = _unembed(config, params, x)
  if cache is None:
    return x
  return x, {"key": kv[0], "value": kv[1], "index": index + s}
