"""Federated algorithms, one file a paper."""

from fedfm.algorithms.algorithm import federated
from fedfm.algorithms.fedavg import fedavg
from fedfm.algorithms.fedopt import (
  fedadagrad,
  fedadam,
  fedavgm,
  fedopt,
  fedyogi,
  server_adagrad,
  server_adam,
  server_yogi,
)
from fedfm.algorithms.fedprox import fedprox

__all__ = [
  "fedadagrad",
  "fedadam",
  "fedavg",
  "fedavgm",
  "federated",
  "fedopt",
  "fedprox",
  "fedyogi",
  "server_adagrad",
  "server_adam",
  "server_yogi",
]
