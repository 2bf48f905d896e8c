"""Trainables: which weights clients train."""

from fedfm.adapters.adapter import Adapter, loss_apply
from fedfm.adapters.lora import lora
from fedfm.adapters.partial import full, head, subset

__all__ = ["Adapter", "full", "head", "lora", "loss_apply", "subset"]
