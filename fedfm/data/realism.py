"""What real devices do: they are offline, leave, are slow, do half the work.

Everything is a function of (seed, round, client id), drawn by a counter-based
hash: it does not depend on who else is there, and a resumed run draws the same.
It all happens on the host, before a cohort is packed: fewer clients, fewer
steps or other rates change no shape, and recompile nothing.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
from typing import NamedTuple

import numpy as np

from fedfm import errors
from fedfm.data.packing import id_hash

LATE = ("drop", "partial")


class Costs(NamedTuple):
  """What a client's round costs, for the simulated clock.

  Attributes:
    flops_per_step: Of a local step.
    bytes_up: What it sends.
    bytes_down: What it receives.
    flops_at_start: Of what it does before the first.
  """

  flops_per_step: float
  bytes_up: float
  bytes_down: float
  flops_at_start: float = 0.0


class Attendance(NamedTuple):
  """Who of a cohort reports, and what each did.

  Attributes:
    reports: [clients] bool.
    steps: [clients] int, local steps.
    seconds: [clients] float, simulated time from the start of the round; of a
      client that does not report, infinity.
  """

  reports: np.ndarray
  steps: np.ndarray
  seconds: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
  """The clients' devices: log-normal around these medians.

  Attributes:
    flops_per_second: Speed.
    up_bytes_per_second: Bandwidth to the server.
    down_bytes_per_second: Bandwidth from it.
    latency_seconds: Added to every round.
    spread: Standard deviation of the logarithms; 0 makes all devices alike.
  """

  flops_per_second: float = 1e12
  up_bytes_per_second: float = 1.25e6
  down_bytes_per_second: float = 6.25e6
  latency_seconds: float = 0.1
  spread: float = 0.5

  def __post_init__(self):
    for name in (
      "flops_per_second",
      "up_bytes_per_second",
      "down_bytes_per_second",
    ):
      _check(name, getattr(self, name), 0, np.inf, open_least=True)
    _check("latency_seconds", self.latency_seconds, 0, np.inf)
    _check("spread", self.spread, 0, np.inf)

  def seconds(
    self, seed: int, ids: Sequence[str], costs: Costs
  ) -> tuple[np.ndarray, np.ndarray]:
    """Simulates how long clients take.

    Args:
      seed: The run's seed.
      ids: The clients.
      costs: Of a client.

    Returns:
      Seconds beside the local steps (of communication, and before the first),
      and of a local step, [clients] each.
    """
    hashes = _hashes(ids)

    def factor(purpose):
      return np.exp(self.spread * _normal(purpose, seed, 0, hashes))

    communication = (
      self.latency_seconds
      + costs.bytes_up / (self.up_bytes_per_second * factor("up"))
      + costs.bytes_down / (self.down_bytes_per_second * factor("down"))
    )
    speed = self.flops_per_second * factor("speed")
    return (
      communication + costs.flops_at_start / speed,
      costs.flops_per_step / speed,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Realism:
  """How clients behave; the defaults are ideal.

  Attributes:
    seed: The run's seed.
    availability: Mean share of the rounds in which a client is online.
    period: Rounds of a cycle, such as a day: a client's chance to be online
      swings by as much as it can around the mean, at a phase of its own; 0 for
      no cycle.
    dropout: Chance that a client that was given work never reports.
    least_work: A client does a share of its local steps that is uniform in
      [least_work, 1].
    deadline: Simulated seconds that a round waits; 0 waits for all.
    late: "drop" leaves out who would be late; with "partial" a client stops in
      time to send what it has, and is left out without a single step.
    rate_spread: Standard deviation of the logarithm of a client's own learning
      rate, as a multiple of the common one.
    devices: For deadlines and the simulated clock.
  """

  seed: int = 0
  availability: float = 1.0
  period: int = 0
  dropout: float = 0.0
  least_work: float = 1.0
  deadline: float = 0.0
  late: str = "drop"
  rate_spread: float = 0.0
  devices: Devices = dataclasses.field(default_factory=Devices)

  def __post_init__(self):
    _check("availability", self.availability, 0, 1, open_least=True)
    _check("period", self.period, 0, np.inf)
    _check("dropout", self.dropout, 0, 1, open_most=True)
    _check("least_work", self.least_work, 0, 1, open_least=True)
    _check("deadline", self.deadline, 0, np.inf)
    _check("rate_spread", self.rate_spread, 0, np.inf)
    if self.late not in LATE:
      raise errors.ConfigError(
        f"late: got {self.late!r}{errors.nearest(self.late, LATE)}"
      )

  def online(self, ids: Sequence[str], round_index: int) -> list[str]:
    """Returns the clients that are online in a round, in order.

    Args:
      ids: The population.
      round_index: The round.

    Returns:
      Some of `ids`.
    """
    if self.availability == 1:
      return list(ids)
    hashes = _hashes(ids)
    chance = np.full(len(ids), self.availability)
    if self.period:
      phase = _uniform("phase", self.seed, 0, hashes)
      swing = min(self.availability, 1 - self.availability)
      angle = 2 * np.pi * (round_index / self.period + phase)
      chance = chance + swing * np.sin(angle)
    draw = _uniform("availability", self.seed, round_index, hashes)
    return [i for i, there in zip(ids, draw < chance) if there]

  def attend(
    self,
    ids: Sequence[str],
    round_index: int,
    steps: Sequence[int],
    costs: Costs,
  ) -> Attendance:
    """Plays one round of a cohort.

    Args:
      ids: The cohort.
      round_index: The round.
      steps: Local steps that each was asked for.
      costs: Of a client.

    Returns:
      An `Attendance`.
    """
    hashes = _hashes(ids)
    asked = np.asarray(steps, np.int64)
    share = _uniform("work", self.seed, round_index, hashes)
    share = self.least_work + (1 - self.least_work) * share
    done = np.maximum(np.ceil(share * asked), 1).astype(np.int64)
    done = np.minimum(done, asked)
    beside, a_step = self.devices.seconds(self.seed, ids, costs)
    stays = _uniform("dropout", self.seed, round_index, hashes) >= self.dropout
    if self.deadline and self.late == "partial":
      left = np.maximum(self.deadline - beside, 0)
      fits = np.floor(left / np.maximum(a_step, np.finfo(float).tiny))
      done = np.minimum(done, np.minimum(fits, 2**31)).astype(np.int64)
      stays &= done > 0
    seconds = beside + done * a_step
    if self.deadline and self.late == "drop":
      stays &= seconds <= self.deadline
    return Attendance(stays, done, np.where(stays, seconds, np.inf))

  def rates(self, ids: Sequence[str]) -> np.ndarray:
    """Returns the multiples of the learning rate, [clients], of median 1."""
    if not self.rate_spread:
      return np.ones(len(ids))
    draw = _normal("rate", self.seed, 0, _hashes(ids))
    return np.exp(self.rate_spread * draw)

  def round_seconds(self, attendance: Attendance) -> float:
    """Returns how long the server waits, in simulated seconds."""
    if self.deadline and not attendance.reports.all():
      return self.deadline
    reported = attendance.seconds[attendance.reports]
    return float(reported.max()) if len(reported) else 0.0


def _hashes(ids: Sequence[str]) -> np.ndarray:
  """[clients] uint64."""
  words = [id_hash(client_id).view(np.uint64)[0] for client_id in ids]
  return np.array(words, np.uint64)


def _uniform(
  purpose: str, seed: int, round_index: int, hashes: np.ndarray
) -> np.ndarray:
  """Draws [clients] in [0, 1) by SplitMix64 (Steele et al. 2014)."""
  salt = hashlib.blake2b(
    f"{purpose}/{seed}/{round_index}".encode(), digest_size=8
  )
  x = hashes ^ np.frombuffer(salt.digest(), np.uint64)
  for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
    x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
  x = x ^ (x >> np.uint64(31))
  return (x >> np.uint64(11)) * 2.0**-53


def _normal(
  purpose: str, seed: int, round_index: int, hashes: np.ndarray
) -> np.ndarray:
  """Draws [clients] standard normals (Box and Muller)."""
  u = _uniform(f"{purpose}/radius", seed, round_index, hashes)
  angle = _uniform(f"{purpose}/angle", seed, round_index, hashes)
  return np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * angle)


def _check(
  name: str,
  value: float,
  least: float,
  most: float,
  open_least: bool = False,
  open_most: bool = False,
) -> None:
  above = least < value if open_least else least <= value
  below = value < most if open_most else value <= most
  if above and below and np.isfinite(value):
    return
  left, right = "(" if open_least else "[", ")" if open_most else "]"
  raise errors.ConfigError(
    f"{name}: got {value}, expected in {left}{least:g}, {most:g}{right}"
  )
