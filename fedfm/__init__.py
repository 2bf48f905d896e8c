"""fedfm: federated learning of foundation models in JAX."""

import importlib

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

# Imports orbax and ml_collections: on first use, so that `import fedfm` is fast.
_LAZY = ("baselines", "checkpoint", "experiment")


def __getattr__(name: str):
  if name in _LAZY:
    return importlib.import_module(f"fedfm.{name}")
  raise AttributeError(f"module 'fedfm' has no attribute {name!r}")


__all__ = [
    "ShardingRules",
    "adapters",
    "aggregators",
    "algorithms",
    "clients",
    "data",
    "experiment",
    "errors",
    "make_mesh",
    "models",
    "sharding",
    "trees",
    "types",
]
