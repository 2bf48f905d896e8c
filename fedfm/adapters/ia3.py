"""IA3 (Liu et al. 2022, arXiv 2205.05638): learned factors on activations.

y = (x W + bias) l,  or  y = (x l) W + bias  on the MLP's inner activations
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import errors
from fedfm.adapters import adapter as adapter_lib
from fedfm.adapters.adapter import Adapter
from fedfm.models import layers
from fedfm.models.model import Model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledKernel:
  """A kernel whose inputs or outputs are multiplied by learned factors."""

  kernel: Any  # shape=(..., in, out), or another kind of kernel
  factor: jax.Array  # shape=(..., in) or (..., out)
  on_inputs: bool = dataclasses.field(metadata={"static": True})

  def dense(self, x: jax.Array, bias: Any = None) -> jax.Array:
    """Applies the kernel to x [..., in]; returns [..., out]."""
    factor = self.factor.astype(x.dtype)
    if self.on_inputs:
      return layers.dense(x * factor, self.kernel, bias)
    return layers.dense(x, self.kernel, bias) * factor

  def array(self) -> jax.Array:
    """Returns the kernel with its factors multiplied in."""
    kernel = layers.array(self.kernel)
    lead = self.factor.shape[:-1]
    axes = (..., None) if self.on_inputs else (..., None, slice(None))
    if self.on_inputs:
      matrices = kernel.reshape(*lead, self.factor.shape[-1], -1)
    else:
      matrices = kernel.reshape(*lead, -1, self.factor.shape[-1])
    return (matrices * self.factor[axes]).reshape(kernel.shape)


def ia3(
  model: Model,
  *,
  targets: tuple[str, ...] = ("k_proj", "v_proj", "down_proj"),
  feedforward: tuple[str, ...] = ("down_proj",),
) -> Adapter:
  """Rescales keys, values and the MLP's inner activations.

  Args:
    model: The model; its kernels' names are matched.
    targets: Kernels whose outputs (with their bias) are rescaled, named as in
      `lora`.
    feedforward: Those of them whose inputs are rescaled instead.

  Returns:
    An `Adapter` whose trainable is {path: factors [..., in or out]}, all 1 at
    the start.

  Raises:
    ConfigError: A target that names no kernel.
  """
  kernels = adapter_lib.target_kernels(model, targets)
  inner = []
  if feedforward:
    inner = [
      k.path
      for k in adapter_lib.target_kernels(model, feedforward, "feedforward")
    ]
  for path in inner:
    if path not in [k.path for k in kernels]:
      raise errors.ConfigError(
        f"feedforward: {path} is not among the targets {tuple(targets)}"
      )

  def init(key, params):
    del key, params
    return {
      k.path: jnp.ones(
        (*k.lead, k.rows if k.path in inner else k.cols), k.dtype
      )
      for k in kernels
    }

  def bind(params, trainable):
    return adapter_lib.replace(
      params,
      {
        path: lambda w, f=f, path=path: ScaledKernel(w, f, path in inner)
        for path, f in trainable.items()
      },
    )

  merge_kernels = adapter_lib.merge_kernels(bind, [k.path for k in kernels])

  def merge(params, trainable):
    known = adapter_lib.parameters(params)
    changes = {}
    for path, factor in trainable.items():
      bias = adapter_lib.bias_of(path, known)
      if bias is not None and path not in inner:
        changes[bias] = lambda b, f=factor: (b * f.reshape(b.shape)).astype(
          b.dtype
        )
    return adapter_lib.replace(merge_kernels(params, trainable), changes)

  return adapter_lib.make_adapter(
    model,
    init=init,
    bind=bind,
    merge=merge,
    kind="ia3",
    config={"targets": tuple(targets), "feedforward": tuple(inner)},
  )
