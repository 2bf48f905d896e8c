"""A few values at full precision: top-k, random-k.

Both lose most of a message and are used with error feedback, which the client
keeps (arXiv 1809.07599, 1901.09847). A tensor of n values sends
ceil(fraction n).
"""

import math

import jax
import jax.numpy as jnp

from fedfm.clients.transforms import MessageTransform
from fedfm.compression.compressor import check_fraction, leafwise

_VALUE_BYTES, _INDEX_BYTES, _SEED_BYTES = 4, 4, 4


def top_k(fraction: float = 0.01) -> MessageTransform:
  """Sends each tensor's largest values, with their indices.

  Args:
    fraction: Share of the values, in (0, 1].

  Returns:
    A `MessageTransform` that needs error feedback.

  Raises:
    ConfigError: A fraction out of range.
  """
  check_fraction(fraction)

  def compress(x, key):
    del key
    flat = x.reshape(-1)
    _, kept = jax.lax.top_k(jnp.abs(flat), _count(x.shape, fraction))
    return _only(flat, kept).reshape(x.shape)

  return leafwise(
    compress,
    lambda shape: (_VALUE_BYTES + _INDEX_BYTES) * _count(shape, fraction),
    needs_feedback=True,
  )


def random_k(fraction: float = 0.01) -> MessageTransform:
  """Sends values at random places, which a seed tells the server.

  Args:
    fraction: Share of the values, in (0, 1].

  Returns:
    A `MessageTransform` that needs error feedback; values are not scaled up.

  Raises:
    ConfigError: A fraction out of range.
  """
  check_fraction(fraction)

  def compress(x, key):
    flat = x.reshape(-1)
    draws = jax.random.uniform(key, flat.shape)
    _, kept = jax.lax.top_k(draws, _count(x.shape, fraction))
    return _only(flat, kept).reshape(x.shape)

  return leafwise(
    compress,
    lambda shape: _VALUE_BYTES * _count(shape, fraction) + _SEED_BYTES,
    needs_feedback=True,
  )


def _count(shape, fraction: float) -> int:
  return math.ceil(fraction * math.prod(shape))


def _only(flat: jax.Array, kept: jax.Array) -> jax.Array:
  return jnp.zeros_like(flat).at[kept].set(flat[kept])
