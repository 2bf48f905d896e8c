"""Arithmetic on whole pytrees: norms, sums, selects."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def sub(a: PyTree, b: PyTree) -> PyTree:
  """Returns `a - b`, leaf by leaf."""
  return jax.tree.map(jnp.subtract, a, b)


def add(a: PyTree, b: PyTree) -> PyTree:
  """Returns `a + b`, leaf by leaf."""
  return jax.tree.map(jnp.add, a, b)


def scale(tree: PyTree, factor) -> PyTree:
  """Returns `factor * tree`, each leaf in its own dtype."""
  return jax.tree.map(lambda x: (x * factor).astype(x.dtype), tree)


def zeros_like(tree: PyTree) -> PyTree:
  """Returns zeros of the same shapes and dtypes."""
  return jax.tree.map(jnp.zeros_like, tree)


def select(predicate: jax.Array, on_true: PyTree, on_false: PyTree) -> PyTree:
  """Returns one of two trees by a scalar predicate; NaNs do not leak."""
  return jax.tree.map(
    lambda t, f: jnp.where(predicate, t, f), on_true, on_false
  )


def squared_norm(tree: PyTree) -> jax.Array:
  """Returns the sum of squares over all leaves, in at least float32."""
  leaves = [x for x in jax.tree.leaves(tree)]
  if not leaves:
    return jnp.zeros(())
  total: Any = sum(
    jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))))
    for x in leaves
  )
  return total


def norm(tree: PyTree) -> jax.Array:
  """Returns the L2 norm over all leaves."""
  return jnp.sqrt(squared_norm(tree))


def all_finite(tree: PyTree) -> jax.Array:
  """Returns whether every element of every floating leaf is finite."""
  ok = jnp.asarray(True)
  for x in jax.tree.leaves(tree):
    if jnp.issubdtype(x.dtype, jnp.inexact):
      ok = ok & jnp.all(jnp.isfinite(x))
  return ok


def num_elements(tree: PyTree) -> int:
  """Returns how many scalars the tree holds; works on shapes too."""
  return sum(int(x.size) for x in jax.tree.leaves(tree))


def num_bytes(tree: PyTree) -> int:
  """Returns how many bytes the tree's arrays take; works on shapes too."""
  return sum(
    int(x.size) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)
  )


def by_path(
  tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
  """Returns {name such as `layers/q_proj`: leaf}, in leaf order.

  Examples:
    >>> by_path({"a": {"b": 1}, "c": [2, 3]})
    {'a/b': 1, 'c/0': 2, 'c/1': 3}
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
  return {path_name(path): leaf for path, leaf in flat}


def path_name(path: tuple[Any, ...]) -> str:
  """Returns the name of a leaf, from the keys that jax gives to its path."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def paths(tree: PyTree) -> list[str]:
  """Returns a name per leaf such as `layers/q_proj`, in leaf order.

  Examples:
    >>> paths({"a": {"b": 1}, "c": [2, 3]})
    ['a/b', 'c/0', 'c/1']
  """
  return list(by_path(tree))


def sum_dtype(tree: PyTree) -> Any:
  """Returns float32, or float64 where the tree has it: to sum scalars in."""
  return jnp.result_type(jnp.float32, *(x.dtype for x in jax.tree.leaves(tree)))


def copy(tree: PyTree) -> PyTree:
  """Copies every leaf into a new jax array (safe to donate)."""
  return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def cast(tree: PyTree, dtype: Any) -> PyTree:
  """Casts the floating leaves; integers and keys stay."""
  return jax.tree.map(
    lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
    tree,
  )
