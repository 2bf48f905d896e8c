"""One bit a value: EF-signSGD (Karimireddy et al. 2019, arXiv 1901.09847).

received = mean |x| * sign(x), a scale for each tensor
"""

import math

import jax.numpy as jnp

from fedfm.clients.transforms import MessageTransform
from fedfm.compression.compressor import leafwise
from fedfm.compression.quantise import packed_bytes


def sign() -> MessageTransform:
  """Sends signs and each tensor's mean magnitude; needs error feedback.

  Returns:
    A `MessageTransform` that needs error feedback; zero counts as positive, as
    a bit has no third value.
  """

  def compress(x, key):
    del key
    return jnp.where(x >= 0, 1, -1) * jnp.mean(jnp.abs(x))

  return leafwise(
    compress,
    lambda shape: packed_bytes(math.prod(shape), 1),
    needs_feedback=True,
  )
