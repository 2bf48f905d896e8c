"""What a client does, and how a cohort of them runs on lanes."""

from fedfm.clients.cohort import put
from fedfm.clients.engine import CohortResult, run_cohort
from fedfm.clients.local import local_update

__all__ = ["CohortResult", "local_update", "put", "run_cohort"]
