"""Attention in tiles with an online softmax, forward and backward.

FlashAttention-2 (arXiv 2307.08691) as plain loops, for any backend: scores
exist for one tile of queries and keys at a time, so memory grows with the
length of a sequence and not with its square, and tiles that no query may see
are never made. The compiled size does not grow with the length.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedfm.models import layers

TILE = 512  # Queries and keys.


def flash_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array | None = None,
  *,
  window: Any = None,
  scale: float,
  softcap: float | None = None,
  block: int = TILE,
) -> jax.Array:
  """Causal grouped-query attention, differentiable once, in reverse mode.

  Args:
    query: [batch, seq, heads, head_dim].
    key: [batch, prefix + seq, kv_heads, head_dim]; kv_heads divides heads, and
      the prefix comes before the first query.
    value: Like `key`.
    segment_ids: [batch, seq]; attention stays within a segment and the prefix.
      Or None.
    window: Keys that a query meets, its own included: an int, an int32 scalar
      known at run time only, or None.
    scale: Scores are multiplied by it.
    softcap: Scores become cap * tanh(scores / cap).
    block: Queries and keys in a tile.

  Returns:
    [batch, seq, heads, head_dim].
  """
  prefix = key.shape[1] - query.shape[1]
  own = None
  if segment_ids is not None:
    own = segment_ids, jnp.pad(segment_ids, ((0, 0), (prefix, 0)))
  q, k, v, own = _padded(query, key, value, own, block)
  options = _Options(scale, softcap, prefix, block)
  window = jnp.asarray(k.shape[2] + 1 if window is None else window, jnp.int32)
  return _restored(_attend(options, q, k, v, own, window), query)


def flash_attention_to_cache(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  offset: jax.Array,
  *,
  window: Any = None,
  scale: float,
  softcap: float | None = None,
  block: int = TILE,
) -> jax.Array:
  """Attention to a cache that holds the queries' own keys and older ones.

  Args:
    query: [batch, seq, heads, head_dim].
    key: [batch, length, kv_heads, head_dim]; what comes after a query's own key
      is not seen.
    value: Like `key`.
    offset: int32 scalar, where the first query's own key is.
    window: As in `flash_attention`.
    scale: Likewise.
    softcap: Likewise.
    block: Likewise.

  Returns:
    [batch, seq, heads, head_dim]; not differentiable.
  """
  q, k, v, _ = _padded(query, key, value, None, block)
  options = _Options(scale, softcap, 0, block)
  window = jnp.asarray(k.shape[2] + 1 if window is None else window, jnp.int32)
  return _restored(_forward(options, q, k, v, None, window, offset)[0], query)


class _Options(NamedTuple):
  """What does not change at run time; see `flash_attention`."""

  scale: float
  softcap: float | None
  prefix: int
  block: int


def _padded(query, key, value, own, block):
  """Groups heads, and pads sequences to whole tiles.

  Args:
    query: [batch, seq, heads, head_dim].
    key: [batch, length, kv_heads, head_dim].
    value: Like `key`.
    own: Segments of queries and of keys, or None.
    block: Size of a tile; a shorter sequence is one tile.

  Returns:
    q [batch, kv, group, seq, d], k and v [batch, kv, length, d], own.
  """
  b, _, h, d = query.shape
  kv = key.shape[2]

  def pad(x):
    extra = -x.shape[1] % min(block, x.shape[1])
    return jnp.pad(x, [(0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)])

  q = pad(query).reshape(b, -1, kv, h // kv, d).transpose(0, 2, 3, 1, 4)
  k, v = (pad(x).transpose(0, 2, 1, 3) for x in (key, value))
  return q, k, v, (None if own is None else tuple(map(pad, own)))


def _restored(out: jax.Array, query: jax.Array) -> jax.Array:
  """Brings [batch, kv, group, seq, d] to the layout of `query`."""
  out = out[:, :, :, : query.shape[1]]
  return out.transpose(0, 3, 1, 2, 4).reshape(query.shape)


def _part(x: jax.Array, index: Any, size: int, axis: int) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _sizes(options: _Options, q, k) -> tuple[int, int, int, int]:
  """Rows and columns of a tile, and how many tiles there are of each."""
  s, t = q.shape[3], k.shape[2]
  bq, bk = min(options.block, s), min(options.block, t)
  return bq, bk, s // bq, t // bk


def _scores(options, qi, kj, own, i, j, window, offset):
  """Capped scores of one tile, [b, kv, g, bq, bk], and which of them exist."""
  bq, bk = qi.shape[3], kj.shape[2]
  wide = jnp.promote_types(qi.dtype, jnp.float32)
  scores = jnp.einsum("bkgqd,bktd->bkgqt", qi, kj, preferred_element_type=wide)
  scores = layers.softcap(scores * options.scale, options.softcap)
  rows = offset + i * bq + jnp.arange(bq)[:, None]
  cols = j * bk + jnp.arange(bk)
  mask = ((rows >= cols) & (rows - cols < window))[None]
  if own is not None:
    q_own, k_own = _part(own[0], i, bq, 1), _part(own[1], j, bk, 1)
    same = q_own[:, :, None] == k_own[:, None]
    mask = mask & (same | (cols < options.prefix))
  return scores, mask[:, None, None]


def _forward(options, q, k, v, own, window, offset):
  """Returns the output, like `q`, and log-sum-exp of scores [b, kv, g, s]."""
  bq, bk, num_q, num_k = _sizes(options, q, k)
  wide = jnp.promote_types(q.dtype, jnp.float32)
  least = jnp.finfo(wide).min

  def rows(i):
    qi = _part(q, i, bq, 3)

    def columns(j, carry):
      out, top, total = carry
      kj, vj = _part(k, j, bk, 2), _part(v, j, bk, 2)
      scores, mask = _scores(options, qi, kj, own, i, j, window, offset)
      scores = jnp.where(mask, scores, least)
      new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
      weights = jnp.exp(scores - new_top[..., None])
      shrink = jnp.exp(top - new_top)
      out = out * shrink[..., None] + jnp.einsum(
        "bkgqt,bktd->bkgqd",
        weights.astype(v.dtype),
        vj,
        preferred_element_type=wide,
      )
      return out, new_top, total * shrink + jnp.sum(weights, axis=-1)

    begin = offset + i * bq
    first = jnp.maximum(begin - window + 1, 0) // bk
    last = jnp.minimum((begin + bq - 1) // bk + 1, num_k)
    shape = qi.shape[:-1]
    out, top, total = jax.lax.fori_loop(
      first,
      last,
      columns,
      (
        jnp.zeros(qi.shape, wide),
        jnp.full(shape, least, wide),
        jnp.zeros(shape, wide),
      ),
    )
    # Padded queries may meet no key; they are cut off, but must be finite.
    total = jnp.maximum(total, jnp.finfo(wide).tiny)
    return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

  out, log_sum = jax.lax.map(rows, jnp.arange(num_q))
  return _joined(out, 3), _joined(log_sum, 3)


def _joined(x: jax.Array, axis: int) -> jax.Array:
  """Puts tiles [tiles, ...] one after the other along an axis of a tile."""
  x = jnp.moveaxis(x, 0, axis)
  shape = x.shape
  return x.reshape(*shape[:axis], -1, *shape[axis + 2 :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, own, window):
  return _attend_forward(options, q, k, v, own, window)[0]


def _attend_forward(options, q, k, v, own, window):
  offset = options.prefix
  out, log_sum = _forward(options, q, k, v, own, window, offset)
  return out, (q, k, v, own, window, out, log_sum)


def _attend_backward(options, residuals, d_out):
  """Gradients of q, k and v; scores are made again, a tile at a time."""
  q, k, v, own, window, out, log_sum = residuals
  offset = options.prefix
  bq, bk, num_q, num_k = _sizes(options, q, k)
  wide = log_sum.dtype
  d_out = d_out.astype(q.dtype)
  delta = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)

  def columns(d_q, j):
    kj, vj = _part(k, j, bk, 2), _part(v, j, bk, 2)

    def rows(i, carry):
      d_q, d_k, d_v = carry
      qi, d_oi = _part(q, i, bq, 3), _part(d_out, i, bq, 3)
      scores, mask = _scores(options, qi, kj, own, i, j, window, offset)
      weights = jnp.exp(scores - _part(log_sum, i, bq, 3)[..., None])
      weights = jnp.where(mask, weights, 0)
      product = functools.partial(jnp.einsum, preferred_element_type=wide)
      d_v += product("bkgqt,bkgqd->bktd", weights.astype(q.dtype), d_oi)
      d_weights = product("bkgqd,bktd->bkgqt", d_oi, vj)
      d_scores = weights * (d_weights - _part(delta, i, bq, 3)[..., None])
      if options.softcap is not None:  # The derivative of cap * tanh(x / cap).
        d_scores *= 1 - jnp.square(scores / options.softcap)
      d_scores = (d_scores * options.scale).astype(q.dtype)
      d_k += product("bkgqt,bkgqd->bktd", d_scores, qi)
      d_qi = product("bkgqt,bktd->bkgqd", d_scores, kj)
      d_qi += _part(d_q, i, bq, 3)
      d_q = jax.lax.dynamic_update_slice_in_dim(d_q, d_qi, i * bq, 3)
      return d_q, d_k, d_v

    first = jnp.maximum(j * bk - offset, 0) // bq
    end = (j + 1) * bk - 1 + window - offset  # The first query past the window.
    last = jnp.clip((end + bq - 1) // bq, first, num_q)
    zeros = jnp.zeros(kj.shape, wide)
    d_q, d_k, d_v = jax.lax.fori_loop(first, last, rows, (d_q, zeros, zeros))
    return d_q, (d_k.astype(k.dtype), d_v.astype(v.dtype))

  d_q, (d_k, d_v) = jax.lax.scan(
    columns, jnp.zeros(q.shape, wide), jnp.arange(num_k)
  )
  return d_q.astype(q.dtype), _joined(d_k, 2), _joined(d_v, 2), None, None


_attend.defvjp(_attend_forward, _attend_backward)
