"""What LoRA aggregation leaves in the base: kept beside it, never in it.

The base is frozen and shared, and may be quantised. What an algorithm adds to
its kernels lives in `ServerState.extra`, so that it is checkpointed with the
rest, and meets the base in `effective_base`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedfm import errors
from fedfm.adapters.lora import LoRAKernel
from fedfm.algorithms import low_rank

PyTree = Any
Change = dict[str, Any]
RESIDUALS = ("dense", "low_rank")


class BaseChange(NamedTuple):
  """A sum of products, kernel by kernel.

  Attributes:
    init: `init(trainable) -> change`, zero, {path: ...} with a trainable's
      paths.
    add: `add(change, {path: pair}) -> change`.
    apply: `apply(base, change) -> base` with changed kernels.
    added: `added(change, earlier) -> {path: pair or array}`, what came in
      between.
  """

  init: Callable[[PyTree], Change]
  add: Callable[[Change, Mapping[str, low_rank.Pair]], Change]
  apply: Callable[[PyTree, Change], PyTree]
  added: Callable[[Change, Change], dict[str, Any]]


def base_change(residual: str, residual_rank: int) -> BaseChange:
  """Chooses how the change is kept.

  Args:
    residual: "dense", a matrix a kernel, exact; or "low_rank", a pair beside
      the kernel, which may then be quantised.
    residual_rank: Rank of these pairs; read for "low_rank" only.

  Returns:
    A `BaseChange`.

  Raises:
    ConfigError: An unknown residual, or a rank below 1.
  """
  if residual not in RESIDUALS:
    raise errors.ConfigError(
      f"residual: got {residual!r}{errors.nearest(residual, RESIDUALS)}"
    )
  if residual == "dense":
    return _dense()
  if residual_rank < 1:
    raise errors.ConfigError(
      f"residual_rank: got {residual_rank}, expected at least 1 for residual "
      "'low_rank'"
    )
  return _low_rank(residual_rank)


def _dense() -> BaseChange:
  def init(trainable):
    return {
      path: jnp.zeros(
        (*pair["a"].shape[:-1], pair["b"].shape[-1]), pair["a"].dtype
      )
      for path, pair in low_rank.pairs_of(trainable).items()
    }

  def add(change, products):
    return {
      p: x + products[p]["a"] @ products[p]["b"] for p, x in change.items()
    }

  def apply(base, change):
    def one(kernel, path):
      if hasattr(kernel, "dense"):
        raise errors.ConfigError(
          f"residual: got 'dense', but kernel {path} of the base is a "
          f"{type(kernel).__name__}: expected 'low_rank'"
        )
      # Added at full precision, then rounded once: small changes add up.
      added = change[path].reshape(kernel.shape)
      return (kernel.astype(added.dtype) + added).astype(kernel.dtype)

    return _map_kernels(one, base, change)

  def added(change, earlier):
    return {path: x - earlier[path] for path, x in change.items()}

  return BaseChange(init, add, apply, added)


def _low_rank(rank: int) -> BaseChange:
  def init(trainable):
    change = {}
    for path, pair in low_rank.pairs_of(trainable).items():
      *lead, rows, _ = pair["a"].shape
      cols = pair["b"].shape[-1]
      if rank > min(rows, cols):
        raise errors.ConfigError(
          f"residual_rank: got {rank}, expected 1 to {min(rows, cols)} for "
          f"{path} {(*lead, rows, cols)}"
        )
      dtype = pair["a"].dtype
      change[path] = {
        "a": jnp.zeros((*lead, rows, rank), dtype),
        "b": jnp.zeros((*lead, rank, cols), dtype),
      }
    return change

  def add(change, products):
    return {
      path: low_rank.truncate(low_rank.concat(pair, products[path]), rank)
      for path, pair in change.items()
    }

  def apply(base, change):
    def one(kernel, path):
      return LoRAKernel(kernel, change[path]["a"], change[path]["b"], 1.0)

    return _map_kernels(one, base, change)

  def added(change, earlier):
    return {
      path: low_rank.concat(pair, low_rank.scaled(earlier[path], -1))
      for path, pair in change.items()
    }

  return BaseChange(init, add, apply, added)


def _map_kernels(fn: Callable, base: PyTree, change: Change) -> PyTree:
  """Replaces the kernels that pairs are named after by `fn(kernel, path)`."""
  flat, treedef = jax.tree_util.tree_flatten_with_path(
    base, is_leaf=lambda x: hasattr(x, "dense")
  )
  names = [
    jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat
  ]
  kernels = [kernel for _, kernel in flat]
  for path in change:
    if path not in names:
      raise errors.ConfigError(
        f"trainable: LoRA pair {path!r} names no kernel of the base"
        f"{errors.nearest(path, names)}"
      )
    index = names.index(path)
    kernels[index] = fn(kernels[index], path)
  return treedef.unflatten(kernels)
