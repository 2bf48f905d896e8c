"""What compressors share: leaf by leaf, keys, error feedback.

A compressor is a `MessageTransform` that gives back what the receiver would
unpack, in the shapes and dtypes of the message: the rest of the program does
not know of it, and `num_bytes` says what the packed form takes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import errors, trees
from fedfm.clients.transforms import MessageTransform

PyTree = Any
# One tensor: x (float32 or wider) and a key to what is received.
LeafFn = Callable[[jax.Array, jax.Array], jax.Array]


def leafwise(
  compress: LeafFn,
  leaf_bytes: Callable[[tuple[int, ...]], int],
  needs_feedback: bool = False,
) -> MessageTransform:
  """Compresses every tensor by itself; what is none is sent as it is.

  Args:
    compress: `compress(x, key) -> what is received`, of the same shape.
    leaf_bytes: `leaf_bytes(shape) -> bytes` that a tensor takes.
    needs_feedback: As in `MessageTransform`.

  Returns:
    A `MessageTransform` without a state.
  """

  def apply(message, state, info):
    leaves, treedef = jax.tree.flatten(message)
    sent = []
    for index, x in enumerate(leaves):
      if is_compressed(x) and x.size:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        key = jax.random.fold_in(info.key, index)
        x = compress(wide, key).astype(x.dtype)
      sent.append(x)
    return treedef.unflatten(sent), state

  def num_bytes(message):
    return sum(
      leaf_bytes(x.shape) if is_compressed(x) else trees.num_bytes(x)
      for x in jax.tree.leaves(message)
      if x.size
    )

  return MessageTransform(
    apply, num_bytes=num_bytes, needs_feedback=needs_feedback
  )


def error_feedback(compressor: MessageTransform) -> MessageTransform:
  """Adds what earlier messages lost to the next (arXiv 1901.09847).

    p = message + e,   sent = C(p),   e <- p - sent

  What was sent in all rounds and the residual e together are the sum of the
  messages: nothing is lost, only late.

  Args:
    compressor: C; one that is unbiased or loses little does without.

  Returns:
    A `MessageTransform` whose state is (e, state of the compressor): a client
    state as large as the message.
  """

  def init(message):
    floats = jax.tree.map(lambda x: x if is_compressed(x) else (), message)
    return trees.zeros_like(floats), compressor.init(message)

  def apply(message, state, info):
    residual, inner = state
    # What is sent as it is has no residual: () in its place.
    late = jax.tree.map(
      lambda x, e: x + e if is_compressed(x) else x, message, residual
    )
    sent, inner = compressor.apply(late, inner, info)
    residual = jax.tree.map(
      lambda p, s: p - s if is_compressed(p) else (), late, sent
    )
    return sent, (residual, inner)

  return MessageTransform(apply, init, compressor.num_bytes)


def uplink(compressor: MessageTransform) -> MessageTransform:
  """What a client does: error feedback where the compressor needs it."""
  if compressor.needs_feedback:
    return error_feedback(compressor)
  return compressor


def is_compressed(x: Any) -> bool:
  """Whether a leaf is compressed: neither integers nor a single number.

  A number, such as FedNova's steps, says how to read the rest of a message:
  there is nothing to gain from it, and much to lose.

  Args:
    x: An array or a shape.

  Returns:
    Whether it is a floating tensor of at least one axis.
  """
  return jnp.issubdtype(x.dtype, jnp.floating) and bool(x.shape)


def check_fraction(fraction: float) -> float:
  """Checks the share of the values that is sent.

  Args:
    fraction: The share.

  Returns:
    `fraction`.

  Raises:
    ConfigError: Out of (0, 1].
  """
  if not 0 < fraction <= 1:
    raise errors.ConfigError(f"fraction: got {fraction}, expected in (0, 1]")
  return fraction
