"""The pieces of a layer; kernels may be arrays or adapted kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def dense(x: jax.Array, kernel: Any, bias: Any = None) -> jax.Array:
  """Applies a kernel [in, out] to x [..., in], in x's dtype.

  Args:
    x: [..., in].
    kernel: An array [in, out], or an object with `dense(x, bias)`: an adapter's
      or a quantised kernel brings its own product.
    bias: [out] or None. An adapter may act on what includes it (IA3).

  Returns:
    [..., out].
  """
  if hasattr(kernel, "dense"):
    return kernel.dense(x, bias)
  y = x @ kernel.astype(x.dtype)
  return y if bias is None else y + bias.astype(x.dtype)


def array(kernel: Any) -> jax.Array:
  """Returns the matrix [..., in, out] that a kernel multiplies by.

  Args:
    kernel: An array, or an object with `array()`.

  Returns:
    An array.
  """
  return kernel.array() if hasattr(kernel, "array") else kernel


def is_kernel(x: Any) -> bool:
  """Whether `x` is a kernel object: a leaf to those that go by parameter."""
  return hasattr(x, "dense")


def rms_norm(
  x: jax.Array, scale: jax.Array, epsilon: float, unit_offset: bool = False
) -> jax.Array:
  """Root-mean-square norm over the last axis, computed in float32 at least.

  Args:
    x: [..., width].
    scale: [width].
    epsilon: Added to the mean square.
    unit_offset: Whether to multiply by `1 + scale` (Gemma).

  Returns:
    [..., width], in x's dtype. Source: arXiv 1910.07467.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  normed = wide * jax.lax.rsqrt(mean_square + epsilon)
  scale = scale.astype(wide.dtype)
  return (normed * (1 + scale if unit_offset else scale)).astype(x.dtype)


def layer_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
  """Norm of mean and variance over the last axis, in float32 at least.

  Args:
    x: [..., width].
    scale: [width].
    bias: [width].
    epsilon: Added to the variance.

  Returns:
    [..., width], in x's dtype. Source: arXiv 1607.06450.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  normed = centred * jax.lax.rsqrt(variance + epsilon)
  scale, bias = scale.astype(wide.dtype), bias.astype(wide.dtype)
  return (normed * scale + bias).astype(x.dtype)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
  """Bounds values smoothly to (-cap, cap); None leaves them."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def split_stack(stack: PyTree) -> list[PyTree]:
  """Splits leaves [layers, ...]; its transpose is one concatenate, not n pads.

  Args:
    stack: A tree of arrays with the same leading axis.

  Returns:
    A tree per layer.
  """
  leaves, treedef = jax.tree.flatten(stack)
  n = leaves[0].shape[0]
  parts = [[p[0] for p in jax.lax.split(x, [1] * n, axis=0)] for x in leaves]
  return [treedef.unflatten(layer) for layer in zip(*parts)]


ACTIVATIONS = {
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's.
}
