"""Random rotation before quantising (Suresh et al. 2017, arXiv 1611.00429).

A rotation spreads a few large values over all: y = H D x / sqrt(d), with H a
Hadamard matrix and D random signs, in blocks of d. The range of y is smaller,
and with it the error of stochastic rounding; the receiver rotates back. The
signs come from a seed, so that only y's integers and scale are sent.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from fedfm import errors
from fedfm.clients.transforms import MessageTransform
from fedfm.compression import quantise
from fedfm.compression.compressor import leafwise

_BLOCK = 1024
_SEED_BYTES = 4


def rotation(bits: int = 4) -> MessageTransform:
  """Rotates each tensor in blocks and rounds stochastically; unbiased.

  Args:
    bits: Of an integer, 2 to 8.

  Returns:
    An unbiased `MessageTransform`.

  Raises:
    ConfigError: Bits out of range.
  """
  if not 2 <= bits <= 8:
    raise errors.ConfigError(f"bits: got {bits}, expected 2 to 8")

  def compress(x, key):
    flat = x.reshape(-1)
    size, block = flat.size, _block(flat.size)
    flat = jnp.pad(flat, (0, -size % block)).reshape(-1, block)
    signs_key, noise_key = jax.random.split(key)
    signs = jax.random.rademacher(signs_key, flat.shape, x.dtype)
    matrix = jnp.asarray(_hadamard(block) / math.sqrt(block), x.dtype)
    multiply = functools.partial(jnp.matmul, precision="highest")
    y = multiply(flat * signs, matrix)
    y = quantise.stochastic_round(y, noise_key, bits)
    # The matrix is symmetric and its own inverse.
    return (signs * multiply(y, matrix)).reshape(-1)[:size].reshape(x.shape)

  def leaf_bytes(shape):
    size = math.prod(shape)
    padded = size + -size % _block(size)
    return quantise.packed_bytes(padded, bits) + _SEED_BYTES

  return leafwise(compress, leaf_bytes)


def _block(size: int) -> int:
  """The smallest power of two that holds the tensor, at most 1024."""
  return min(_BLOCK, 1 << max(0, size - 1).bit_length())


@functools.cache
def _hadamard(size: int) -> np.ndarray:
  matrix = np.ones((1, 1))
  while len(matrix) < size:
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  return matrix
