"""Rounds sent to the device, one or several a program, told apart afterwards.

Starting a program and fetching its metrics takes a millisecond or so, which a
round of a small model on an accelerator may not. Several rounds give the
numbers of as many dispatches of one, to float rounding.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from fedfm import algorithms, clients
from fedfm.types import ServerState

PyTree = Any


class Outcome(NamedTuple):
  """What a round brought, on the host.

  Attributes:
    metrics: Arrays by name.
    sizes: Bytes that a client sends and is sent.
  """

  metrics: dict[str, Any]
  sizes: tuple[int, int]


class Spans:
  """The rounds of each dispatch: [first, last), split at multiples of `each`.

  None is made before it is asked for, as there may be millions.

  Examples:
    >>> list(Spans(2, 9, 3))
    [range(2, 3), range(3, 6), range(6, 9)]
  """

  def __init__(self, first: int, last: int, each: int):
    """Splits rounds.

    Args:
      first: Rounds done.
      last: Rounds of the run.
      each: Rounds a dispatch.
    """
    self._rounds = range(first, last)
    self._begins = range(0)
    if first < last:
      self._begins = range(first // each * each, last, each)

  def __len__(self) -> int:
    return len(self._begins)

  def __iter__(self) -> Iterator[range]:
    return map(self.__getitem__, range(len(self)))

  def __getitem__(self, index: int) -> range:
    begin, rounds = self._begins[index], self._rounds
    end = begin + self._begins.step
    return range(max(begin, rounds.start), min(end, rounds.stop))


def many_rounds(round_fn: Callable[..., Any]) -> Callable[..., Any]:
  """Makes several rounds one program; what they bring is read by `outcomes`.

  Args:
    round_fn: `round(state, base, cohort) -> (state, metrics)`.

  Returns:
    `rounds(state, base, cohorts) -> (state, (metrics, scalars))`, each leaf
    [rounds, ...]. Metrics name bad clients; the scalars are those of the states
    that the rounds began with.
  """

  def one(state, base, cohort):
    new_state, metrics = round_fn(state, base, cohort)
    return new_state, (metrics, _scalars(state))

  return clients.naming_clients(algorithms.many_rounds(one))


def _scalars(state: ServerState) -> list[Any]:
  return [x for x in jax.tree.leaves(state) if not x.shape]


def outcomes(
  values: PyTree,
  state: ServerState,
  bytes_per_client: Callable[[ServerState], tuple[int, int]],
) -> list[Outcome]:
  """Tells the rounds of a program of `many_rounds` apart.

  Args:
    values: The metrics and scalars, on the host.
    state: Shapes of a state.
    bytes_per_client: Of `FederatedAlgorithm`; what is sent may differ by round,
      and where it does, scalars of the state say how.

  Returns:
    An outcome a round.
  """
  metrics, scalars = values
  leaves, treedef = jax.tree.flatten(state)
  results = []
  for index in range(len(jax.tree.leaves(metrics)[0])):
    own = iter(scalars)
    began = treedef.unflatten(
      x if x.shape else next(own)[index] for x in leaves
    )
    results.append(
      Outcome(
        {name: x[index] for name, x in metrics.items()},
        bytes_per_client(began),
      )
    )
  return results


def shapes(state: ServerState) -> ServerState:
  """Returns the shapes of a state, which outlive its donation."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def divided(times: dict[str, Any], count: int) -> list[dict[str, Any]]:
  """Divides what a dispatch took among its rounds.

  Args:
    times: From `goodput.Clock.take`.
    count: Rounds.

  Returns:
    The same for each round; whole numbers, such as compilations, are all of the
    first.

  Examples:
    >>> divided({"time/round_seconds": 3.0, "time/compilations": 1}, 2)[1]
    {'time/round_seconds': 1.5, 'time/compilations': 0}
  """

  def share(value, index):
    if isinstance(value, int):
      return value if index == 0 else 0
    return value / count

  return [
    {name: share(value, index) for name, value in times.items()}
    for index in range(count)
  ]
