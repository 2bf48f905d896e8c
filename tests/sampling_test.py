"""Samplers: pure, without repeats, and with the statistics they promise."""

import collections
import itertools
import time

import numpy as np
import pytest

from fedfm import errors
from fedfm.data import sampling

IDS = [f"client_{i}" for i in range(20)]
SAMPLERS = {
  "uniform": lambda seed: sampling.uniform(IDS, 6, seed),
  "poisson": lambda seed: sampling.poisson(IDS, 0.3, seed),
  "weighted": lambda seed: sampling.weighted(IDS, range(1, 21), 6, seed),
  "round_robin": lambda seed: sampling.round_robin(IDS, 6, seed),
}


def _counts(sampler, rounds):
  chosen = collections.Counter(
    c for r in range(rounds) for c in sampler.sample(r)
  )
  return np.array([chosen[c] for c in IDS])


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_pure_functions_of_seed_and_round(name):
  sampler = SAMPLERS[name](7)
  forwards = [sampler.sample(r) for r in range(10)]
  again = SAMPLERS[name](7)
  assert [again.sample(r) for r in reversed(range(10))] == forwards[::-1]
  assert [sampler.sample(np.int64(r)) for r in range(10)] == forwards
  assert [SAMPLERS[name](8).sample(r) for r in range(10)] != forwards
  assert len({tuple(cohort) for cohort in forwards}) == 10


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_cohort_holds_a_client_twice(name):
  sampler = SAMPLERS[name](0)
  for r in (*range(200), 2**31, 2**40):
    cohort = sampler.sample(r)
    assert len(set(cohort)) == len(cohort) and set(cohort) <= set(IDS)
  assert sampler.name == name and sampler.population == 20


def test_samplers_of_one_seed_are_independent():
  cohorts = [sorted(SAMPLERS[n](0).sample(0)) for n in SAMPLERS]
  assert all(a != b for a, b in itertools.pairwise(cohorts))


def test_uniform_includes_every_client_and_pair_alike():
  sampler = sampling.uniform(IDS, 6, seed=1)
  rounds = 4000
  assert sampler.rate == 0.3 and sampler.clients_per_round == 6
  counts = _counts(sampler, rounds)
  assert counts.sum() == 6 * rounds
  # Counts have variance n q (1 - q); 20 dependent ones, one degree less.
  chi2 = np.sum((counts - 0.3 * rounds) ** 2) / (rounds * 0.3 * 0.7)
  assert 6.8 < chi2 * 19 / 20 < 38.6  # 0.5% in each tail of 19 degrees.
  both = sum({IDS[0], IDS[1]} <= set(sampler.sample(r)) for r in range(rounds))
  expected = rounds * 6 * 5 / (20 * 19)
  assert abs(both - expected) < 4 * np.sqrt(expected)


def test_poisson_draws_each_client_independently():
  sampler = sampling.poisson(IDS, 0.3, seed=1)
  assert sampler.rate == 0.3 and sampler.clients_per_round is None
  rounds = 4000
  sizes = np.array([len(sampler.sample(r)) for r in range(rounds)])
  counts = _counts(sampler, rounds)
  chi2 = np.sum((counts - 0.3 * rounds) ** 2) / (rounds * 0.3 * 0.7)
  assert 7.4 < chi2 < 40.0  # 0.5% in each tail of 20 degrees.
  # Binomial(20, 0.3): the size varies, unlike fixed-size sampling.
  assert abs(sizes.mean() - 6) < 0.15 and abs(sizes.var() - 4.2) < 0.4


def test_poisson_may_be_empty_and_may_be_everyone():
  assert sampling.poisson(IDS, 1e-9).sample(0) == []
  assert sampling.poisson(IDS, 1.0).sample(0) == IDS


def test_weighted_draws_the_first_client_by_weight():
  weights = np.arange(20.0)
  sampler = sampling.weighted(IDS, weights, 1, seed=1)
  rounds = 5000
  counts = _counts(sampler, rounds)
  assert counts[0] == 0
  expected = rounds * weights[1:] / weights.sum()
  chi2 = np.sum((counts[1:] - expected) ** 2 / expected)
  assert 6.3 < chi2 < 37.2  # 0.5% in each tail of 18 degrees.
  assert sampler.rate is None


def test_weighted_pairs_follow_successive_sampling():
  weights = np.array([1.0, 2.0, 3.0, 4.0])
  ids = list("abcd")
  sampler = sampling.weighted(ids, weights, 2, seed=2)
  rounds = 6000
  seen = collections.Counter(tuple(sampler.sample(r)) for r in range(rounds))
  p = weights / weights.sum()
  chi2 = 0.0
  for i, first in enumerate(ids):
    for j, second in enumerate(ids):
      if i != j:
        expected = rounds * p[i] * p[j] / (1 - p[i])
        chi2 += (seen[first, second] - expected) ** 2 / expected
  assert 2.6 < chi2 < 26.8  # 0.5% in each tail of 11 degrees.


def test_round_robin_serves_each_client_once_a_pass():
  sampler = sampling.round_robin(IDS, 6, seed=3)
  passes = [
    [c for r in range(4 * p, 4 * p + 4) for c in sampler.sample(r)]
    for p in range(5)
  ]
  assert all(sorted(order) == sorted(IDS) for order in passes)
  assert len({tuple(order) for order in passes}) == 5
  assert [len(sampler.sample(r)) for r in range(5)] == [6, 6, 6, 2, 6]


@pytest.mark.parametrize(
  "make, parts",
  [
    (lambda: sampling.uniform(IDS, 21), ["clients_per_round", "21", "20"]),
    (lambda: sampling.round_robin(IDS, 99), ["clients_per_round", "99"]),
    (lambda: sampling.uniform(IDS, 0), ["clients_per_round", "0"]),
    (lambda: sampling.uniform(IDS, 2.0), ["clients_per_round", "2.0"]),
    (lambda: sampling.uniform(IDS, True), ["clients_per_round", "True"]),
    (lambda: sampling.uniform([], 1), ["ids", "none"]),
    (lambda: sampling.uniform(["a", "a"], 1), ["ids", "1 of 2"]),
    (lambda: sampling.poisson(IDS, 0.0), ["rate", "0.0", "(0, 1]"]),
    (lambda: sampling.poisson(IDS, 1.5), ["rate", "1.5"]),
    (lambda: sampling.poisson(IDS, float("nan")), ["rate", "nan"]),
    (lambda: sampling.uniform(IDS, 2, seed=-1), ["seed", "-1"]),
    (lambda: sampling.poisson(IDS, 0.5, seed=2**32), ["seed", "2**32"]),
    (lambda: sampling.weighted(IDS, [1], 2), ["weights", "[1]", "[20]"]),
    (
      lambda: sampling.weighted(["a", "b"], [1, np.nan], 1),
      ["weights", "nan", "'b'"],
    ),
    (
      lambda: sampling.weighted(["a", "b"], [-1, 1], 1),
      ["weights", "-1", "'a'"],
    ),
    (
      lambda: sampling.weighted(["a", "b"], [0, 1], 2),
      ["clients_per_round", "2", "1 clients of positive weight"],
    ),
    (lambda: sampling.elastic(IDS, 2, counts=(1, 3)), ["counts", "(1, 3)"]),
    (lambda: sampling.elastic(IDS, 2, counts=()), ["counts", "()"]),
    (
      lambda: sampling.elastic(IDS, 2, counts=(1,), rounds_each=0),
      ["rounds_each", "0"],
    ),
    (lambda: sampling.uniform(IDS, 2).sample(-1), ["round", "-1"]),
    (lambda: sampling.uniform(IDS, 2).sample(1.0), ["round", "1.0"]),
  ],
)
def test_bad_arguments_are_named(make, parts):
  with pytest.raises(errors.ConfigError) as error:
    make()
  assert "\n" not in str(error.value)
  assert all(part in str(error.value) for part in parts), str(error.value)


def test_a_million_clients_take_well_under_a_second_a_round():
  ids = list(map(str, range(1_000_000)))
  for sampler in (
    sampling.uniform(ids, 100),
    sampling.poisson(ids, 1e-4),
    sampling.weighted(ids, np.ones(len(ids)), 100),
    sampling.round_robin(ids, 100),
  ):
    start = time.process_time()
    assert sampler.sample(5)
    assert time.process_time() - start < 1.0, sampler.name
