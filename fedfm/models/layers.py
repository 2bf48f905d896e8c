"""The pieces of a decoder layer; kernels may be arrays or adapted kernels."""

from typing import Any

import jax
import jax.numpy as jnp


def dense(x: jax.Array, kernel: Any) -> jax.Array:
  """Applies a kernel [in, out] to x [..., in], in x's dtype.

  Args:
    x: [..., in].
    kernel: An array [in, out], or an object with `dense(x)`: an adapter's or a
      quantised kernel brings its own product.

  Returns:
    [..., out].
  """
  if hasattr(kernel, "dense"):
    return kernel.dense(x)
  return x @ kernel.astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """Root-mean-square norm over the last axis, computed in float32 at least.

  Args:
    x: [..., width].
    scale: [width].
    epsilon: Added to the mean square.

  Returns:
    [..., width], in x's dtype. Source: arXiv 1910.07467.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  normed = wide * jax.lax.rsqrt(mean_square + epsilon)
  return (normed * scale.astype(wide.dtype)).astype(x.dtype)


def rope_angles(
  positions: jax.Array, head_dim: int, theta: float, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of rotary positions. Source: arXiv 2104.09864.

  Args:
    positions: [batch, seq] int32.
    head_dim: Size of a head, even.
    theta: Base of the wavelengths.
    dtype: Compute dtype of the model.

  Returns:
    Two arrays [batch, seq, head_dim / 2], in `dtype` but float32 at least.
  """
  dtype = jnp.promote_types(dtype, jnp.float32)
  exponents = jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim
  angles = positions[..., None].astype(dtype) * theta**-exponents
  return jnp.cos(angles), jnp.sin(angles)


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the halves of each head (the Hugging Face layout).

  Args:
    x: [batch, seq, heads, head_dim].
    cos: [batch, seq, head_dim / 2].
    sin: Likewise.

  Returns:
    Like `x`.
  """
  first, second = jnp.split(x, 2, axis=-1)
  cos = cos[:, :, None].astype(x.dtype)
  sin = sin[:, :, None].astype(x.dtype)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )


def attention(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
  """Grouped-query attention, softmax in float32 at least.

  Args:
    query: [batch, seq, heads, head_dim].
    key: [batch, length, kv_heads, head_dim]; kv_heads divides heads.
    value: Like `key`.
    mask: Boolean [batch or 1, seq, length], true where attention is allowed.

  Returns:
    [batch, seq, heads, head_dim]. Source: arXiv 2305.13245.
  """
  b, s, h, d = query.shape
  t, kv = key.shape[1], key.shape[2]
  g = h // kv
  # The heads of a group are folded into rows: one plain matmul per kv head.
  query = (query * d**-0.5).reshape(b, s, kv, g, d)
  query = query.transpose(0, 2, 3, 1, 4).reshape(b, kv, g * s, d)
  key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
  scores = jnp.einsum("bksd,bktd->bkst", query, key).reshape(b, kv, g, s, t)
  scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
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
  block: int = 128,
) -> jax.Array:
  """Causal self-attention in blocks of queries, skipping what lies ahead.

  A block of queries meets only the keys up to its own end: no [seq, seq] score
  matrix exists, and about half of the products are never made.

  Args:
    query: [batch, seq, heads, head_dim].
    key: [batch, seq, kv_heads, head_dim].
    value: Like `key`.
    segment_ids: [batch, seq]; attention stays within a segment. Or None.
    block: Queries in a block.

  Returns:
    [batch, seq, heads, head_dim].
  """
  seq = query.shape[1]
  outputs = []
  for begin in range(0, seq, block):
    end = min(begin + block, seq)
    rows, cols = jnp.arange(begin, end), jnp.arange(end)
    mask = (rows[:, None] >= cols)[None]
    if segment_ids is not None:
      own = segment_ids[:, begin:end, None] == segment_ids[:, None, :end]
      mask = mask & own
    outputs.append(
      attention(query[:, begin:end], key[:, :end], value[:, :end], mask)
    )
  return jnp.concatenate(outputs, axis=1)
