"""Checkpoints that are never silently wrong: written whole and checked."""

from fedfm.checkpoint import weights
from fedfm.checkpoint.checkpointer import Checkpointer
from fedfm.checkpoint.items import Item
from fedfm.checkpoint.manifest import (
  DamagedError,
  digest,
  json_digest,
  versions,
)
from fedfm.checkpoint.placing import abstract

__all__ = [
  "Checkpointer",
  "DamagedError",
  "Item",
  "abstract",
  "digest",
  "json_digest",
  "versions",
  "weights",
]
