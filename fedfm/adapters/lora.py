"""LoRA (Hu et al. 2021, arXiv 2106.09685), applied inside the layer.

  y = x W + s (x A) B,   A [in, rank],  B [rank, out],  s = alpha / rank

The base product x W never sees the adapter: under vmap over clients it stays
one matmul for all of them, with the base read once.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import errors, trees
from fedfm.adapters.adapter import Adapter, trainable_dtype
from fedfm.models import layers
from fedfm.models.model import Model

PyTree = Any
ATTENTION = ("q_proj", "v_proj")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRAKernel:
  """A kernel with its low-rank update; `layers.dense` calls `dense`."""

  kernel: Any  # shape=(..., in, out), or another kind of kernel
  a: jax.Array  # shape=(..., in, rank)
  b: jax.Array  # shape=(..., rank, out)
  scale: float = dataclasses.field(metadata={"static": True})

  def dense(self, x: jax.Array) -> jax.Array:
    """Applies the kernel to x [..., in]; returns [..., out]."""
    y = layers.dense(x, self.kernel)
    low = x @ self.a.astype(x.dtype)
    return y + self.scale * (low @ self.b.astype(x.dtype))


def lora(
  model: Model,
  *,
  rank: int,
  alpha: float | None = None,
  targets: Sequence[str] = ATTENTION,
) -> Adapter:
  """Puts a low-rank update beside the named kernels.

  Args:
    model: The model; its parameters' names are matched.
    rank: Rank of the update.
    alpha: The update is scaled by alpha / rank; default 2 * rank.
    targets: Names of kernels, such as "q_proj", or whole paths, such as
      "layers/q_proj".

  Returns:
    An `Adapter` whose trainable is {path: {"a": [..., in, rank], "b": [...,
    rank, out]}}; A starts uniform in +-1/sqrt(in) (as PEFT does), B at zero.

  Raises:
    ConfigError: A rank below 1 or above a kernel's smaller side, an alpha that
      is not above 0, or a target that names no kernel.
  """
  if isinstance(rank, bool) or not isinstance(rank, int):
    raise errors.ConfigError(f"rank: got {rank!r}, expected an integer")
  alpha = 2.0 * rank if alpha is None else float(alpha)
  paths = target_paths(model.shapes, targets)
  shapes = dict(zip(trees.paths(model.shapes), jax.tree.leaves(model.shapes)))
  for path in paths:
    smaller = min(shapes[path].shape[-2:])
    if not 1 <= rank <= smaller:
      raise errors.ConfigError(
        f"rank: got {rank}, expected 1 to {smaller} for {path} "
        f"{shapes[path].shape}"
      )
  if not 0 < alpha < math.inf:
    raise errors.ConfigError(f"alpha: got {alpha}, expected a number above 0")
  scale = alpha / rank

  def init(key, params):
    leaves = dict(zip(trees.paths(params), jax.tree.leaves(params)))
    trainable = {}
    for index, path in enumerate(paths):
      *lead, rows, cols = leaves[path].shape
      dtype = trainable_dtype(leaves[path].dtype)
      bound = 1 / math.sqrt(rows)
      trainable[path] = {
        "a": jax.random.uniform(
          jax.random.fold_in(key, index),
          (*lead, rows, rank),
          dtype,
          -bound,
          bound,
        ),
        "b": jnp.zeros((*lead, rank, cols), dtype),
      }
    return trainable

  def bind(params, trainable):
    return _replace(
      params,
      {
        path: lambda w, ab=ab: LoRAKernel(w, ab["a"], ab["b"], scale)
        for path, ab in trainable.items()
      },
    )

  def merge(params, trainable):
    def merged(w, ab):
      wide = trainable_dtype(w.dtype)
      update = scale * (ab["a"].astype(wide) @ ab["b"].astype(wide))
      return (w.astype(wide) + update).astype(w.dtype)

    return _replace(
      params,
      {p: lambda w, ab=ab: merged(w, ab) for p, ab in trainable.items()},
    )

  return Adapter(
    init=init,
    apply=lambda params, trainable, *args, **kw: model.apply(
      bind(params, trainable), *args, **kw
    ),
    merge=merge,
    bind=bind,
    kind="lora",
    config={"rank": rank, "alpha": alpha, "targets": tuple(targets)},
  )


def target_paths(shapes: PyTree, targets: Sequence[str]) -> list[str]:
  """Finds the kernels that targets name.

  Args:
    shapes: Tree of shapes.
    targets: Last path components, or whole paths.

  Returns:
    Paths, in the tree's order.

  Raises:
    ConfigError: No target, or one that names no kernel of two dimensions.
  """
  if not targets or isinstance(targets, str):
    raise errors.ConfigError(
      f"targets: got {targets!r}, expected a list of kernels' names"
    )
  kernels = [
    path
    for path, leaf in zip(trees.paths(shapes), jax.tree.leaves(shapes))
    if len(leaf.shape) >= 2 and not path.endswith(("_norm", "embed"))
  ]
  for target in targets:
    if not any(_matches(target, path) for path in kernels):
      names = {path.rsplit("/", 1)[-1] for path in kernels}
      raise errors.ConfigError(
        f"targets: no kernel is named {target!r}{errors.nearest(target, names)}"
      )
  return [p for p in kernels if any(_matches(t, p) for t in targets)]


def _matches(target: str, path: str) -> bool:
  return path == target or path.endswith("/" + target)


def _replace(params: PyTree, changes: dict[str, Any]) -> PyTree:
  """Replaces leaves by path: {path: leaf -> new leaf or subtree}."""
  leaves, treedef = jax.tree.flatten(params)
  new = [
    changes[path](leaf) if path in changes else leaf
    for path, leaf in zip(trees.paths(params), leaves)
  ]
  return treedef.unflatten(new)
