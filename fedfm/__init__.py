"""fedfm: federated learning of foundation models in JAX."""

import importlib

from fedfm import (
  adapters,
  aggregators,
  algorithms,
  clients,
  compression,
  data,
  errors,
  models,
  privacy,
  sharding,
  trees,
  types,
)
from fedfm.sharding import ShardingRules, make_mesh

__version__ = "0.1.0"

# These import orbax: on first use, so that `import fedfm` is fast.
_LAZY = ("baselines", "checkpoint", "experiment", "model_folders")


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
  "compression",
  "data",
  "experiment",
  "errors",
  "make_mesh",
  "models",
  "privacy",
  "sharding",
  "trees",
  "types",
]
