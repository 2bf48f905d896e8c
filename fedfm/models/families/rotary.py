"""Rotary positions in config.json, in the layouts of transformers 4 and 5.

Version 4 has `rope_theta` and `rope_scaling`; version 5 has both of them in
`rope_parameters`, with one such object a kind of layer where kinds differ. Both
are read; both are written.
"""

import dataclasses
from typing import Any

from fedfm import errors
from fedfm.models import rope
from fedfm.models.decoder_config import DecoderConfig
from fedfm.models.families.family import REQUIRED, Fields

_ORIGINAL = "original_max_position_embeddings"
# What a scaling's object may hold besides the scaling's own fields.
_BESIDE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
# Other names of a kind, in old files.
_OLD_NAMES = {"su": "longrope"}


def read_rope(fields: Fields, partial: bool = False) -> dict[str, Any]:
  """Reads what all rotary families share.

  Args:
    fields: Of config.json.
    partial: Whether the family can rotate a part of a head only.

  Returns:
    `rope_theta`, `rope_scaling` and `rotary_fraction` of `DecoderConfig`.

  Raises:
    CheckpointError: A kind that is not known, or a malformed one.
  """
  found: dict[str, Any] = {
    "rope_theta": fields.get("rope_theta", float, 10_000.0),
    "rotary_fraction": fields.get("partial_rotary_factor", float, 1.0),
    "rope_scaling": None,
  }
  for name in ("rope_parameters", "rope_scaling"):
    values = fields.get(name, dict, {})
    if values:
      found |= read_scaling(fields, name, values)
  if found["rotary_fraction"] != 1 and not partial:
    raise fields.error(
      f"partial_rotary_factor is {found['rotary_fraction']}, only 1.0 is "
      "supported"
    )
  return found


def read_scaling(
  fields: Fields, name: str, values: dict[str, Any]
) -> dict[str, Any]:
  """Reads one object of rotary parameters.

  Args:
    fields: Of config.json.
    name: The object's name there, for messages.
    values: The object.

  Returns:
    `rope_scaling` of `DecoderConfig`, and those of `rope_theta` and
    `rotary_fraction` that it gives.

  Raises:
    CheckpointError: A kind that is not known, or a malformed one.
  """
  inner = Fields(fields.path, values, f"{name}.")
  result: dict[str, Any] = {"rope_scaling": None}
  for key, ours in (
    ("rope_theta", "rope_theta"),
    ("partial_rotary_factor", "rotary_fraction"),
  ):
    if values.get(key) is not None:
      result[ours] = inner.get(key, float)
  kind = values.get("rope_type", values.get("type", "default"))
  if isinstance(kind, str):
    kind = _OLD_NAMES.get(kind, kind)
  is_plain = kind == "default"
  if not isinstance(kind, str) or not (is_plain or kind in rope.SCALINGS):
    raise fields.error(
      f"{name} of kind {kind!r} is not supported, only 'default', "
      f"{', '.join(map(repr, rope.SCALINGS))}"
    )
  scaling = None if is_plain else rope.SCALINGS[kind]
  known = {f.name: f for f in dataclasses.fields(scaling)} if scaling else {}
  for key, value in values.items():
    if value is not None and key not in known and key not in _BESIDE:
      names = [*known, *_BESIDE]
      raise fields.error(f"{name}: unknown {key!r}{errors.nearest(key, names)}")
  if scaling is None:
    return result
  if _ORIGINAL in known:
    # The whole config's own comes first, and the longest is the default.
    longest = fields.get("max_position_embeddings", int, 2048)
    original = inner.get(_ORIGINAL, int, longest)
    original = fields.get(_ORIGINAL, int, original)
    inner = Fields(fields.path, values | {_ORIGINAL: original}, f"{name}.")
  arguments = {key: _argument(inner, field) for key, field in known.items()}
  try:
    return result | {"rope_scaling": scaling(**arguments)}
  except errors.ConfigError as e:
    raise fields.error(f"{name}.{e}") from None


def _argument(inner: Fields, field: Any) -> Any:
  """Reads one field of a scaling, by the type that its class declares."""
  missing = field.default is dataclasses.MISSING
  default = REQUIRED if missing else field.default
  if field.type in (int, bool):
    return inner.get(field.name, field.type, default)
  if field.type in (float, float | None):
    return inner.get(field.name, float, default)
  numbers = inner.get(field.name, list)
  if not all(type(x) in (int, float) for x in numbers):
    raise inner.error(f"{field.name} is {numbers!r}, expected numbers")
  return tuple(map(float, numbers))


def write_rope(config: DecoderConfig) -> dict[str, Any]:
  """Writes what `read_rope` reads.

  Args:
    config: The decoder's.

  Returns:
    Fields of config.json.
  """
  shared: dict[str, Any] = {"rope_theta": config.rope_theta}
  if config.rotary_fraction != 1:
    shared["partial_rotary_factor"] = config.rotary_fraction
  scaling = write_scaling(config)
  return shared | {
    "rope_scaling": scaling if config.rope_scaling else None,
    "rope_parameters": shared | scaling,
  }


def write_scaling(config: DecoderConfig) -> dict[str, Any]:
  """Writes a scaling, or that there is none, as an object with its kind."""
  scaling: Any = config.rope_scaling
  if scaling is None:
    return {"rope_type": "default"}
  kind = next(k for k, v in rope.SCALINGS.items() if isinstance(scaling, v))
  values = dataclasses.asdict(scaling)
  return {"rope_type": kind} | {
    name: list(value) if isinstance(value, tuple) else value
    for name, value in values.items()
    if value is not None
  }
