"""What rounds of Gaussian noise cost in privacy, by dp-accounting.

The accountant must match the sampler:

  poisson   PoissonSampledDpEvent; adding or removing a client; PLD or RDP.
  uniform   SampledWithoutReplacementDpEvent, cohorts of a fixed size; replacing
            a client by another; RDP only.

Other samplers are not amplified by this accounting, and are refused. Removing a
client changes a sum of clipped deltas by at most the clip norm; replacing one,
by twice that: see `sensitivity`.
"""

import fractions
import functools
import importlib
import math
from typing import Any, NamedTuple

from fedfm import errors
from fedfm.privacy.clip import check_count, check_positive

ACCOUNTANTS = ("pld", "rdp")
SENSITIVITY = {"poisson": 1.0, "uniform": 2.0}
# Noise multipliers, and chances of a client, that accountants compute with.
_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e6
_LEAST_RATE = 1e-15
# Steps of a privacy loss that PLD composes, and rounds that never have as many.
_MOST_STEPS, _FEW_ROUNDS = 10**8, 10_000


class Event(NamedTuple):
  """What one round does to privacy.

  Attributes:
    sampler: "poisson" or "uniform".
    sampling_rate: Chance of a client to be in a round.
    noise_multiplier: The noise's standard deviation over the L2 sensitivity of
      the sum.
  """

  sampler: str
  sampling_rate: float
  noise_multiplier: float


class Accounting(NamedTuple):
  """How a run's privacy is counted.

  Attributes:
    event: Of every round.
    delta: The delta that epsilon is for.
    accountant: "pld" or "rdp".
  """

  event: Event
  delta: float
  accountant: str

  def epsilon(self, rounds: int) -> float:
    """Returns epsilon after so many rounds; 0 for none."""
    spent = ((self.event, rounds),) if rounds else ()
    return spent_epsilon(spent, self.delta, self.accountant)


def sensitivity(sampler: str) -> float:
  """Returns the most that neighbours differ by, in clip norms.

  Args:
    sampler: "poisson" (one client more or less), or "uniform" (another client).

  Returns:
    L2 sensitivity of the sum of clipped messages over the clip norm.

  Raises:
    PrivacyError: A sampler that no accountant matches.

  Examples:
    >>> sensitivity("poisson"), sensitivity("uniform")
    (1.0, 2.0)
  """
  if sampler not in SENSITIVITY:
    raise errors.PrivacyError(
      f"sampler: got {sampler!r}, which no accountant matches, expected "
      "'poisson' or 'uniform'"
    )
  return SENSITIVITY[sampler]


def epsilon(
  *,
  noise_multiplier: float,
  sampling_rate: float,
  rounds: int,
  delta: float,
  accountant: str = "pld",
  sampler: str = "poisson",
) -> float:
  """Computes the epsilon of rounds of the subsampled Gaussian mechanism.

  Args:
    noise_multiplier: The noise's standard deviation over the L2 sensitivity of
      the sum, which is `sensitivity(sampler)` clip norms; 0, or 1e-3 to 1e6.
    sampling_rate: Chance of a client to be in a round, 1e-15 to 1.
    rounds: How many, at least 1.
    delta: In (0, 1).
    accountant: "pld" (tighter) or "rdp".
    sampler: "poisson", or "uniform" for cohorts of a fixed size, which needs
      "rdp".

  Returns:
    Epsilon; infinity without noise.

  Raises:
    PrivacyError: A number out of range, an accountant that does not match the
      sampler, or no dp-accounting.

  Examples:
    >>> round(epsilon(noise_multiplier=1.1, sampling_rate=256 / 60000,
    ...               rounds=14040, delta=1e-5, accountant="rdp"), 4)
    2.5944
  """
  event = Event(sampler, float(sampling_rate), float(noise_multiplier))
  _check(event, rounds, delta, accountant)
  return spent_epsilon(((event, rounds),), delta, accountant)


def noise_multiplier(
  *,
  epsilon: float,
  sampling_rate: float,
  rounds: int,
  delta: float,
  accountant: str = "pld",
  sampler: str = "poisson",
) -> float:
  """Finds the least noise that keeps to an epsilon.

  Args:
    epsilon: At most so much, above 0.
    sampling_rate: As in `epsilon`, and so are the others.
    rounds: How many.
    delta: In (0, 1).
    accountant: "pld" or "rdp".
    sampler: "poisson" or "uniform".

  Returns:
    The noise multiplier, within a thousandth above the least one.

  Raises:
    PrivacyError: As `epsilon`, or no noise is enough.
  """
  check_positive("epsilon", epsilon)
  event = Event(sampler, float(sampling_rate), 1.0)
  _check(event, rounds, delta, accountant)
  return _calibrated(event, rounds, float(epsilon), delta, accountant)


@functools.lru_cache
def _calibrated(
  event: Event, rounds: int, target: float, delta: float, accountant: str
) -> float:
  def spends(noise):
    own = ((event._replace(noise_multiplier=noise), rounds),)
    return spent_epsilon(own, delta, accountant)

  upper = 1.0
  while spends(upper) > target:
    upper *= 2
    if upper > _MOST_NOISE:
      raise errors.PrivacyError(
        f"epsilon: got {target}, which the {accountant!r} accountant shows for "
        f"no noise at delta {delta}, expected more"
      )
  lower = upper / 2
  while spends(lower) <= target:
    lower, upper = lower / 2, lower
    if lower < _LEAST_NOISE:
      raise errors.PrivacyError(
        f"epsilon: got {target:g}, which noise of {upper:g} sensitivities "
        "keeps to, expected less"
      )
  dp = library()

  def accountant_of_event():
    return _accountant(event.sampler, accountant, _grid(lower))

  return dp.calibrate_dp_mechanism(
    accountant_of_event,
    lambda noise: dp.SelfComposedDpEvent(
      dp_event(event._replace(noise_multiplier=noise)), rounds
    ),
    target,
    delta,
    dp.ExplicitBracketInterval(lower, upper),
    tol=5e-4 * lower,
  )


@functools.lru_cache(maxsize=4096)
def spent_epsilon(
  spent: tuple[tuple[Event, int], ...], delta: float, accountant: str
) -> float:
  """Composes events.

  Args:
    spent: Events, and how often each took place; all of one sampler.
    delta: In (0, 1).
    accountant: "pld" or "rdp".

  Returns:
    Epsilon, a function of these alone, so that it is the same in a resumed run.
  """
  if not spent:
    return 0.0
  if any(not event.noise_multiplier for event, _ in spent):
    return math.inf
  if accountant == "rdp":
    composed = _accountant(spent[0][0].sampler, accountant)
    for event, count in spent:
      composed.compose(dp_event(event), count)
    return float(composed.get_epsilon(delta))
  # One grid for all: that of the least noise.
  grid = max(_grid(event.noise_multiplier) for event, _ in spent)
  rounds = sum(count for _, count in spent)
  if rounds > _FEW_ROUNDS:
    loss = spent_epsilon(spent, delta, "rdp")
    if loss > _MOST_STEPS * grid:
      raise errors.PrivacyError(
        f"rounds: got {rounds}, whose privacy loss of {loss:.3g} is more than "
        "accountant 'pld' composes, expected fewer, or 'rdp'"
      )
  losses = [_loss(event, grid).self_compose(n) for event, n in spent]
  total = functools.reduce(lambda a, b: a.compose(b), losses)
  return float(total.get_epsilon_for_delta(delta))


@functools.lru_cache(maxsize=8)
def _loss(event: Event, grid: float) -> Any:
  """The privacy loss of one round; building it is most of the work."""
  distributions = importlib.import_module(
    "dp_accounting.pld.privacy_loss_distribution"
  )
  return distributions.from_gaussian_mechanism(
    event.noise_multiplier,
    value_discretization_interval=grid,
    sampling_prob=event.sampling_rate,
  )


def _grid(noise: float) -> float:
  """Steps of a privacy loss; losses grow as noise falls, digits need not."""
  return 1e-4 * max(1.0, noise**-2)


def dp_event(event: Event) -> Any:
  """Returns the dp-accounting event of a round."""
  dp = library()
  noise = dp.GaussianDpEvent(event.noise_multiplier)
  if event.sampler == "poisson":
    return dp.PoissonSampledDpEvent(event.sampling_rate, noise)
  share = fractions.Fraction(event.sampling_rate).limit_denominator(10**9)
  if float(share) < event.sampling_rate:  # Never less than what was spent.
    exact = fractions.Fraction(event.sampling_rate)
    share = fractions.Fraction(math.ceil(exact * 10**18), 10**18)
  return dp.SampledWithoutReplacementDpEvent(
    share.denominator, share.numerator, noise
  )


def _accountant(sampler: str, name: str, grid: float = 1e-4) -> Any:
  dp = library()
  neighbours = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
  if sampler == "uniform":
    neighbours = dp.NeighboringRelation.REPLACE_ONE
  if name == "rdp":
    return dp.rdp.RdpAccountant(neighboring_relation=neighbours)
  return dp.pld.PLDAccountant(neighbours, value_discretization_interval=grid)


def check_accountant(accountant: str, sampler: str) -> None:
  """Refuses an accountant that does not match a sampler.

  Args:
    accountant: Its name.
    sampler: The sampler's.

  Raises:
    PrivacyError: They do not match; names both.
  """
  if accountant not in ACCOUNTANTS:
    hint = errors.nearest(accountant, ACCOUNTANTS)
    raise errors.PrivacyError(f"accountant: got {accountant!r}{hint}")
  sensitivity(sampler)
  if sampler == "uniform" and accountant != "rdp":
    raise errors.PrivacyError(
      f"accountant: got {accountant!r}, but sampler 'uniform' draws cohorts of "
      "a fixed size, expected 'rdp' (or sampler 'poisson')"
    )


def _check(event: Event, rounds: int, delta: float, accountant: str) -> None:
  check_accountant(accountant, event.sampler)
  noise = event.noise_multiplier
  check_positive("noise_multiplier", noise, zero=True)
  if noise and not _LEAST_NOISE <= noise <= _MOST_NOISE:
    raise errors.PrivacyError(
      f"noise_multiplier: got {noise:g} sensitivities, expected 0, or "
      f"{_LEAST_NOISE:g} to {_MOST_NOISE:g}"
    )
  if not _LEAST_RATE <= event.sampling_rate <= 1:
    raise errors.PrivacyError(
      f"sampling_rate: got {event.sampling_rate}, expected in (0, 1], at least "
      f"{_LEAST_RATE:g}"
    )
  check_count("rounds", rounds)
  if not 0 < delta < 1:
    raise errors.PrivacyError(f"delta: got {delta}, expected in (0, 1)")
  library()


def library() -> Any:
  """Returns the module `dp_accounting`.

  Returns:
    The module, with its `pld` and `rdp`.

  Raises:
    PrivacyError: It is not installed.
  """
  try:
    for name in ("pld", "rdp"):
      importlib.import_module(f"dp_accounting.{name}")
    return importlib.import_module("dp_accounting")
  except ImportError:
    raise errors.PrivacyError(
      "privacy: dp-accounting is not installed, expected "
      'pip install "fedfm[privacy]"'
    ) from None
