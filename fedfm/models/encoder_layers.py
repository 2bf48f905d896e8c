"""The layers of BERT, ViT and CLIP: LayerNorm, biases, attention by a mask.

Norms come after the residual sum (BERT) or before the sublayer (ViT, CLIP).
Layers are stacked on a leading axis whether they run scanned or unrolled, so
that one checkpoint serves both.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from fedfm import errors, sharding
from fedfm.models import attention, field_types, layers
from fedfm.models.model import ParamSpec

PyTree = Any
Attend = Callable[..., jax.Array]
KERNELS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "mlp": jax.checkpoint_policies.save_only_these_names("mlp"),
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
  """Sizes and options of a stack of layers.

  Attributes:
    width: Size of the residual stream.
    num_layers: Number of layers.
    num_heads: Heads; divides `width`.
    mlp_width: Hidden size of the MLP.
    norm_epsilon: Epsilon of the norms.
    activation: One of `layers.ACTIVATIONS`.
  """

  width: int
  num_layers: int
  num_heads: int
  mlp_width: int
  norm_epsilon: float = 1e-12
  activation: str = "gelu"

  def __post_init__(self):
    field_types.check(self)
    check_positive(self, "width", "num_layers", "num_heads", "mlp_width")
    if self.width % self.num_heads:
      raise errors.ConfigError(
        f"model.num_heads: {self.num_heads} does not divide width {self.width}"
      )
    if not 0 < self.norm_epsilon < math.inf:
      raise errors.ConfigError(
        f"model.norm_epsilon: got {self.norm_epsilon}, expected above 0"
      )
    check_choice(self, "activation", layers.ACTIVATIONS)

  @property
  def head_dim(self) -> int:
    """Size of a head."""
    return self.width // self.num_heads


def check_positive(config: Any, *fields: str) -> None:
  """Raises ConfigError for a size below 1."""
  for field in fields:
    value = getattr(config, field)
    if value < 1:
      raise errors.ConfigError(
        f"model.{field}: got {value}, expected at least 1"
      )


def check_choice(config: Any, field: str, choices: Any) -> None:
  """Raises ConfigError for a name that is none of the choices."""
  value = getattr(config, field)
  if value not in choices:
    raise errors.ConfigError(
      f"model.{field}: got {value!r}{errors.nearest(value, choices)}"
    )


def stack_specs(config: StackConfig) -> dict[str, ParamSpec]:
  """Declares the parameters of a stack, leaves [layers, ...].

  Args:
    config: Sizes.

  Returns:
    {name: `ParamSpec`}; a bias has the name of its kernel with "_bias".
  """
  n, d, inner = config.num_layers, config.width, config.mlp_width
  specs: dict[str, ParamSpec] = {}
  for name, rows, cols, axes in (
    ("q_proj", d, d, ("embed", "heads")),
    ("k_proj", d, d, ("embed", "heads")),
    ("v_proj", d, d, ("embed", "heads")),
    ("o_proj", d, d, ("heads", "embed")),
    ("up_proj", d, inner, ("embed", "mlp")),
    ("down_proj", inner, d, ("mlp", "embed")),
  ):
    specs[name] = ParamSpec((n, rows, cols), ("layers", *axes), 0.02)
    out = axes[1] if axes[1] != "embed" else "norm"
    specs[name + "_bias"] = ParamSpec((n, cols), ("layers", out))
  for name in ("attention_norm", "mlp_norm"):
    specs[name] = ParamSpec((n, d), ("layers", "norm"), fill=1.0)
    specs[name + "_bias"] = ParamSpec((n, d), ("layers", "norm"))
  return specs


def dense_specs(
  name: str, rows: int, cols: int, axes: tuple[str | None, str | None]
) -> dict[str, ParamSpec]:
  """Declares a kernel [rows, cols] and its bias."""
  out = axes[1] if axes[1] not in ("embed", "table_width") else "norm"
  return {
    name: ParamSpec((rows, cols), axes, 0.02),
    name + "_bias": ParamSpec((cols,), (out,)),
  }


def norm_specs(name: str, width: int) -> dict[str, ParamSpec]:
  """Declares a LayerNorm."""
  return {
    name: ParamSpec((width,), ("norm",), fill=1.0),
    name + "_bias": ParamSpec((width,), ("norm",)),
  }


def norm(config: StackConfig, x: jax.Array, params: PyTree, name: str):
  """Applies a LayerNorm by its name to x [..., width]."""
  scale, bias = params[name], params[name + "_bias"]
  return layers.layer_norm(x, scale, bias, config.norm_epsilon)


def dense(x: jax.Array, params: PyTree, name: str) -> jax.Array:
  """Applies a kernel and its bias by the kernel's name."""
  return layers.dense(x, params[name], params[name + "_bias"])


def insert(x: jax.Array, prompt: jax.Array) -> jax.Array:
  """Puts a prompt after the first token of every row.

  Args:
    x: [batch, seq, ...].
    prompt: [tokens, ...].

  Returns:
    [batch, seq + tokens, ...], in the dtype of `x`.

  Examples:
    >>> insert(jnp.array([[1, 2], [3, 4]]), jnp.array([7])).tolist()
    [[1, 7, 2], [3, 7, 4]]
  """
  prompt = jnp.broadcast_to(prompt, (x.shape[0], *prompt.shape))
  return jnp.concatenate([x[:, :1], prompt.astype(x.dtype), x[:, 1:]], axis=1)


def without(x: jax.Array, prompt: jax.Array | None) -> jax.Array:
  """Leaves the places of an inserted prompt out of x [batch, seq, ...]."""
  if prompt is None:
    return x
  return jnp.concatenate([x[:, :1], x[:, 1 + len(prompt) :]], axis=1)


def attend_to(kernel: str, mask: jax.Array | None = None) -> Attend:
  """What `run_stack` takes for attention to all tokens.

  Args:
    kernel: One of `attention.KERNELS`.
    mask: [batch, seq], true where a token is no padding; or None.

  Returns:
    `attend(query, key, value)`.
  """
  if mask is not None:
    mask = jnp.asarray(mask).astype(bool)
  return functools.partial(attention.full_attention, mask=mask, kernel=kernel)


def _layer(config: StackConfig, norm_first: bool, attend_fn: Attend, x, layer):
  """One layer: x [batch, seq, width]."""
  b, s, _ = x.shape

  def attend(y):
    heads = (b, s, config.num_heads, config.head_dim)
    q, k, v = (dense(y, layer, f"{n}_proj").reshape(heads) for n in "qkv")
    q = sharding.constrain(q, "batch", "sequence", "heads", None)
    out = attend_fn(q, k, v)
    return dense(out.reshape(b, s, -1), layer, "o_proj")

  def mlp(y):
    up = checkpoint_name(dense(y, layer, "up_proj"), "mlp")
    y = layers.ACTIVATIONS[config.activation](up)
    y = sharding.constrain(y, "batch", "sequence", "mlp")
    return dense(y, layer, "down_proj")

  for name, sublayer in (("attention", attend), ("mlp", mlp)):
    with jax.named_scope(name):
      if norm_first:
        x = x + sublayer(norm(config, x, layer, f"{name}_norm"))
      else:
        x = norm(config, x + sublayer(x), layer, f"{name}_norm")
  return sharding.constrain(x, "batch", "sequence", "width")


def run_stack(
  config: StackConfig,
  stack: PyTree,
  x: jax.Array,
  attend_fn: Attend,
  *,
  norm_first: bool,
  scan_layers: bool,
  remat: str,
) -> jax.Array:
  """Runs the layers one after the other.

  Args:
    config: Sizes.
    stack: Parameters, leaves [layers, ...].
    x: [batch, seq, width].
    attend_fn: `attend(query, key, value)`, [batch, seq, heads, head_dim] each,
      such as `attend_to`.
    norm_first: Norms before the sublayers, or after the residual sums.
    scan_layers: One scan, or unrolled.
    remat: One of `REMAT`.

  Returns:
    [batch, seq, width].
  """
  run = functools.partial(_layer, config, norm_first, attend_fn)
  if remat != "none":
    run = jax.checkpoint(run, policy=REMAT[remat])
  if scan_layers:
    return jax.lax.scan(lambda x, p: (run(x, p), None), x, stack)[0]
  for layer in layers.split_stack(stack):
    x = run(x, layer)
  return x
