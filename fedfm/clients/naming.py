"""Which clients of a round were bad, beside how many."""

from collections.abc import Callable
import contextvars
import functools

_ON = contextvars.ContextVar("naming_clients", default=False)


def naming_clients(fn: Callable) -> Callable:
  """Makes a round add `clients/nonfinite_mask`, [clients] bool, to its metrics.

  Args:
    fn: A `FederatedAlgorithm.round`; jit what comes back.

  Returns:
    The same function. The mask is in the cohort's order, that of the ids which
    were packed.
  """

  @functools.wraps(fn)
  def traced(*args, **kwargs):
    token = _ON.set(True)
    try:
      return fn(*args, **kwargs)
    finally:
      _ON.reset(token)

  return traced


def is_on() -> bool:
  """Whether the round that is being traced is to name its bad clients."""
  return _ON.get()
