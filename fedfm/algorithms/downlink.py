"""The way down, compressed: every client hears the same, and errors return.

The server keeps what the clients know, k, and sends only the compressed change
of what it broadcasts, b (EF21-P, arXiv 2209.15218; DoubleSqueeze, arXiv
1905.05957):

  k <- k + C(b - k)

What the compressor C loses stays in b - k, and so is part of the next change:
this is error feedback without a residual of its own. At the start k = b: the
initial weights are known. A client that missed rounds is taken to have heard
them all.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedfm import trees
from fedfm.clients.transforms import MessageTransform
from fedfm.types import ClientInfo

PyTree = Any


def init(downlink: MessageTransform | None, broadcast: PyTree) -> PyTree:
  """Returns what clients know before the first round.

  Args:
    downlink: The compressor, or None for none.
    broadcast: What the server would send.

  Returns:
    (k, state of the compressor), or ().
  """
  if downlink is None:
    return ()
  zeros = trees.zeros_like(broadcast)
  return trees.copy(broadcast), downlink.init(zeros)


def send(
  downlink: MessageTransform | None,
  broadcast: PyTree,
  sent: PyTree,
  key: jax.Array,
  round_index: jax.Array,
) -> tuple[PyTree, PyTree]:
  """Tells all clients the compressed change of the broadcast.

  Args:
    downlink: The compressor, or None for none.
    broadcast: What the server would send; integers are sent as they are.
    sent: From `init`, or of the round before.
    key: Typed key of (seed, round).
    round_index: int32 scalar.

  Returns:
    (what every client starts from, `sent` of this round).
  """
  if downlink is None:
    return broadcast, ()
  known, memory = sent
  change = jax.tree.map(
    lambda new, old: new - old if _is_float(new) else new, broadcast, known
  )
  heard, memory = downlink.apply(change, memory, _server(key, round_index))
  known = jax.tree.map(
    lambda old, c: (old + c).astype(old.dtype) if _is_float(old) else c,
    known,
    heard,
  )
  return known, (known, memory)


def _is_float(x: jax.Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.inexact)


def _server(key, round_index) -> ClientInfo:
  """The server as the sender: a compressor reads its key alone."""
  zero = jnp.zeros((), jnp.int32)
  return ClientInfo(
    key=key,
    round=round_index,
    row=zero,
    num_examples=zero,
    num_steps=zero,
    weight=jnp.ones(()),
    rate=jnp.ones(()),
  )
