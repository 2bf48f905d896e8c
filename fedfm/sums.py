"""Sums that neither stall nor depend on the order in which XLA adds.

A float32 that counts tokens stops counting at 2**24: adding 1 changes nothing.
These sums keep what rounding loses.
"""

import jax
import jax.numpy as jnp


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
