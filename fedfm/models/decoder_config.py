"""Sizes and options of a decoder, checked."""

import dataclasses
import math

from fedfm import errors
from fedfm.models import attention, field_types, layers, rope

# What each option of a name may be.
CHOICES = {
  "positions": ("rope", "learned"),
  "norm": ("rms", "rms_unit_offset", "layer"),
  "norm_placement": ("pre", "post", "both"),
  "qk_norm": ("none", "head", "projection"),
  "activation": tuple(layers.ACTIVATIONS),
  "remat": ("none", "full", "mlp", "dots"),
  "attention_kernel": attention.KERNELS,
}
# How it runs; the rest says what is computed.
EXECUTION = ("dtype", "param_dtype", "scan_layers", "remat", "attention_kernel")
_POSITIVE = (
  "vocab_size",
  "width",
  "num_layers",
  "num_heads",
  "mlp_width",
  "num_kv_heads",
  "head_dim",
  "max_length",
  "sliding_window",
)
_ABOVE_ZERO = (
  "norm_epsilon",
  "rope_theta",
  "local_rope_theta",
  "query_scalar",
  "attention_softcap",
  "logit_softcap",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Sizes and options of a decoder; the defaults are Llama's.

  Attributes:
    vocab_size: Number of token ids.
    width: Size of the residual stream.
    num_layers: Number of layers.
    num_heads: Query heads; `num_heads * head_dim` may differ from `width`.
    num_kv_heads: Key/value heads; divides `num_heads`. Default `num_heads`.
    head_dim: Size of a head, even with "rope". Default `width / num_heads`.
    mlp_width: Hidden size of the MLP.
    max_length: Longest sequence, in tokens.
    positions: "rope" (rotary), or "learned" (a table added to the embeddings).
    rope_theta: Base of the rotary wavelengths.
    rope_scaling: How they are stretched for long texts, of `models.rope`; where
      the length matters, a cache counts as long as it may become.
    local_rope_theta: Base in the layers with a sliding window, where it is
      another; it is not stretched.
    rotary_fraction: Share of each head that is rotated, from its start.
    norm: "rms", "rms_unit_offset" (multiplies by 1 + weight) or "layer"
      (LayerNorm, with a bias).
    norm_placement: "pre" (before attention and MLP), "post" (after them, before
      they are added to the residual stream) or "both".
    norm_epsilon: Epsilon of the norms.
    qk_norm: RMSNorm of queries and keys: "none", of each "head", or of the
      whole "projection".
    activation: "silu", "gelu", or "gelu_tanh" (its tanh approximation).
    gated_mlp: Whether the MLP has a gate (SwiGLU, GeGLU).
    qkv_bias: Whether the projections to queries, keys and values have a bias.
    output_bias: Whether the attention's output projection has one.
    mlp_bias: Whether the MLP's projections have one.
    query_scalar: Scores are divided by its square root; default `head_dim`.
    attention_softcap: Scores become cap * tanh(scores / cap).
    logit_softcap: Likewise for the logits.
    scale_embeddings: Whether embeddings are multiplied by sqrt(width).
    sliding_window: Tokens that a token attends to, itself included.
    sliding_layers: Whether each layer has the window; default all have it.
    tie_embeddings: Whether the output head is the embedding table.
    architecture: What `huggingface.save` writes it as.
    dtype: Compute dtype, "float32" or "bfloat16" (or "float64" in tests).
    param_dtype: Dtype that `init` draws parameters in.
    scan_layers: Run layers in one `scan` (compiles once) or unrolled (faster on
      CPU, and for few layers).
    remat: "none", "full" (recompute the layer), "mlp" (keep the MLP's hidden
      products: 2 * mlp_width numbers a token of a gated one) or "dots" (keep
      matmuls).
    attention_kernel: "xla", "cudnn" (GPU), "splash" (TPU), or "auto", by the
      default backend; see `attention.causal_attention`.
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
  positions: str = "rope"
  rope_theta: float = 10_000.0
  rope_scaling: rope.Scaling | None = None
  local_rope_theta: float | None = None
  rotary_fraction: float = 1.0
  norm: str = "rms"
  norm_placement: str = "pre"
  norm_epsilon: float = 1e-5
  qk_norm: str = "none"
  activation: str = "silu"
  gated_mlp: bool = True
  qkv_bias: bool = False
  output_bias: bool = False
  mlp_bias: bool = False
  query_scalar: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  scale_embeddings: bool = False
  sliding_window: int | None = None
  sliding_layers: tuple[bool, ...] | None = None
  tie_embeddings: bool = True
  architecture: str = "LlamaForCausalLM"
  dtype: str = "float32"
  param_dtype: str = "float32"
  scan_layers: bool = True
  remat: str = "none"
  attention_kernel: str = "auto"

  def __post_init__(self):
    if self.num_kv_heads is None:
      object.__setattr__(self, "num_kv_heads", self.num_heads)
    if self.head_dim is None:
      for field in ("width", "num_heads"):
        field_types.check_whole(field, getattr(self, field))
      if self.num_heads < 1 or self.width % self.num_heads:
        raise errors.ConfigError(
          f"model.num_heads: {self.num_heads} does not divide width "
          f"{self.width}; give model.head_dim"
        )
      object.__setattr__(self, "head_dim", self.width // self.num_heads)
    field_types.check(self)
    for field in _POSITIVE:
      value = getattr(self, field)
      if value is not None and value < 1:
        raise errors.ConfigError(
          f"model.{field}: got {value}, expected at least 1"
        )
    for field in _ABOVE_ZERO:
      value = getattr(self, field)
      if value is not None and not 0 < value < math.inf:
        raise errors.ConfigError(
          f"model.{field}: got {value}, expected above 0"
        )
    if self.num_heads % self.num_kv_heads:
      raise errors.ConfigError(
        f"model.num_kv_heads: {self.num_kv_heads} does not divide num_heads "
        f"{self.num_heads}"
      )
    if self.head_dim % 2 and self.positions == "rope":
      raise errors.ConfigError(
        f"model.head_dim: got {self.head_dim}, expected an even number"
      )
    for field, choices in CHOICES.items():
      value = getattr(self, field)
      if value not in choices:
        raise errors.ConfigError(
          f"model.{field}: got {value!r}{errors.nearest(value, choices)}"
        )
    self._check_rope()
    sliding = self.sliding_layers
    if sliding is not None and len(sliding) != self.num_layers:
      raise errors.ConfigError(
        f"model.sliding_layers: got {len(sliding)} layers, expected num_layers"
        f" = {self.num_layers}"
      )
    if sliding is not None and any(sliding) and self.sliding_window is None:
      raise errors.ConfigError(
        "model.sliding_layers: needs model.sliding_window"
      )

  def _check_rope(self):
    if self.positions == "learned":
      if self.rope_scaling is not None:
        raise errors.ConfigError("model.rope_scaling: needs positions 'rope'")
      return
    whole = 0 < self.rotary_fraction <= 1 and self.rotary_dim > 0
    if not whole or self.rotary_dim % 2:
      raise errors.ConfigError(
        f"model.rotary_fraction: got {self.rotary_fraction} of a head of "
        f"{self.head_dim}, expected an even share"
      )
    if isinstance(self.rope_scaling, rope.Dynamic) and self.rotary_dim < 4:
      raise errors.ConfigError(
        "model.rope_scaling: 'dynamic' needs at least 4 rotated dimensions"
      )
    if self.rope_scaling is not None:
      try:
        self.rope_scaling.frequencies(
          self.rope_theta, self.rotary_dim, 1, self.max_length
        )
      except errors.ConfigError as e:
        raise errors.ConfigError(f"model.rope_scaling: {e}") from None

  @property
  def rotary_dim(self) -> int:
    """How much of a head is rotated."""
    return int(self.head_dim * self.rotary_fraction)

  def has_window(self, layer: int) -> bool:
    """Whether a layer has the sliding window."""
    if self.sliding_window is None:
      return False
    return self.sliding_layers is None or self.sliding_layers[layer]
