"""What is done to a client's message before it leaves: clip, compress, attack.

A `MessageTransform` sees one client's message and may keep a state with the
client (such as the residual of error feedback). `transformed` puts transforms
behind the local work of a `ClientUpdate`; the engine runs them at the end of a
client, and only there.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax

from fedfm.types import ClientInfo, ClientUpdate

PyTree = Any
_TRANSFORM_KEY = 0xFFFFFFFF  # Counted down from; local steps count up from 0.


class MessageTransform(NamedTuple):
  """One step between a client's work and the aggregator.

  Attributes:
    apply: `apply(message, state, info) -> (message, state)`; `info.key` is the
      transform's own, of (seed, round, client).
    init: `init(message) -> state` of a client that never took part, from a
      message of zeros.
    num_bytes: `num_bytes(message) -> int`, what the message takes on the wire,
      from shapes alone; None where the transform changes nothing of that.
    needs_feedback: Whether it loses so much, round after round, that it needs
      error feedback.
  """

  apply: Callable[[PyTree, PyTree, ClientInfo], tuple[PyTree, PyTree]]
  init: Callable[[PyTree], PyTree] = lambda message: ()
  num_bytes: Callable[[PyTree], int] | None = None
  needs_feedback: bool = False


def transformed(
  update: ClientUpdate, *transforms: MessageTransform
) -> ClientUpdate:
  """Applies transforms, in order, to what an update sends.

  Args:
    update: The local work.
    *transforms: What follows it.

  Returns:
    A `ClientUpdate` whose client state is `(state of update, [state of each
    transform])`.
  """

  def start(broadcast, client_state, info):
    own, states = client_state
    return update.start(broadcast, own, info), states

  def step(carry, base, batch, key):
    own, states = carry
    return update.step(own, base, batch, key), states

  def finish(broadcast, carry, info):
    own, states = carry
    message, weight, client_state, metrics = update.finish(broadcast, own, info)
    new_states = []
    for index, (transform, state) in enumerate(zip(transforms, states)):
      key = jax.random.fold_in(info.key, _TRANSFORM_KEY - index)
      own = dataclasses.replace(info, key=key)
      message, state = transform.apply(message, state, own)
      new_states.append(state)
    return message, weight, (client_state, new_states), metrics

  def first(carry, base, batch, key):
    assert update.first is not None
    own, states = carry
    return update.first(own, base, batch, key), states

  return ClientUpdate(
    start, step, finish, None if update.first is None else first
  )
