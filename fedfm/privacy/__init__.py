"""Differential privacy of clients, what it costs, and secure aggregation."""

from fedfm.privacy.accounting import (
  Accounting,
  Event,
  epsilon,
  noise_multiplier,
  sensitivity,
)
from fedfm.privacy.clip import clip
from fedfm.privacy.gaussian import gaussian
from fedfm.privacy.ledger import Ledger
from fedfm.privacy.mechanism import Mechanism, Release
from fedfm.privacy.secure_sum import secure_aggregation

__all__ = [
  "Accounting",
  "Event",
  "Ledger",
  "Mechanism",
  "Release",
  "clip",
  "epsilon",
  "gaussian",
  "noise_multiplier",
  "secure_aggregation",
  "sensitivity",
]
