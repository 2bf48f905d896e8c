"""DoRA (Liu et al. 2024, arXiv 2402.09353): magnitude and direction apart.

  W' = m (W + s A B) / |W + s A B|,   norms and m per output channel

The norm is detached, as in the paper's section 4.3, and never forms the sum:
|W + s A B|^2 = |W|^2 + 2 s <W^T A, B> + s^2 <A^T A B, B>, per channel. So the
base is read once for all clients, as with LoRA.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fedfm.adapters import adapter as adapter_lib
from fedfm.adapters.adapter import Adapter
from fedfm.adapters.lora import ATTENTION, init_pairs, low_rank_config
from fedfm.models import layers
from fedfm.models.model import Model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DoRAKernel:
  """A kernel with a low-rank update and a magnitude per output channel."""

  kernel: Any  # shape=(..., in, out), or another kind of kernel
  a: jax.Array  # shape=(..., in, rank)
  b: jax.Array  # shape=(..., rank, out)
  magnitude: jax.Array  # shape=(..., out)
  scale: float = dataclasses.field(metadata={"static": True})

  def dense(self, x: jax.Array, bias: Any = None) -> jax.Array:
    """Applies the kernel to x [..., in]; returns [..., out]."""
    y = layers.dense(x, self.kernel)
    low = x @ self.a.astype(x.dtype)
    y = y + self.scale * (low @ self.b.astype(x.dtype))
    y = y * (self.magnitude / self._norm()).astype(x.dtype)
    return y if bias is None else y + bias.astype(x.dtype)

  def _norm(self) -> jax.Array:
    """Norm of each channel [out] of W + s A B, as a constant."""
    kernel, a, b = jax.lax.stop_gradient((self.kernel, self.a, self.b))
    base = jnp.square(layers.array(kernel).astype(b.dtype)).sum(-2)
    cross = jnp.sum(layers.dense(a.mT, kernel) * b, axis=-2)
    update = jnp.sum((a.mT @ a @ b) * b, axis=-2)
    squared = base + 2 * self.scale * cross + self.scale**2 * update
    return jnp.sqrt(jnp.maximum(squared, jnp.finfo(b.dtype).tiny))

  def array(self) -> jax.Array:
    """Returns the matrices [..., in, out] of the product."""
    kernel = layers.array(self.kernel).astype(self.b.dtype)
    moved = kernel + (self.scale * (self.a @ self.b)).reshape(kernel.shape)
    matrices = moved.reshape(*self.a.shape[:-1], -1)
    norm = jnp.linalg.norm(matrices, axis=-2, keepdims=True)
    norm = jnp.maximum(norm, jnp.finfo(norm.dtype).tiny ** 0.5)
    merged = matrices * (self.magnitude[..., None, :] / norm)
    return merged.reshape(kernel.shape)


def dora(
  model: Model,
  *,
  rank: int,
  alpha: float | None = None,
  targets: Sequence[str] = ATTENTION,
  use_rslora: bool = False,
) -> Adapter:
  """Puts a low-rank update and a magnitude on the named kernels.

  Args:
    model: The model; its kernels' names are matched.
    rank: Rank of the update.
    alpha: The update is scaled by alpha / rank; default 2 * rank.
    targets: As in `lora`.
    use_rslora: As in `lora`.

  Returns:
    An `Adapter` whose trainable is {path: {"a", "b", "magnitude": [..., out]}},
    A and B as in `lora` and the magnitude the kernel's own.

  Raises:
    ConfigError: As `lora`.
  """
  config, kernels = low_rank_config(model, rank, alpha, targets, use_rslora)

  def init(key, params):
    trainable = init_pairs(key, kernels, rank)
    known = adapter_lib.parameters(params)
    for k in kernels:
      base = layers.array(known[k.path]).reshape(*k.lead, k.rows, k.cols)
      norm = jnp.linalg.norm(base.astype(k.dtype), axis=-2)
      trainable[k.path]["magnitude"] = norm
    return trainable

  def bind(params, trainable):
    return adapter_lib.replace(
      params,
      {
        path: lambda w, t=t: DoRAKernel(w, **t, scale=config["scale"])
        for path, t in trainable.items()
      },
    )

  return adapter_lib.make_adapter(
    model,
    init=init,
    bind=bind,
    merge=adapter_lib.merge_kernels(bind, [k.path for k in kernels]),
    kind="dora",
    config=config,
  )
