"""Aggregators: from the cohort's messages to one update."""

from fedfm.aggregators.keep import Kept, keep
from fedfm.aggregators.mean import (
  apart,
  each,
  none,
  uniform_mean,
  weighted_mean,
)
from fedfm.aggregators.robust import (
  bulyan,
  geometric_median,
  krum,
  median,
  trimmed_mean,
)

__all__ = [
  "Kept",
  "apart",
  "bulyan",
  "each",
  "geometric_median",
  "keep",
  "krum",
  "median",
  "none",
  "trimmed_mean",
  "uniform_mean",
  "weighted_mean",
]
