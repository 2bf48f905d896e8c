"""Sums that neither stall nor depend on the order in which XLA adds.

A float32 that counts tokens stops counting at 2**24: adding 1 changes nothing.
These sums keep what rounding loses. A bfloat16 stops at 2**8: what is smaller
than a float32 is summed as one, and made small again after.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Wide:
  """A tree in at least float32, to sum, that knows the dtypes it had."""

  tree: PyTree
  dtypes: tuple[Any, ...] = dataclasses.field(metadata={"static": True})

  def map(self, fn: Callable[[jax.Array], Any]) -> "Wide":
    """Applies `fn` to every leaf."""
    return dataclasses.replace(self, tree=jax.tree.map(fn, self.tree))

  def narrow(self) -> PyTree:
    """Returns the tree in the dtypes it had; what were integers stay floats."""
    leaves, treedef = jax.tree.flatten(self.tree)
    return treedef.unflatten(
      x.astype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else x
      for x, dtype in zip(leaves, self.dtypes, strict=True)
    )


def widen(tree: PyTree) -> Wide:
  """Casts every leaf to at least float32.

  Args:
    tree: Arrays.

  Returns:
    The tree, `Wide`.

  Examples:
    >>> wide = widen(jnp.ones(300, jnp.bfloat16)).map(lambda x: x.sum() / 300)
    >>> wide.tree.dtype.name, wide.narrow()
    ('float32', Array(1, dtype=bfloat16))
  """
  wide = jax.tree.map(
    lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree
  )
  return Wide(tree=wide, dtypes=tuple(x.dtype for x in jax.tree.leaves(tree)))


def weighted(weights: jax.Array, tree: PyTree) -> PyTree:
  """Sums a tree over its first axis by weight, in at least float32.

  Args:
    weights: [terms].
    tree: Leaves [terms, ...].

  Returns:
    Leaves [...], of the tree's dtypes.

  Examples:
    >>> weighted(jnp.array([0.25, 0.75]), jnp.array([4.0, 8.0]))
    Array(7., dtype=float32)
  """

  def one(x):
    return jnp.tensordot(weights.astype(x.dtype), x, axes=1)

  return widen(tree).map(one).narrow()


def add(
  total: jax.Array, lost: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Adds a term to a running sum (Kahan 1965); `total` alone is the sum.

  Args:
    total: The sum so far, a float.
    lost: What rounding has added to it too much; 0 at first.
    x: The term, of the same shape.

  Returns:
    The new `(total, lost)`; the error stays at about one rounding.

  Examples:
    >>> total, lost = jnp.float32(2**24), jnp.float32(0)
    >>> for _ in range(4):
    ...   total, lost = add(total, lost, jnp.float32(1))
    >>> float(total - 2**24)
    4.0
  """
  x = x - lost
  new = total + x
  return new, (new - total) - x


def total(x: jax.Array) -> jax.Array:
  """Sums over the first axis, in pairs, with what each pair loses kept.

  Args:
    x: [terms, ...] floats.

  Returns:
    [...], with the error of about one rounding; the order of the additions is
    the same wherever the terms are.

  Examples:
    >>> float(total(jnp.ones(2**20, jnp.float32) / 3))
    349525.34375
  """
  size = 1 << max(0, len(x) - 1).bit_length()
  x = jnp.concatenate([x, jnp.zeros((size - len(x), *x.shape[1:]), x.dtype)])
  lost = jnp.zeros_like(x)
  while len(x) > 1:
    half = len(x) // 2
    a, b = x[:half], x[half:]
    x = a + b
    # Knuth's exact error of a + b, whichever is larger.
    moved = x - a
    lost = lost[:half] + lost[half:] + ((a - (x - moved)) + (b - moved))
  return x[0] + lost[0]
