"""Fewer bits a value: bfloat16, stochastic int8 and int4, E3M0.

Stochastic rounding (QSGD, arXiv 1610.02132), with the scale s of a tensor such
that its largest value takes the largest integer L:

  s = max |x| / L,   q = floor(x / s + u),  u ~ U[0, 1),   received  s q

The mean of s q over u is x: errors of many clients average out.
"""

import math

import jax
import jax.numpy as jnp

from fedfm.clients.transforms import MessageTransform
from fedfm.compression.compressor import leafwise

_SCALE_BYTES = 4
_E3M0_POWERS = 7  # Of eight exponents, one is for zero.


def bfloat16() -> MessageTransform:
  """Rounds to the nearest bfloat16: 2 bytes a value, relative error 2^-9."""
  return leafwise(
    lambda x, key: x.astype(jnp.bfloat16),
    lambda shape: 2 * math.prod(shape),
  )


def int8() -> MessageTransform:
  """Rounds stochastically to 255 levels of a tensor's range; unbiased."""
  return _stochastic(bits=8)


def int4() -> MessageTransform:
  """Rounds stochastically to 15 levels of a tensor's range; unbiased."""
  return _stochastic(bits=4)


def _stochastic(bits: int) -> MessageTransform:
  return leafwise(
    lambda x, key: stochastic_round(x, key, bits),
    lambda shape: packed_bytes(math.prod(shape), bits),
  )


def stochastic_round(x: jax.Array, key: jax.Array, bits: int) -> jax.Array:
  """Rounds to the integers of so many bits, symmetric about 0, and back.

  Args:
    x: Any shape; NaN and infinity come back as NaN, for the engine to mask.
    key: Typed key.
    bits: Of an integer, its sign included.

  Returns:
    `s q`, in the shape and dtype of `x`.
  """
  largest = 2 ** (bits - 1) - 1
  scale = jnp.max(jnp.abs(x)) / largest
  safe = jnp.where(scale == 0, 1, scale)
  noise = jax.random.uniform(key, x.shape, x.dtype)
  q = jnp.floor(x / safe + noise)
  # x / s of the largest value may round to just above L.
  return jnp.clip(q, -largest, largest) * safe


def packed_bytes(size: int, bits: int) -> int:
  """Bytes of so many integers, packed, and one float32 scale."""
  return -(-size * bits // 8) + _SCALE_BYTES


def e3m0() -> MessageTransform:
  """Rounds to a sign and one of seven powers of two, or zero: 4 bits a value.

  The format of Streaming DiLoCo's exchange (arXiv 2501.18512): 3 bits of
  exponent, none of mantissa. A tensor's largest power is the nearest to its
  largest magnitude; ties round away from zero. The sum over replicas is
  float32.
  """

  def compress(x, key):
    del key
    magnitude = jnp.abs(x)
    power = _nearest_power(magnitude)
    lowest = _nearest_power(jnp.max(magnitude)) - (_E3M0_POWERS - 1)
    value = jnp.ldexp(jnp.ones_like(x), jnp.maximum(power, lowest))
    # Below the lowest power, the nearest is it or zero.
    least = jnp.ldexp(jnp.ones((), x.dtype), lowest - 1)
    value = jnp.where(magnitude < least, 0, value)
    value = jnp.where(jnp.isfinite(x), value, jnp.nan)
    return jnp.sign(x) * value

  return leafwise(compress, lambda shape: packed_bytes(math.prod(shape), 4))


def _nearest_power(magnitude: jax.Array) -> jax.Array:
  """The p for which 2^p is nearest, exactly (a logarithm is not)."""
  mantissa, exponent = jnp.frexp(magnitude)  # mantissa in [0.5, 1)
  return exponent - 1 + (mantissa >= 0.75)
