"""Hugging Face's architectures, a table each: names, sizes, layouts.

A `Family` is read both ways, by `load` and by `save` in
`fedfm.models.huggingface`: a new architecture is a new table.
"""

from fedfm.models.families.config_file import (
  FAMILIES,
  family_of,
  parse_config,
  read_config,
  with_classifier,
  write_config,
)
from fedfm.models.families.family import Family, FieldRow, TensorRow

__all__ = [
  "FAMILIES",
  "Family",
  "FieldRow",
  "TensorRow",
  "family_of",
  "parse_config",
  "read_config",
  "with_classifier",
  "write_config",
]
