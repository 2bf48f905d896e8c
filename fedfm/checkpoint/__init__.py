"""Checkpoints that are never silently wrong: written whole and checked."""

from fedfm.checkpoint.checkpointer import Checkpointer, abstract
from fedfm.checkpoint.manifest import DamagedError, digest

__all__ = ["Checkpointer", "DamagedError", "abstract", "digest"]
