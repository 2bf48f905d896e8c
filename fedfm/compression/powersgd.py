"""PowerSGD (Vogels et al. 2019, arXiv 1905.13727), a client at a time.

For a matrix M [m, n] and the Q [n, r] of the client's last message:

  P = orthonormal basis of M Q,   Q <- M' P,   received  P Q'

In the paper P and Q are summed over workers between these steps, which takes
two exchanges; here a client sends its own P and Q, in one. The weights of a
mean over clients are left to the aggregator. Tensors of more axes are stacks of
matrices; vectors are sent as they are. Biased, so with error feedback.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import errors, trees
from fedfm.clients.transforms import MessageTransform
from fedfm.compression.compressor import is_compressed

PyTree = Any
_VALUE_BYTES = 4


def power_sgd(rank: int = 4) -> MessageTransform:
  """Sends the factors of a low-rank approximation of each matrix.

  Args:
    rank: r; matrices that would not get smaller are sent as they are.

  Returns:
    A `MessageTransform` that needs error feedback; its state is every matrix's
    Q.

  Raises:
    ConfigError: A rank below 1.
  """
  if rank < 1:
    raise errors.ConfigError(f"rank: got {rank}, expected at least 1")

  def has_factors(x):
    return is_compressed(x) and x.ndim >= 2 and _factors(x.shape, rank) < x.size

  def init(message):
    leaves, treedef = jax.tree.flatten(message)
    first = []
    for index, x in enumerate(leaves):
      q: Any = ()
      if has_factors(x):
        # The same start for all: any one that is not orthogonal to M will do.
        key = jax.random.fold_in(jax.random.key(0), index)
        shape = (*x.shape[:-2], x.shape[-1], rank)
        q = jax.random.normal(key, shape, jnp.promote_types(x.dtype, "float32"))
      first.append(q)
    return treedef.unflatten(first)

  def apply(message, state, info):
    del info
    leaves, treedef = jax.tree.flatten(message)
    sent, new_state = [], []
    for x, q in zip(leaves, treedef.flatten_up_to(state)):
      if has_factors(x):
        matrix = x.astype(q.dtype)
        p, _ = jnp.linalg.qr(_multiply(matrix, q))
        new = _multiply(jnp.swapaxes(matrix, -1, -2), p)
        x = _multiply(p, jnp.swapaxes(new, -1, -2)).astype(x.dtype)
        # From a zero matrix nothing would ever grow again.
        q = jnp.where(jnp.any(new != 0), new, q)
      sent.append(x)
      new_state.append(q)
    return treedef.unflatten(sent), treedef.unflatten(new_state)

  def num_bytes(message):
    return sum(
      _VALUE_BYTES * _factors(x.shape, rank)
      if has_factors(x)
      else trees.num_bytes(x)
      for x in jax.tree.leaves(message)
    )

  return MessageTransform(apply, init, num_bytes, needs_feedback=True)


def _factors(shape: tuple[int, ...], rank: int) -> int:
  """Numbers in P and Q of all matrices of a tensor."""
  *stack, rows, columns = shape
  return math.prod(stack) * rank * (rows + columns)


def _multiply(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision="highest")
