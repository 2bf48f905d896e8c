"""fedfm: federated learning of foundation models in JAX."""

from fedfm import errors
from fedfm import types
from fedfm import trees
from fedfm import sharding
from fedfm import models
from fedfm import adapters
from fedfm import clients
from fedfm import aggregators
from fedfm import algorithms
from fedfm import data
from fedfm.sharding import ShardingRules, make_mesh

__version__ = "0.1.0"

__all__ = [
    "ShardingRules",
    "adapters",
    "aggregators",
    "algorithms",
    "clients",
    "data",
    "errors",
    "make_mesh",
    "models",
    "sharding",
    "trees",
    "types",
]
