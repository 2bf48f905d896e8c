"""From loose values, of a file or a command line, to typed settings."""

import ast
from collections.abc import Callable, Mapping
import dataclasses
import inspect
import types
import typing
from typing import Any

from fedfm import errors
from fedfm.settings.schema import Options, Settings

Scalar = int | float | bool | str
_MOST_INTEGER = 2**63 - 1


def from_dict(values: Mapping[str, Any]) -> Settings:
  """Checks a nested dict and fills in defaults.

  Args:
    values: Field -> value, nested like `Settings`; `ConfigDict.to_dict()`.

  Returns:
    The settings.

  Raises:
    ConfigError: Unknown field (with the nearest real one), wrong type, or a
      value out of range.

  Examples:
    >>> from_dict({"rounds": 3}).rounds
    3
  """
  return _build(Settings, values, "")


def to_dict(settings: Settings) -> dict[str, Any]:
  """Returns a nested dict of JSON values; the inverse of `from_dict`."""
  return _lists(dataclasses.asdict(settings))


def _lists(value: Any) -> Any:
  """Turns tuples into lists, as JSON would."""
  if isinstance(value, dict):
    return {name: _lists(x) for name, x in value.items()}
  return [_lists(x) for x in value] if isinstance(value, tuple) else value


def _build(cls: type, values: Any, prefix: str) -> Any:
  if not isinstance(values, Mapping):
    raise errors.ConfigError(
      f"{prefix.rstrip('.') or 'config'}: got {errors.short(values)}, expected "
      "fields"
    )
  fields = {f.name: f for f in dataclasses.fields(cls)}
  hints = typing.get_type_hints(cls)
  built = {}
  for name, value in values.items():
    if name not in fields:
      raise errors.ConfigError(
        f"{prefix}{name}: unknown field{errors.nearest(str(name), fields)}"
      )
    kind = hints[name]
    if kind == Options:
      built[name] = _options(value, f"{prefix}{name}")
    elif dataclasses.is_dataclass(kind):
      built[name] = _build(kind, value, f"{prefix}{name}.")
    else:
      built[name] = convert(value, kind, f"{prefix}{name}")
  return cls(**built)


def _options(values: Any, field: str) -> Options:
  """Checks a flat mapping; the names are checked where they are used."""
  if not isinstance(values, Mapping):
    raise errors.ConfigError(
      f"{field}: got {errors.short(values)}, expected fields"
    )
  for name, value in values.items():
    parts = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(x, Scalar) for x in parts):
      raise errors.ConfigError(
        f"{field}.{name}: got {errors.short(value)}, expected a number, a "
        "string, or a list"
      )
    for x in parts:
      _check_integer(x, f"{field}.{name}")
  return {
    str(name): list(value) if isinstance(value, tuple) else value
    for name, value in values.items()
  }


def convert(value: Any, kind: Any, field: str) -> Any:
  """Checks a value against a field's type; lossless conversions only.

  Args:
    value: What was given; strings of a command line are parsed.
    kind: int, float, bool, str, `tuple[str, ...]`, `tuple[int, ...]`, `int |
      str`, or one of these `| None`.
    field: The field's dotted name, for messages.

  Returns:
    The value in the field's type.

  Raises:
    ConfigError: It does not fit.
  """
  if kind is Scalar:
    value = _literal(value)
    _check_integer(value, field)
    return value
  _check_integer(value, field)
  if isinstance(kind, types.UnionType) and type(None) in typing.get_args(kind):
    if value is None or value == "None":
      return None
    kinds = [k for k in typing.get_args(kind) if k is not type(None)]
    kind = kinds[0] if len(kinds) == 1 else int | str
  if kind == int | str:
    text = str(value)
    is_number = text.lstrip("-").isdigit() and not isinstance(value, bool)
    kind, value = (int, text) if is_number else (str, value)
  try:
    if kind is bool:
      if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}[
          value.lower()
        ]
      if isinstance(value, bool):
        return value
    elif kind is int:
      if isinstance(value, str):
        value = int(value)
        _check_integer(value, field)
      if isinstance(value, int) and not isinstance(value, bool):
        return value
    elif kind is float:
      if isinstance(value, str | int | float) and not isinstance(value, bool):
        return float(value)
    elif kind is str:
      if isinstance(value, str):
        return _check_text(value, field)
    elif typing.get_origin(kind) is tuple:
      if isinstance(value, str):
        value = [v.strip(" '\"") for v in value.strip("()[] ").split(",")]
        value = [v for v in value if v]
      item = typing.get_args(kind)[0]
      if item is not str:
        return tuple(convert(v, item, field) for v in value)
      if all(isinstance(v, str) for v in value):
        return tuple(value)
  except (KeyError, ValueError, TypeError):
    pass
  raise errors.ConfigError(
    f"{field}: got {errors.short(value)}, expected {_type_name(kind)}"
  )


def _check_integer(value: Any, field: str) -> None:
  """Refuses integers that no array and no JSON reader holds."""
  if isinstance(value, int) and abs(value) > _MOST_INTEGER:
    raise errors.ConfigError(
      f"{field}: got an integer of {value.bit_length()} bits, expected one of "
      "at most 63"
    )


def _check_text(value: str, field: str) -> str:
  """Refuses what no file can be called."""
  if "\0" not in value and value == value.encode(errors="ignore").decode():
    return value
  raise errors.ConfigError(
    f"{field}: got {errors.short(value)}, expected text without NUL and lone "
    "surrogates"
  )


def _literal(value: Any) -> Any:
  """Reads a command line's text as the number, truth value or list it is."""
  if not isinstance(value, str):
    return value
  try:
    parsed = ast.literal_eval(value)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return {"true": True, "false": False}.get(value.lower(), value)
  return parsed if isinstance(parsed, Scalar | list | tuple) else value


def _type_name(kind: Any) -> str:
  if isinstance(kind, types.UnionType):
    return " or ".join(k.__name__ for k in typing.get_args(kind))
  if typing.get_origin(kind) is tuple:
    return f"a list of {typing.get_args(kind)[0].__name__}"
  return kind.__name__


def field_type(path: str) -> Any:
  """Returns the type of a dotted field such as "model.path".

  Args:
    path: Dotted field.

  Returns:
    A type that `convert` takes, or a dataclass for a group of fields; of an
    option, `Scalar`.

  Raises:
    ConfigError: Unknown field.
  """
  cls: Any = Settings
  done = ""
  for name in path.split("."):
    if cls == Options:
      return Scalar
    hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
    if name not in hints:
      raise errors.ConfigError(
        f"{path}: unknown field"
        + errors.nearest(done + name, [done + h for h in hints])
      )
    cls, done = hints[name], f"{done}{name}."
  return cls


def call_with_options(
  factory: Callable[..., Any],
  arguments: Mapping[str, Any],
  options: Options,
  field: str,
) -> Any:
  """Calls a factory with what the caller builds and what a config gives it.

  Args:
    factory: Its parameters of plain types (numbers, strings) that `arguments`
      lacks are its options.
    arguments: Parameters that are not for a config to give.
    options: From the config, by name.
    field: The config's field, for messages.

  Returns:
    What the factory returns.

  Raises:
    ConfigError: An unknown option (lists the known), one of another type, or a
      missing one; and what the factory raises, under the option's full name.

  Examples:
    >>> def make(size, *, rate: float = 0.1):
    ...   return size * rate
    >>> call_with_options(make, {"size": 4}, {"rate": "0.5"}, "options")
    2.0
  """
  takes = inspect.signature(factory, eval_str=True).parameters
  hints = {
    name: p.annotation
    for name, p in takes.items()
    if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    and name not in arguments
  }
  known = {name: kind for name, kind in hints.items() if _is_plain(kind)}
  given = {}
  for name, value in options.items():
    if name not in known:
      hint = errors.nearest(name, known) if known else " (there are none)"
      raise errors.ConfigError(f"{field}.{name}: unknown option{hint}")
    given[name] = convert(value, known[name], f"{field}.{name}")
  for name in known:
    if takes[name].default is inspect.Parameter.empty and name not in given:
      raise errors.ConfigError(f"{field}.{name}: missing, expected a value")
  try:
    return factory(**arguments, **given)
  except errors.ConfigError as e:
    if str(e).partition(":")[0] in known:
      raise errors.ConfigError(f"{field}.{e}") from None
    raise


def _is_plain(kind: Any) -> bool:
  if isinstance(kind, types.UnionType):
    return all(_is_plain(k) for k in typing.get_args(kind))
  if typing.get_origin(kind) is tuple:
    return _is_plain(typing.get_args(kind)[0])
  return kind in (int, float, bool, str, type(None))
