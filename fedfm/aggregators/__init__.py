"""Aggregators: from the cohort's messages to one update."""

from fedfm.aggregators.mean import none, weighted_mean
from fedfm.aggregators.robust import (
  geometric_median,
  krum,
  median,
  trimmed_mean,
)

__all__ = [
  "geometric_median",
  "krum",
  "median",
  "none",
  "trimmed_mean",
  "weighted_mean",
]
