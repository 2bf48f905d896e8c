"""Differential privacy: what the accountant counts."""

import sys

import numpy as np
import pytest
from scipy import stats

from fedfm import errors, privacy

MNIST = {"sampling_rate": 256 / 60000, "rounds": 14040, "delta": 1e-5}


@pytest.mark.parametrize(
  ("accountant", "sampler", "expected"),
  [
    ("pld", "poisson", 2.379644),
    ("rdp", "poisson", 2.594363),
    ("rdp", "uniform", 5.238576),
  ],
)
def test_epsilon_equals_published_values(accountant, sampler, expected):
  got = privacy.epsilon(
    noise_multiplier=1.1, accountant=accountant, sampler=sampler, **MNIST
  )
  assert got == pytest.approx(expected, abs=2e-6)


def test_epsilon_of_everyone_is_that_of_the_gaussian_mechanism():
  """Against the formula of Balle and Wang 2018 (arXiv 1805.06530), bisected."""
  z, rounds, delta = 4.0, 3, 1e-5
  mu = np.sqrt(rounds) / z

  def delta_of(e):
    a, b = mu / 2 - e / mu, -mu / 2 - e / mu
    return stats.norm.cdf(a) - np.exp(e) * stats.norm.cdf(b)

  low, high = 0.0, 50.0
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
  got = privacy.epsilon(
    noise_multiplier=z, sampling_rate=1.0, rounds=rounds, delta=delta
  )
  assert got == pytest.approx(high, rel=1e-3)


@pytest.mark.parametrize(
  ("target", "accountant"),
  [
    (4.0, "rdp"),
    pytest.param(4.0, "pld", marks=pytest.mark.slow),
    pytest.param(0.3, "pld", marks=pytest.mark.slow),
  ],
)
def test_noise_for_an_epsilon(target, accountant):
  sampling = {"sampling_rate": 0.05, "rounds": 20, "delta": 1e-5}
  sampling["accountant"] = accountant
  z = privacy.noise_multiplier(epsilon=target, **sampling)
  assert privacy.epsilon(noise_multiplier=z, **sampling) <= target
  less = privacy.epsilon(noise_multiplier=0.998 * z, **sampling)
  assert less > target


def test_ledger_composes_different_rounds():
  """Two kinds of rounds, against dp-accounting's own accountant."""
  import dp_accounting

  first = privacy.Event("poisson", 0.1, 1.0)
  second = first._replace(noise_multiplier=2.0)
  ledger = privacy.Ledger(privacy.Accounting(first, 1e-5, "pld"))
  for _ in range(3):
    ledger.charge()
  stored = ledger.to_json()
  ledger = privacy.Ledger(privacy.Accounting(second, 1e-5, "pld"), stored)
  got = [ledger.charge() for _ in range(2)]
  accountant = dp_accounting.pld.PLDAccountant()
  for event, count in ((first, 3), (second, 2)):
    noise = dp_accounting.GaussianDpEvent(event.noise_multiplier)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.1, noise), count)
  assert got[1] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)
  assert got[0] < got[1] and ledger.rounds == 5
  with pytest.raises(errors.CheckpointError, match="privacy ledger"):
    privacy.Ledger(ledger._accounting, {"spent": [{"rounds": 3}]})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"delta": 0.0}, "delta: got 0.0"),
    ({"delta": 1.0}, "delta: got 1.0"),
    ({"sampling_rate": 1.5}, "sampling_rate: got 1.5"),
    ({"rounds": 0}, "rounds: got 0"),
    ({"noise_multiplier": -1.0}, "noise_multiplier: got -1.0"),
    ({"noise_multiplier": 1e-300}, "noise_multiplier: got 1e-300 .*, or 0.001"),
    ({"noise_multiplier": 1e300}, "noise_multiplier: got 1e.300 .* to 1e.06"),
    ({"sampling_rate": 1e-16}, "sampling_rate: got 1e-16, .* least 1e-15"),
    ({"rounds": 10**12}, r"rounds: got 1000000000000, .* most 2\*\*31"),
    (
      {"rounds": 2**31, "sampling_rate": 0.1},
      "rounds: got 2147483648, whose privacy loss .* fewer, or 'rdp'",
    ),
    ({"accountant": "moments"}, "accountant: got 'moments'"),
    ({"sampler": "round_robin"}, "sampler: got 'round_robin'"),
    ({"sampler": "uniform"}, "accountant: got 'pld', but sampler 'uniform'"),
  ],
)
def test_bad_arguments_of_the_accountant(changes, message):
  with pytest.raises(errors.PrivacyError, match=message):
    privacy.epsilon(**({"noise_multiplier": 1.0} | MNIST | changes))


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_an_epsilon_that_any_noise_keeps_to(accountant):
  sampling = MNIST | {"rounds": 3, "accountant": accountant}
  with pytest.raises(errors.PrivacyError, match="^epsilon: .* expected less"):
    privacy.noise_multiplier(epsilon=1e300, **sampling)


@pytest.mark.parametrize("rate", [1e-12, 3e-10, 0.1, 256 / 60000, 1.0])
def test_a_cohort_of_a_fixed_size_is_never_less_than_its_rate(rate):
  event = privacy.accounting.dp_event(privacy.Event("uniform", rate, 1.0))
  share = event.sample_size / event.source_dataset_size
  assert rate <= share <= rate * (1 + 1e-6)
  spent = privacy.epsilon(
    noise_multiplier=0.1,
    sampling_rate=rate,
    rounds=1,
    delta=1e-15,
    accountant="rdp",
    sampler="uniform",
  )
  assert spent > 0


def test_without_dp_accounting_its_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "dp_accounting", None)
  with pytest.raises(errors.PrivacyError, match=r'"fedfm\[privacy\]"'):
    privacy.epsilon(noise_multiplier=1.0, **MNIST)
