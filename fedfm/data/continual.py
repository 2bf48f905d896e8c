"""Populations that change over rounds: clients arrive, their data drifts.

A `Schedule` says who is there in a round and what each holds then. The
population itself, and with it every client's row in a store, stays the same.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from fedfm import errors
from fedfm.data import sampling
from fedfm.data.source import ClientSource, Examples, subset

SCHEDULES = ("static", "arrivals", "phases")


class Schedule(NamedTuple):
  """A population over rounds; pure functions of the round.

  Attributes:
    source: `source(round)`: all clients of the population, with what they hold
      in that round.
    present: `present(round)`: ids of those that are there and hold something.
    evals: `evals(populations)` by name: the populations to evaluate on, with
      those that tell what is forgotten.
  """

  source: Callable[[int], ClientSource]
  present: Callable[[int], list[str]]
  evals: Callable[[Mapping[str, ClientSource]], Mapping[str, ClientSource]] = (
    lambda populations: populations
  )


def static(source: ClientSource) -> Schedule:
  """Every client is there in every round, with all of its data."""
  return Schedule(lambda round_index: source, lambda round_index: [*source.ids])


def arrivals(source: ClientSource, *, rounds: int, seed: int = 0) -> Schedule:
  """Lets clients arrive one after the other, in random order, and stay.

  Args:
    source: The population.
    rounds: Rounds over which they arrive, evenly; the first is there at once.
    seed: In [0, 2**32).

  Returns:
    A `Schedule`.

  Raises:
    ConfigError: No round.

  Examples:
    >>> from fedfm.data.source import from_arrays
    >>> four = from_arrays({c: {"x": [1]} for c in "abcd"})
    >>> schedule = arrivals(four, rounds=2)
    >>> [len(schedule.present(r)) for r in range(4)]
    [1, 3, 4, 4]
  """
  _check("rounds", rounds)
  rng = sampling.generator("arrivals", seed)
  # Number n of N arrives when n N-ths of the rounds have passed.
  arrival = np.empty(len(source), np.int64)
  arrival[rng.permutation(len(source))] = [
    -(-n * rounds // len(source)) for n in range(len(source))
  ]

  def present(round_index: int) -> list[str]:
    return [i for i, r in zip(source.ids, arrival) if r <= round_index]

  return Schedule(lambda round_index: source, present)


def phases(
  source: ClientSource, *, num_phases: int, rounds_each: int
) -> Schedule:
  """Shows every client's examples part after part, in stored order.

  The stored order is taken for time: a client's data drifts, and what it held
  before is gone.

  Args:
    source: The population.
    num_phases: Parts; the last stays.
    rounds_each: Rounds of a part.

  Returns:
    A `Schedule`. A client with fewer examples than parts is absent in some. The
    population "seen" is evaluated in the same parts too, as "phase_0" and on.

  Raises:
    ConfigError: A number below 1.

  Examples:
    >>> from fedfm.data.source import from_arrays
    >>> source = from_arrays({"a": {"x": [1, 2, 3, 4]}})
    >>> schedule = phases(source, num_phases=2, rounds_each=3)
    >>> [schedule.source(r).read("a")["x"].tolist() for r in (0, 2, 3, 9)]
    [[1, 2], [1, 2], [3, 4], [3, 4]]
  """
  _check("num_phases", num_phases)
  _check("rounds_each", rounds_each)
  parts = [part(source, k, num_phases) for k in range(num_phases)]

  def phase(round_index: int) -> ClientSource:
    return parts[min(round_index // rounds_each, num_phases - 1)]

  def present(round_index: int) -> list[str]:
    now = phase(round_index)
    return [i for i in now.ids if now.size(i)]

  def evals(
    populations: Mapping[str, ClientSource],
  ) -> Mapping[str, ClientSource]:
    if "seen" not in populations:
      return populations
    named = {}
    for k in range(num_phases):
      own = part(populations["seen"], k, num_phases)
      there = [i for i in own.ids if own.size(i)]
      if there:
        named[f"phase_{k}"] = subset(own, there)
    return {**populations, **named}

  return Schedule(phase, present, evals)


def part(source: ClientSource, index: int, num_parts: int) -> ClientSource:
  """Cuts every client's examples into parts, in stored order, and keeps one.

  Args:
    source: The population.
    index: Which part.
    num_parts: How many.

  Returns:
    The same clients; some may hold nothing.
  """

  def rows(client_id: str) -> slice:
    size = source.size(client_id)
    return slice(index * size // num_parts, (index + 1) * size // num_parts)

  def size(client_id: str) -> int:
    return rows(client_id).stop - rows(client_id).start

  def read(client_id: str) -> Examples:
    own = rows(client_id)
    return {k: x[own] for k, x in source.read(client_id).items()}

  return ClientSource(source.ids, size, read)


def _check(name: str, value: int) -> None:
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise errors.ConfigError(
      f"{name}: got {value!r}, expected an integer of at least 1"
    )
