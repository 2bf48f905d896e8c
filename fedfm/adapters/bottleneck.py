"""Bottleneck adapters: a small MLP after a sublayer, added to its output.

  y = f(x) + act(f(x) D + d) U + u

Houlsby et al. 2019 (arXiv 1902.00751) put one after attention and one after
the MLP of every layer, Pfeiffer et al. 2020 (arXiv 2005.00247) after the MLP.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import errors
from fedfm.adapters import adapter as adapter_lib
from fedfm.adapters.adapter import Adapter
from fedfm.models import layers
from fedfm.models.model import Model

_ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BottleneckKernel:
  """A sublayer's last kernel, with a bottleneck after it."""

  kernel: Any  # shape=(..., in, out), or another kind of kernel
  down: jax.Array  # shape=(..., out, size)
  down_bias: jax.Array  # shape=(..., size)
  up: jax.Array  # shape=(..., size, out)
  up_bias: jax.Array  # shape=(..., out)
  activation: str = dataclasses.field(metadata={"static": True})

  def dense(self, x: jax.Array, bias: Any = None) -> jax.Array:
    """Applies the kernel to x [..., in]; returns [..., out]."""
    y = layers.dense(x, self.kernel, bias)
    inner = layers.dense(y, self.down, self.down_bias)
    inner = _ACTIVATIONS[self.activation](inner)
    return y + layers.dense(inner, self.up, self.up_bias)


def houlsby(
  model: Model,
  *,
  size: int = 16,
  targets: tuple[str, ...] = ("o_proj", "down_proj"),
) -> Adapter:
  """Puts a bottleneck with GELU after attention and after the MLP.

  Args:
    model: The model; its kernels' names are matched.
    size: Width of the bottleneck.
    targets: The last kernels of the two sublayers, named as in `lora`.

  Returns:
    An `Adapter` whose trainable is {path: {"down": [..., out, size],
    "down_bias", "up": [..., size, out], "up_bias"}}. "up" starts at zero, so
    that the model starts as it was.

  Raises:
    ConfigError: A size below 1, or a target that names no kernel.
  """
  return _bottleneck(model, size, targets, "gelu", "houlsby")


def pfeiffer(
  model: Model, *, size: int = 16, targets: tuple[str, ...] = ("down_proj",)
) -> Adapter:
  """Puts a bottleneck with ReLU after the MLP.

  Args:
    model: The model; its kernels' names are matched.
    size: Width of the bottleneck.
    targets: The MLP's last kernel, named as in `lora`.

  Returns:
    As `houlsby`.

  Raises:
    ConfigError: As `houlsby`.
  """
  return _bottleneck(model, size, targets, "relu", "pfeiffer")


def _bottleneck(
  model: Model, size: int, targets: Sequence[str], activation: str, kind: str
) -> Adapter:
  if size < 1:
    raise errors.ConfigError(f"size: got {size}, expected at least 1")
  kernels = adapter_lib.target_kernels(model, targets)

  def init(key, params):
    del params
    trainable = {}
    for index, k in enumerate(kernels):
      bound = 1 / math.sqrt(k.cols)
      trainable[k.path] = {
        "down": jax.random.uniform(
          jax.random.fold_in(key, index),
          (*k.lead, k.cols, size),
          k.dtype,
          -bound,
          bound,
        ),
        "down_bias": jnp.zeros((*k.lead, size), k.dtype),
        "up": jnp.zeros((*k.lead, size, k.cols), k.dtype),
        "up_bias": jnp.zeros((*k.lead, k.cols), k.dtype),
      }
    return trainable

  def bind(params, trainable):
    return adapter_lib.replace(
      params,
      {
        path: lambda w, t=t: BottleneckKernel(w, **t, activation=activation)
        for path, t in trainable.items()
      },
    )

  return adapter_lib.make_adapter(
    model,
    init=init,
    bind=bind,
    merge=None,
    kind=kind,
    config={"size": size, "targets": tuple(targets)},
  )
