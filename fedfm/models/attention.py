"""Causal grouped-query attention, without a full score matrix."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import errors
from fedfm.models import fused_attention, layers
from fedfm.models.flash_attention import (
  TILE,
  flash_attention,
  flash_attention_to_cache,
)

KERNELS = ("auto", "xla", "cudnn", "splash")
# Up to here, blocks of queries are unrolled: less work on short sequences.
MAX_UNROLLED = 1024  # Tokens; more go in tiles, with a derivative by hand.


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array,
  *,
  scale: float | None = None,
  softcap: float | None = None,
) -> jax.Array:
  """Grouped-query attention, softmax in float32 at least.

  Args:
    query: [batch, seq, heads, head_dim].
    key: [batch, length, kv_heads, head_dim]; kv_heads divides heads.
    value: Like `key`.
    mask: Boolean [batch or 1, seq or 1, length], true where attention is
      allowed.
    scale: Scores are multiplied by it; default 1 / sqrt(head_dim).
    softcap: Scores become cap * tanh(scores / cap).

  Returns:
    [batch, seq, heads, head_dim]. Source: arXiv 2305.13245.
  """
  b, s, h, d = query.shape
  t, kv = key.shape[1], key.shape[2]
  g = h // kv
  # The heads of a group are folded into rows: one plain matmul per kv head.
  query = query * (d**-0.5 if scale is None else scale)
  query = query.reshape(b, s, kv, g, d)
  query = query.transpose(0, 2, 3, 1, 4).reshape(b, kv, g * s, d)
  key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
  scores = jnp.einsum("bksd,bktd->bkst", query, key).reshape(b, kv, g, s, t)
  scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
  scores = layers.softcap(scores, softcap)
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
  top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  weights = jnp.exp(scores - top)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  weights = weights.astype(value.dtype).reshape(b, kv, g * s, t)
  out = jnp.einsum("bkst,bktd->bksd", weights, value).reshape(b, kv, g, s, d)
  # Normalising the output touches head_dim numbers a row instead of length.
  out = out / total.astype(out.dtype)
  return out.transpose(0, 3, 1, 2, 4).reshape(b, s, h, d)


def causal_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None = None,
  *,
  window: int | None = None,
  is_local: Any = True,
  scale: float | None = None,
  softcap: float | None = None,
  kernel: str = "auto",
) -> jax.Array:
  """Causal self-attention; no [seq, seq] score matrix exists.

  Kernels: "xla" works everywhere, in blocks that skip what lies ahead and
  beyond the window; "cudnn" is cuDNN's on NVIDIA GPUs, "splash" JAX's own on
  TPUs. "auto" takes the fused one of the mesh's devices, without a mesh of the
  default backend, where it can do the case.

  Args:
    query: [batch, seq, heads, head_dim].
    key: [batch, prefix + seq, kv_heads, head_dim]; what there is beyond `seq`
      comes before the first query, and belongs to every segment.
    value: Like `key`.
    segment_ids: [batch, seq]; attention stays within a segment. Or None.
    window: Keys that a query meets, its own included; None for all.
    is_local: Whether the window applies: a bool, or a boolean scalar that is
      known at run time only (one layer of a scan over several).
    scale: Scores are multiplied by it; default 1 / sqrt(head_dim).
    softcap: Scores become cap * tanh(scores / cap).
    kernel: One of `KERNELS`.

  Returns:
    [batch, seq, heads, head_dim].

  Raises:
    ConfigError: A named kernel that cannot do the case.
  """
  seq = query.shape[1]
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  if window is not None and (window >= key.shape[1] or is_local is False):
    window = None
  kernel = _choose(kernel, query, key, segment_ids, softcap)
  options: dict[str, Any] = {"scale": scale, "softcap": softcap}
  if kernel != "xla":
    fused = functools.partial(
      getattr(fused_attention, kernel), segment_ids=segment_ids, **options
    )
    local, everywhere = (
      functools.partial(fused, window=w) for w in (window, None)
    )
    if window is None or is_local is True:
      return local(query, key, value)
    return jax.lax.cond(is_local, local, everywhere, query, key, value)
  run = _unrolled if seq <= MAX_UNROLLED else flash_attention
  options["window"] = _effective(window, is_local, key.shape[1])
  return run(query, key, value, segment_ids, **options)


def full_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None = None,
  *,
  kernel: str = "auto",
) -> jax.Array:
  """Attention of every token to all that are no padding.

  Args:
    query: [batch, seq, heads, head_dim].
    key: Like `query`.
    value: Likewise.
    mask: [batch, seq], true where a token is no padding; or None.
    kernel: One of `KERNELS`, as in `causal_attention`; "xla" makes scores of
      all tokens at once up to 1,024 of them, and of a tile of queries at a
      time, forward and backward, beyond. "auto" takes splash from a tile of its
      own on, 128 tokens.

  Returns:
    [batch, seq, heads, head_dim].

  Raises:
    ConfigError: A named kernel that cannot do the case.
  """
  seq, scale = query.shape[1], query.shape[-1] ** -0.5
  tile = fused_attention.padded(1)
  if kernel == "auto" and seq < tile and _platform() == "tpu":
    kernel = "xla"
  b, _, h, d = query.shape
  whole = jax.ShapeDtypeStruct(
    (b, fused_attention.padded(seq), h, d), query.dtype
  )
  kernel = _choose(kernel, whole, whole, None, None)
  if kernel != "xla":
    run = getattr(fused_attention, f"{kernel}_full")
    return run(query, key, value, mask, scale=scale)
  allowed = jnp.ones((1, 1, 1), bool) if mask is None else mask[:, None, :]
  allowed = jnp.broadcast_to(allowed, (allowed.shape[0], 1, seq)).astype(bool)

  @functools.partial(jax.checkpoint, prevent_cse=False)  # As map needs none.
  def some(queries):
    return attention(queries, key, value, allowed, scale=scale)

  if seq <= MAX_UNROLLED:
    return attention(query, key, value, allowed, scale=scale)
  blocks = jnp.pad(query, ((0, 0), (0, -seq % TILE), (0, 0), (0, 0)))
  blocks = jnp.moveaxis(blocks.reshape(b, -1, TILE, h, d), 1, 0)
  out = jnp.moveaxis(jax.lax.map(some, blocks), 0, 1)
  return out.reshape(b, -1, h, d)[:, :seq]


def cached_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  positions: jax.Array,
  *,
  prefix: int = 0,
  window: Any = None,
  is_local: Any = True,
  scale: float | None = None,
  softcap: float | None = None,
) -> jax.Array:
  """Attention of new tokens to a cache that holds their keys and older ones.

  Args:
    query: [batch, seq, heads, head_dim].
    key: [batch, prefix + length, kv_heads, head_dim].
    value: Like `key`.
    positions: [batch, seq] int32, each query's slot among the `length`; what
      comes after it is not seen.
    prefix: Keys before the first slot.
    window: As in `causal_attention`.
    is_local: Likewise.
    scale: Likewise.
    softcap: Likewise.

  Returns:
    [batch, seq, heads, head_dim].
  """
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  window = _effective(window, is_local, key.shape[1])
  options: dict[str, Any] = {"scale": scale, "softcap": softcap}
  if (
    query.shape[1] > MAX_UNROLLED
  ):  # Only ever the prompt, in step by position.
    offset = positions[0, 0] + prefix
    return flash_attention_to_cache(
      query, key, value, offset, window=window, **options
    )
  behind = positions[:, :, None] - jnp.arange(-prefix, key.shape[1] - prefix)
  mask = behind >= 0
  if window is not None:
    mask = mask & (behind < window)
  return attention(query, key, value, mask, **options)


def mean_tiles(seq: int) -> float | None:
  """Tiles of keys that a tile of queries meets, on average and without window.

  Args:
    seq: Queries, and as many keys.

  Returns:
    The trip count that loops over tiles have on average; None where "xla" has
    no such loops.

  Examples:
    >>> mean_tiles(1024), mean_tiles(2048)
    (None, 2.5)
  """
  return (-(-seq // TILE) + 1) / 2 if seq > MAX_UNROLLED else None


def _effective(window: int | None, is_local: Any, length: int) -> Any:
  """A window that is all of `length` where it does not apply."""
  if window is None or is_local is True:
    return window
  return jnp.where(is_local, window, length)


def _unrolled(
  query, key, value, segment_ids, *, window, scale, softcap, block=128
):
  """Blocks of queries, each with the keys that it may meet."""
  seq = query.shape[1]
  prefix = key.shape[1] - seq
  outputs = []
  for begin in range(0, seq, block):
    end = min(begin + block, seq)
    start = -prefix
    if isinstance(window, int):  # One known at run time only skips nothing.
      start = max((begin - window + 1) // block * block, -prefix)
    rows, cols = jnp.arange(begin, end), jnp.arange(start, end)
    mask = (rows[:, None] >= cols)[None]
    if window is not None:
      mask = mask & (rows[:, None] - cols < window)
    if segment_ids is not None:
      keys = segment_ids[:, None, max(start, 0) : end]
      own = segment_ids[:, begin:end, None] == keys
      own = jnp.pad(
        own, ((0, 0), (0, 0), (max(-start, 0), 0)), constant_values=True
      )
      mask = mask & own
    seen = slice(prefix + start, prefix + end)
    outputs.append(
      attention(
        query[:, begin:end],
        key[:, seen],
        value[:, seen],
        mask,
        scale=scale,
        softcap=softcap,
      )
    )
  return jnp.concatenate(outputs, axis=1)


def _platform() -> str:
  """Where the program will run, which need not be where it is compiled."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def _choose(kernel, query, key, segment_ids, softcap) -> str:
  """Resolves "auto", and refuses a kernel that cannot do the case."""
  if kernel == "xla":
    return kernel
  wanted = kernel
  if kernel == "auto":
    backends = {"gpu": "cudnn", "tpu": "splash"}
    wanted = backends.get(_platform(), "xla")
    if wanted == "xla":
      return wanted
  reason = fused_attention.cannot(wanted, query, key, segment_ids, softcap)
  if reason is None:
    return wanted
  if kernel == "auto":
    return "xla"
  raise errors.ConfigError(
    f"model.attention_kernel: {kernel!r} cannot do {reason}; 'xla' can"
  )
