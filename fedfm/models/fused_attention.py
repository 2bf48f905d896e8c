"""Attention kernels of the backends, called the way `attention` is."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import sharding

_LANES = 128  # Splash works on tiles of whole TPU vector registers.
_CUDNN_HEAD_DIM = 128  # The largest that cuDNN does before Hopper.


def cannot(
  kernel: str,
  query: jax.Array,
  key: jax.Array,
  segment_ids: jax.Array | None,
  softcap: float | None,
) -> str | None:
  """Says why a kernel cannot do a case.

  Args:
    kernel: "cudnn" or "splash".
    query: [batch, seq, heads, head_dim]; only its shape and dtype matter.
    key: [batch, prefix + seq, kv_heads, head_dim]; likewise.
    segment_ids: As in `attention.causal_attention`.
    softcap: Likewise.

  Returns:
    What it cannot do, or None.
  """
  seq, head_dim = query.shape[1], query.shape[3]
  if key.shape[1] != seq:
    return "a prefix of keys"
  if kernel == "cudnn":
    if query.dtype not in (jnp.bfloat16, jnp.float16):
      return f"{query.dtype}, only bfloat16 and float16"
    if segment_ids is not None:
      return "segment ids"
    if softcap is not None:
      return "soft caps"
    if head_dim % 8 or head_dim > _CUDNN_HEAD_DIM:
      return f"heads of {head_dim}, only multiples of 8 up to {_CUDNN_HEAD_DIM}"
    return None
  if seq % _LANES:
    return f"sequences of {seq}, only multiples of {_LANES}"
  if query.dtype == jnp.float64:
    return "float64"
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    spec = _spec()
    for x, dim, axis in (
      (query, 0, spec[0]),
      (query, 2, spec[2]),
      (key, 2, spec[2]),
    ):
      if axis is not None and x.shape[dim] % mesh.shape[axis]:
        return (
          f"{x.shape[dim]} rows or heads on mesh.{axis} = {mesh.shape[axis]}"
        )
  return None


def cudnn(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  segment_ids: None = None,
  window: int | None,
  scale: float,
  softcap: None = None,
) -> jax.Array:
  """cuDNN's fused attention; see `attention.causal_attention`."""
  del segment_ids, softcap  # `cannot` has refused them.
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    scale=scale,
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
    implementation="cudnn",
  )


def splash(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  window: int | None,
  scale: float,
  softcap: float | None = None,
  interpret: bool = False,
) -> jax.Array:
  """JAX's splash attention for TPUs; see `attention.causal_attention`.

  Under a mesh each device runs the kernel on its own rows and heads: the
  compiler cannot split one by itself.

  Args:
    query: [batch, seq, heads, head_dim].
    key: [batch, seq, kv_heads, head_dim].
    value: Like `key`.
    segment_ids: [batch, seq], or None.
    window: Keys that a query meets, its own included; None for all.
    scale: Scores are multiplied by it.
    softcap: Scores become cap * tanh(scores / cap).
    interpret: Run the kernel's Python instead, on any backend.

  Returns:
    [batch, seq, heads, head_dim].
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as kernels

  seq = query.shape[1]
  mask: Any = kernels.CausalMask((seq, seq))
  if window is not None:
    mask = kernels.LocalMask((seq, seq), (window - 1, 0), 0)
  own = None if segment_ids is None else (segment_ids, segment_ids)
  return _on_devices(
    functools.partial(_splash, mask, scale, softcap, interpret),
    (query, key, value),
    own,
  )


def cudnn_full(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None,
  *,
  scale: float,
) -> jax.Array:
  """cuDNN's fused attention; see `attention.full_attention`."""
  batch, seq = query.shape[:2]
  if mask is not None:
    mask = jnp.broadcast_to(mask[:, None, None, :], (batch, 1, seq, seq))
  return jax.nn.dot_product_attention(
    query, key, value, mask=mask, scale=scale, implementation="cudnn"
  )


def splash_full(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None,
  *,
  scale: float,
  interpret: bool = False,
) -> jax.Array:
  """Splash attention of all tokens; see `attention.full_attention`.

  Padding is of another segment than what attends, and fills the last tile too;
  a row of nothing but padding attends to itself, so that it stays finite.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as kernels

  batch, seq = query.shape[:2]
  there = jnp.ones((batch, seq), bool)
  if mask is not None:
    there = jnp.broadcast_to(jnp.asarray(mask).astype(bool), (batch, seq))
  length = padded(seq)

  def pad(x):
    return jnp.pad(x, [(0, 0), (0, length - seq)] + [(0, 0)] * (x.ndim - 2))

  keys = pad(there.astype(jnp.int32))
  queries = jnp.broadcast_to(jnp.max(keys, axis=1, keepdims=True), keys.shape)
  full = kernels.FullMask((length, length))
  out = _on_devices(
    functools.partial(_splash, full, scale, None, interpret),
    (pad(query), pad(key), pad(value)),
    (queries, keys),
  )
  return out[:, :seq]


def padded(seq: int) -> int:
  """The length of whole tiles that holds a sequence."""
  return seq + -seq % _LANES


def _on_devices(run, arrays, own):
  """Runs a kernel on each device's rows and heads; `own` are segments."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return run(*arrays, own)
  spec = _spec()
  return jax.shard_map(
    run,
    in_specs=(spec, spec, spec, jax.tree.map(lambda _: jax.P(spec[0]), own)),
    out_specs=spec,
    check_vma=False,
  )(*arrays, own)


def _spec() -> jax.P:
  rules = sharding.DEFAULT_RULES
  return rules.spec(("batch", "sequence", "heads", None))


def _splash(mask, scale, softcap, interpret, query, key, value, own):
  """The kernel, on the rows and heads of one device.

  `own` is None, or the segments of the queries and of the keys [batch, seq].
  """
  from jax.experimental.pallas.ops.tpu import splash_attention as kernels

  seq, heads = query.shape[1:3]
  block = next(b for b in (512, 256, 128) if seq % b == 0)
  kernel = kernels.make_splash_mha_single_device(
    kernels.MultiHeadMask([mask] * heads),
    block_sizes=kernels.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    attn_logits_soft_cap=softcap,
    interpret=interpret,
  )
  query, key, value = (
    x.transpose(0, 2, 1, 3) for x in (query * scale, key, value)
  )
  own = None if own is None else kernels.SegmentIds(*own)
  out: Any = jax.vmap(kernel)(query, key, value, own)
  return out.transpose(0, 2, 1, 3).astype(query.dtype)
