"""What a client does, and how a cohort of them runs on lanes."""

from fedfm.clients.accumulation import accumulated
from fedfm.clients.cohort import check_lanes, own_lanes, put, put_rounds
from fedfm.clients.engine import CohortResult, run_cohort
from fedfm.clients.local import local_update
from fedfm.clients.naming import naming_clients

__all__ = [
  "check_lanes",
  "CohortResult",
  "accumulated",
  "local_update",
  "naming_clients",
  "own_lanes",
  "put",
  "put_rounds",
  "run_cohort",
]
