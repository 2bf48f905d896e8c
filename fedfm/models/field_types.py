"""Checks the types of a model's config, which JSON and users may get wrong."""

import dataclasses
from typing import Any

from fedfm import errors

FLOATS = ("float64", "float32", "float16", "bfloat16")


def check(config: Any) -> None:
  """Refuses a field of another type than its class declares.

  Args:
    config: A dataclass; its fields of whole numbers and booleans, and the names
      of dtypes, are checked.

  Raises:
    ConfigError: Names the field, its value and what is expected.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.name in ("dtype", "param_dtype"):
      ok, expected = value in FLOATS, f"one of {', '.join(FLOATS)}"
    elif field.type is bool:
      ok, expected = isinstance(value, bool), "True or False"
    elif field.type in (int, int | None):
      if value is not None or field.type is int:
        check_whole(field.name, value)
      continue
    else:
      continue
    if not ok:
      raise errors.ConfigError(
        f"model.{field.name}: got {value!r}, expected {expected}"
      )


def check_whole(name: str, value: Any) -> None:
  """Raises ConfigError for what is no whole number; numpy's are."""
  if isinstance(value, bool) or not hasattr(value, "__index__"):
    raise errors.ConfigError(
      f"model.{name}: got {value!r}, expected a whole number"
    )
