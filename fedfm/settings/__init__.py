"""A run's settings: typed, checked, with a unit and a meaning each.

A loose config (nested dicts, from a file and flags) becomes `Settings` here and
nowhere else; below `experiment.py` nothing sees all of it.
"""

from fedfm.settings.checks import expect, expect_default, get
from fedfm.settings.convert import (
  call_with_options,
  convert,
  field_type,
  from_dict,
  to_dict,
)
from fedfm.settings.schema import (
  ClientSettings,
  DataSettings,
  EvalSettings,
  ServerSettings,
  Settings,
)

__all__ = [
  "ClientSettings",
  "DataSettings",
  "EvalSettings",
  "ServerSettings",
  "Settings",
  "call_with_options",
  "convert",
  "expect",
  "expect_default",
  "field_type",
  "from_dict",
  "get",
  "to_dict",
]
