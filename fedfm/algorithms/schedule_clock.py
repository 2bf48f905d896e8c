"""Schedules of server optimizers that step some weights in some rounds only.

Optax counts a schedule by the updates it has seen. Of parts that take turns
each would see only its own, and a rate that should fall to 0 over the rounds
would end half-way.
"""

from typing import Any

import jax
import optax

PyTree = Any


def _is_clock(x: Any) -> bool:
  return isinstance(x, optax.ScaleByScheduleState)


def at_round(state: PyTree, round_index: jax.Array) -> PyTree:
  """Sets every schedule of an optimizer to a round; other counts stay.

  Args:
    state: The optimizer's.
    round_index: int32 scalar.

  Returns:
    The state.
  """

  def one(x):
    if not _is_clock(x):
      return x
    return x._replace(count=round_index.astype(x.count.dtype))

  return jax.tree.map(one, state, is_leaf=_is_clock)


def gone_on(state: PyTree, stepped: PyTree) -> PyTree:
  """Keeps an optimizer's state but for its schedules, which have gone on.

  Args:
    state: Of an optimizer whose step does not count.
    stepped: What the step made of it.

  Returns:
    The state.
  """
  return jax.tree.map(
    lambda x, new: new if _is_clock(x) else x, state, stepped, is_leaf=_is_clock
  )
