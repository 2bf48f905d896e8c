"""Clipping: the bound on what one client can change."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import errors, trees

PyTree = Any
# Norms whose squares float32 holds.
_LEAST_NORM, _MOST_NORM = 1e-18, 1e18


def clip(message: PyTree, clip_norm: float) -> tuple[PyTree, jax.Array]:
  """Scales a message down to a norm over all of its leaves together.

  Args:
    message: A tree of floats.
    clip_norm: The largest L2 norm.

  Returns:
    The message, and whether it was longer. One of norm 0 stays 0, and so does
    what is left of one whose norm float32 does not hold.

  Examples:
    >>> clip({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, 1.0)[0]
    {'a': Array([0.6], dtype=float32), 'b': Array([0.8], dtype=float32)}
  """
  norm = trees.norm(message)
  return trees.scale(message, clip_norm / jnp.maximum(norm, clip_norm)), (
    norm > clip_norm
  )


def check_positive(name: str, value: float, zero: bool = False) -> None:
  """Checks a parameter of a mechanism.

  Args:
    name: Its name, for the message.
    value: A number.
    zero: Whether it may be 0.

  Raises:
    PrivacyError: It is negative, not finite, or 0.
  """
  if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
    least = "of at least 0" if zero else "above 0"
    raise errors.PrivacyError(
      f"{name}: got {value}, expected a finite number {least}"
    )


def check_norm(name: str, value: float) -> None:
  """Checks a norm of messages, or of the noise on them, all in float32.

  Args:
    name: Its name, for the message.
    value: A number.

  Raises:
    PrivacyError: It is not a number that float32 computes with.
  """
  check_positive(name, value)
  if not _LEAST_NORM <= value <= _MOST_NORM:
    raise errors.PrivacyError(
      f"{name}: got {value:g}, expected {_LEAST_NORM:g} to {_MOST_NORM:g}, "
      "which float32 computes with"
    )


def check_count(name: str, value: int) -> None:
  """Raises PrivacyError unless a number of clients or rounds is 1 to 2**31."""
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise errors.PrivacyError(
      f"{name}: got {value!r}, expected an integer of at least 1"
    )
  if value > 2**31:
    raise errors.PrivacyError(
      f"{name}: got {errors.short(value)}, expected at most 2**31"
    )
