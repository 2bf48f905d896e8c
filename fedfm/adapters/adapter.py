"""What an adapter is: which weights clients train, and how they are applied."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any


class Adapter(NamedTuple):
  """Trainable weights beside, instead of, or among a model's parameters.

  Attributes:
    init: `init(key, params) -> trainable`, float32.
    apply: `apply(params, trainable, *args, **kw)`: `model.apply` with the
      trainable second.
    merge: `merge(params, trainable) -> params` that need no adapter.
    bind: `bind(params, trainable) -> params` for `model.apply`, whose adapted
      kernels carry their adapter with them.
    kind: "lora", "full", "head", ...
    config: What `init` was built with, for files and messages.
  """

  init: Callable[[jax.Array, PyTree], PyTree]
  apply: Callable[..., Any]
  merge: Callable[[PyTree, PyTree], PyTree]
  bind: Callable[[PyTree, PyTree], PyTree]
  kind: str
  config: dict[str, Any]


def trainable_dtype(dtype: Any) -> Any:
  """Trainables are float32, or wider where the parameter is."""
  return jnp.promote_types(dtype, jnp.float32)


def loss_apply(adapter: Adapter) -> Callable[..., Any]:
  """Swaps to the order of a loss: `apply(trainable, base, *args)`."""
  return lambda trainable, base, *args, **kw: adapter.apply(
    base, trainable, *args, **kw
  )
