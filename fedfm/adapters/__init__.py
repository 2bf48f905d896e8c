"""Trainables: which weights clients train."""

from fedfm.adapters import peft
from fedfm.adapters.adapter import (
  Adapter,
  loss_apply,
  loss_unembed,
  train_loss,
)
from fedfm.adapters.bitfit import bitfit
from fedfm.adapters.bottleneck import houlsby, pfeiffer
from fedfm.adapters.dora import dora
from fedfm.adapters.export import export
from fedfm.adapters.full import full
from fedfm.adapters.head import head
from fedfm.adapters.ia3 import ia3
from fedfm.adapters.last_layers import last_layers
from fedfm.adapters.lora import lora
from fedfm.adapters.maple import maple
from fedfm.adapters.prefix_tuning import prefix_tuning
from fedfm.adapters.prompt_tuning import prompt_tuning
from fedfm.adapters.subset import subset
from fedfm.adapters.with_parameters import with_parameters

__all__ = [
  "Adapter",
  "bitfit",
  "dora",
  "export",
  "full",
  "head",
  "houlsby",
  "ia3",
  "last_layers",
  "lora",
  "loss_apply",
  "loss_unembed",
  "maple",
  "peft",
  "pfeiffer",
  "prefix_tuning",
  "prompt_tuning",
  "subset",
  "train_loss",
  "with_parameters",
]
