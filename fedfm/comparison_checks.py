"""Checks of a comparison's fields, before any arm is built."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import math
import numbers
from typing import Any

from fedfm import errors


def check_fields(values: Mapping[str, Any]) -> None:
  """Checks the types and ranges of what a comparison is made of.

  Args:
    values: As in `comparison.from_dict`; fields may be missing.

  Raises:
    ConfigError: A field that is mistyped or out of range.
  """
  for name, value in values.items():
    _CHECKS[name](name, value)


def _refuse(name: str, got: Any, expected: str) -> None:
  raise errors.ConfigError(f"{name}: got {got!r}, expected {expected}")


def _is_list(value: Any) -> bool:
  return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_number(value: Any) -> bool:
  is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  return is_real and math.isfinite(value)


def _check_fields_of(name: str, value: Any) -> None:
  if not isinstance(value, Mapping):
    _refuse(name, value, "fields of the settings, by name")


def _check_arms(name: str, value: Any) -> None:
  if not isinstance(value, Mapping):
    _refuse(name, value, "for each name, the fields that differ from base")
  for arm, changes in value.items():
    if not isinstance(arm, str):
      _refuse(name, arm, "names that are strings")
    _check_fields_of(f"{name}.{arm}", changes)


def _check_distinct(name: str, values: Iterable[Any]) -> None:
  seen = set()
  for value in values:
    if value in seen:
      _refuse(name, value, "each one once")
    seen.add(value)


def _check_seeds(name: str, value: Any) -> None:
  expected = "integers from 0 to 2**32 - 1"
  if not _is_list(value):
    _refuse(name, value, f"a list of {expected}")
  for seed in value:
    is_integer = isinstance(seed, numbers.Integral)
    is_integer = is_integer and not isinstance(seed, bool)
    if not is_integer or not 0 <= int(seed) < 2**32:
      _refuse(name, seed, expected)
  _check_distinct(name, value)


def _check_rates(name: str, value: Any) -> None:
  expected = "finite numbers above 0"
  if not _is_list(value) or not value:
    _refuse(name, value, f"a list of at least one of {expected}")
  for rate in value:
    if not _is_number(rate) or rate <= 0:
      _refuse(name, rate, expected)
  _check_distinct(name, value)


def _check_metric(name: str, value: Any) -> None:
  if not isinstance(value, str):
    _refuse(name, value, "the name of a metric, such as 'eval/unseen/loss'")


def _check_own_metrics(name: str, value: Any) -> None:
  if not isinstance(value, Mapping):
    _refuse(name, value, "{arm: the name of its metric}")
  for arm, metric in value.items():
    _check_metric(f"{name}.{arm}", metric)


def _check_columns(name: str, value: Any) -> None:
  if not _is_list(value):
    _refuse(name, value, "a list of names of metrics")
  for metric in value:
    _check_metric(name, metric)


def _check_target(name: str, value: Any) -> None:
  if value is not None and not _is_number(value):
    _refuse(name, value, "a finite number, or None")


def _check_bool(name: str, value: Any) -> None:
  if not isinstance(value, bool):
    _refuse(name, value, "True or False")


_CHECKS: dict[str, Callable[[str, Any], None]] = {
  "base": _check_fields_of,
  "arms": _check_arms,
  "seeds": _check_seeds,
  "tuning_seeds": _check_seeds,
  "rates": _check_rates,
  "server_rates": _check_rates,
  "metric": _check_metric,
  "own_metrics": _check_own_metrics,
  "columns": _check_columns,
  "target": _check_target,
  "higher_is_better": _check_bool,
}
