"""Kernel objects in the dense layers of a user's own Flax modules.

A layer that finds a kernel object in its kernel's place gives it the inputs and
the bias, and its own product (its precision, its `dot_general`) to use on the
base. So an adapter does there what it does in our own models, and under vmap
over clients the base's product stays one matmul.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fedfm.models import layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModuleKernel:
  """A module's kernel as a matrix, applied as the module applies it."""

  kernel: jax.Array  # shape=(in, out)
  product: Callable[..., jax.Array] = dataclasses.field(
    metadata={"static": True}
  )

  def dense(self, x: jax.Array, bias: Any = None) -> jax.Array:
    """Applies the kernel to x [..., in]; returns [..., out]."""
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    y = self.product(x, self.kernel.astype(x.dtype), dims)
    return y if bias is None else y + bias.astype(x.dtype)

  def array(self) -> jax.Array:
    """Returns the matrix [in, out]."""
    return self.kernel


def base_of(kernel: Any) -> Any:
  """Returns what an adapter's kernels were put around."""
  while hasattr(kernel, "kernel"):
    kernel = kernel.kernel
  return kernel


def apply_kernel(
  kernel: Any,
  x: jax.Array,
  bias: jax.Array | None,
  *,
  axis: Sequence[int],
  features: Sequence[int],
  promote: Callable[..., Any],
  product: Callable[..., jax.Array],
) -> jax.Array:
  """Does what a dense layer does, with a kernel object.

  Args:
    kernel: The object.
    x: Inputs.
    bias: [*features] or None.
    axis: Axes of `x` that the layer contracts.
    features: The layer's outputs.
    promote: `promote(x, kernel, bias)` to the dtype that the layer computes in.
    product: `product(x, kernel, dims)`, the layer's `dot_general`.

  Returns:
    The other axes of `x`, then `features`.
  """
  rows, cols = math.prod(x.shape[a] for a in axis), math.prod(features)
  # Only its dtype counts: the kernel is cast where it is used.
  like = jnp.zeros((), base_of(kernel).dtype)
  x, _, bias = promote(x, like, bias)
  x = jnp.moveaxis(x, axis, range(-len(axis), 0))
  lead = x.shape[: x.ndim - len(axis)]
  kernel = _around(
    kernel, lambda w: ModuleKernel(w.reshape(rows, cols), product)
  )
  bias = None if bias is None else bias.reshape(cols)
  y = layers.dense(x.reshape(*lead, rows), kernel, bias)
  return y.reshape(*lead, *features)


def _around(kernel: Any, wrap: Callable[[jax.Array], Any]) -> Any:
  """Replaces the array at the bottom of an adapter's kernels."""
  if hasattr(kernel, "kernel"):
    return dataclasses.replace(kernel, kernel=_around(kernel.kernel, wrap))
  return kernel if layers.is_kernel(kernel) else wrap(kernel)
