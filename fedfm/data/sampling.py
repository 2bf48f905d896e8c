"""Who takes part in a round: pure functions of (seed, round).

Any round can be sampled in any order, on any process, with the same answer.
"""

from collections.abc import Callable, Sequence
import math
import numbers
from typing import NamedTuple

import numpy as np

from fedfm import errors
from fedfm.data.source import KnownIds


class Sampler(NamedTuple):
  """Chooses each round's cohort; what an accountant must know is beside it.

  Attributes:
    sample: Round -> ids of its clients, none of them twice.
    name: The factory's name; privacy holds for some samplers only.
    population: Number of clients to choose from.
    clients_per_round: Size of a cohort; None where it is random.
    rate: Probability of each client to be in a round, independently of the
      other rounds; None where clients differ in it or rounds depend.
  """

  sample: Callable[[int], list[str]]
  name: str
  population: int
  clients_per_round: int | None
  rate: float | None


def generator(purpose: str, seed: int, *indices: int) -> np.random.Generator:
  """Returns a random generator that is a pure function of its arguments.

  Args:
    purpose: What it is for; other purposes give independent numbers.
    seed: The run's seed, in [0, 2**32).
    *indices: Such as the round, not negative.

  Returns:
    A numpy generator (PCG64, the same on every platform).

  Raises:
    ConfigError: A seed out of range.

  Examples:
    >>> a, b = generator("test", 0, 7), generator("test", 0, 7)
    >>> bool(a.integers(2**32) == b.integers(2**32))
    True
  """
  if not _is_integer(seed) or not 0 <= seed < 2**32:
    raise errors.ConfigError(
      f"seed: got {seed!r}, expected an integer in [0, 2**32)"
    )
  sequence = np.random.SeedSequence(
    [int(seed), *map(int, indices)], spawn_key=tuple(purpose.encode())
  )
  return np.random.default_rng(sequence)


def uniform(
  ids: Sequence[str], clients_per_round: int, seed: int = 0
) -> Sampler:
  """Samples a fixed number of clients uniformly without replacement.

  Args:
    ids: The population.
    clients_per_round: Size of every cohort.
    seed: In [0, 2**32).

  Returns:
    A `Sampler`; rounds are independent of each other.

  Raises:
    ConfigError: A cohort below 1 or above the population, or a bad seed.

  Examples:
    >>> len(uniform(["a", "b", "c"], 2).sample(5))
    2
  """
  ids = _check_ids(ids)
  _check_cohort(clients_per_round, len(ids))
  generator("uniform", seed)

  def sample(round_number: int) -> list[str]:
    rng = generator("uniform", seed, _check_round(round_number))
    chosen = rng.choice(len(ids), clients_per_round, replace=False)
    return [ids[i] for i in chosen]

  return Sampler(
    sample,
    "uniform",
    len(ids),
    clients_per_round,
    clients_per_round / len(ids),
  )


def poisson(ids: Sequence[str], rate: float, seed: int = 0) -> Sampler:
  """Includes every client independently with probability `rate`.

  The sampling that privacy amplification is proved for (Abadi et al. 2016,
  arXiv 1607.00133). A cohort's size is random and may be 0.

  Args:
    ids: The population.
    rate: Probability of each client in each round, in (0, 1].
    seed: In [0, 2**32).

  Returns:
    A `Sampler`; rounds are independent of each other.

  Raises:
    ConfigError: A rate or seed out of range.

  Examples:
    >>> poisson(["a", "b", "c"], rate=1.0).sample(0)
    ['a', 'b', 'c']
  """
  ids = _check_ids(ids)
  if (
    not isinstance(rate, numbers.Real)
    or isinstance(rate, bool)
    or not 0 < rate <= 1
  ):
    raise errors.ConfigError(f"rate: got {rate!r}, expected in (0, 1]")
  generator("poisson", seed)

  def sample(round_number: int) -> list[str]:
    rng = generator("poisson", seed, _check_round(round_number))
    there = np.flatnonzero(rng.random(len(ids)) < rate)
    return [ids[i] for i in there.tolist()]

  return Sampler(sample, "poisson", len(ids), None, float(rate))


def weighted(
  ids: Sequence[str],
  weights: Sequence[float],
  clients_per_round: int,
  seed: int = 0,
) -> Sampler:
  """Samples without replacement, one by one in proportion to `weights`.

  Gumbel top-k, which draws as Efraimidis and Spirakis (2006) do: the first
  client is drawn in proportion to the weights, the next in proportion among
  those left, and so on. So inclusion is *not* proportional to the weights
  once a cohort is a large part of the population.

  Args:
    ids: The population.
    weights: One per client, finite and not negative; 0 is never sampled.
    clients_per_round: Size of every cohort.
    seed: In [0, 2**32).

  Returns:
    A `Sampler` whose cohorts are in the order drawn.

  Raises:
    ConfigError: Bad weights or seed, or a cohort above the number of clients
      of positive weight.

  Examples:
    >>> sorted(weighted(["a", "b", "c"], [1, 0, 5], 2).sample(0))
    ['a', 'c']
  """
  ids = _check_ids(ids)
  try:
    w = np.asarray(weights, np.float64)
  except (TypeError, ValueError):
    raise errors.ConfigError(
      "weights: expected one number per client"
    ) from None
  if w.shape != (len(ids),):
    raise errors.ConfigError(
      f"weights: got shape {list(w.shape)}, expected [{len(ids)}], one per"
      " client"
    )
  bad = ~(np.isfinite(w) & (w >= 0))
  if bad.any():
    i = int(np.flatnonzero(bad)[0])
    raise errors.ConfigError(
      f"weights: got {w[i]} for client {ids[i]!r}, expected finite and not"
      " negative"
    )
  positive = np.flatnonzero(w > 0)
  _check_cohort(clients_per_round, len(positive), "clients of positive weight")
  log_weights = np.log(w[positive])
  generator("weighted", seed)

  def sample(round_number: int) -> list[str]:
    rng = generator("weighted", seed, _check_round(round_number))
    keys = -(log_weights + rng.gumbel(size=len(positive)))
    top = np.argpartition(keys, clients_per_round - 1)[:clients_per_round]
    return [ids[positive[i]] for i in top[np.argsort(keys[top])]]

  return Sampler(sample, "weighted", len(ids), clients_per_round, None)


def round_robin(
  ids: Sequence[str], clients_per_round: int, seed: int = 0
) -> Sampler:
  """Goes through the population in passes, each in a new random order.

  Every client takes part exactly once a pass; a pass is
  ceil(population / clients_per_round) rounds, and its last round has what is
  left, so no cohort spans two passes.

  Args:
    ids: The population.
    clients_per_round: Size of a cohort, but for a pass's last.
    seed: In [0, 2**32).

  Returns:
    A `Sampler`.

  Raises:
    ConfigError: A cohort below 1 or above the population, or a bad seed.

  Examples:
    >>> s = round_robin(["a", "b", "c"], 2)
    >>> sorted(s.sample(0) + s.sample(1))
    ['a', 'b', 'c']
  """
  ids = _check_ids(ids)
  _check_cohort(clients_per_round, len(ids))
  rounds_per_pass = math.ceil(len(ids) / clients_per_round)
  generator("round_robin", seed)

  def sample(round_number: int) -> list[str]:
    pass_number, position = divmod(_check_round(round_number), rounds_per_pass)
    order = generator("round_robin", seed, pass_number).permutation(len(ids))
    start = position * clients_per_round
    return [ids[i] for i in order[start : start + clients_per_round]]

  return Sampler(sample, "round_robin", len(ids), clients_per_round, None)


def elastic(
  ids: Sequence[str],
  clients_per_round: int,
  *,
  counts: tuple[int, ...],
  rounds_each: int = 1,
) -> Sampler:
  """Takes as many of the first clients as a phase says: replicas come and go.

  Args:
    ids: The population.
    clients_per_round: The most that a phase may have.
    counts: Clients of each phase; the last goes on to the end.
    rounds_each: Rounds of a phase.

  Returns:
    A `Sampler`; nothing about it is random.

  Raises:
    ConfigError: No phase, or a count out of range.

  Examples:
    >>> s = elastic(["a", "b", "c"], 3, counts=(1, 3), rounds_each=2)
    >>> [len(s.sample(r)) for r in range(5)]
    [1, 1, 3, 3, 3]
  """
  ids = _check_ids(ids)
  _check_cohort(clients_per_round, len(ids))
  if not counts or not all(0 < n <= clients_per_round for n in counts):
    raise errors.ConfigError(
      f"counts: got {counts}, expected clients of each phase, 1 to "
      f"{clients_per_round}"
    )
  if not _is_integer(rounds_each) or rounds_each < 1:
    raise errors.ConfigError(
      f"rounds_each: got {rounds_each!r}, expected an integer of at least 1"
    )

  def sample(round_number: int) -> list[str]:
    phase = _check_round(round_number) // rounds_each
    return list(ids[: counts[min(phase, len(counts) - 1)]])

  return Sampler(sample, "elastic", len(ids), None, None)


def among(
  make: Callable[[Sequence[str]], Sampler],
  ids: Sequence[str],
  eligible: Callable[[int], Sequence[str]],
) -> Sampler:
  """Samples, in every round, from the clients that are there.

  Args:
    make: Makes a sampler of some clients.
    ids: The population.
    eligible: Round -> those of `ids` that may be sampled.

  Returns:
    A `Sampler`, of a name that promises no amplification: who is there is not
    the sampler's to say. A round without eligible clients has an empty cohort.
  """
  whole = make(ids)

  def sample(round_number: int) -> list[str]:
    there = eligible(_check_round(round_number))
    return make(there).sample(round_number) if there else []

  return Sampler(
    sample, f"{whole.name} among those present", len(ids), None, None
  )


def _is_integer(value) -> bool:
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_ids(ids: Sequence[str]) -> Sequence[str]:
  if isinstance(ids, KnownIds):
    return ids
  ids = tuple(ids)
  if len(set(ids)) < len(ids):
    raise errors.ConfigError(
      f"ids: {len(ids) - len(set(ids))} of {len(ids)} are repeated, expected"
      " unique ids"
    )
  if not ids:
    raise errors.ConfigError("ids: got none, expected at least 1 client")
  return ids


def _check_cohort(
  clients_per_round: int, limit: int, of_what: str = "clients"
) -> None:
  if not _is_integer(clients_per_round) or clients_per_round < 1:
    raise errors.ConfigError(
      f"clients_per_round: got {clients_per_round!r}, expected an integer of"
      " at least 1"
    )
  if clients_per_round > limit:
    raise errors.ConfigError(
      f"clients_per_round: got {clients_per_round}, but the population has"
      f" only {limit} {of_what}"
    )


def _check_round(round_number: int) -> int:
  if not _is_integer(round_number) or round_number < 0:
    raise errors.ConfigError(
      f"round: got {round_number!r}, expected an integer of at least 0"
    )
  return round_number
