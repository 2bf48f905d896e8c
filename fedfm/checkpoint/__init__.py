"""Checkpoints that are never silently wrong: written whole and checked."""

from fedfm.checkpoint.checkpointer import abstract
from fedfm.checkpoint.checkpointer import Checkpointer
from fedfm.checkpoint.manifest import DamagedError
from fedfm.checkpoint.manifest import digest

__all__ = ["Checkpointer", "DamagedError", "abstract", "digest"]
