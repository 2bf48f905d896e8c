"""Which layers have a sliding window, in config.json."""

from collections.abc import Sequence
from typing import Any

from fedfm.models.decoder_config import DecoderConfig
from fedfm.models.families.family import Fields

_KINDS = {"full_attention": False, "sliding_attention": True}


def read_layers(
  fields: Fields, window: int | None, default: Sequence[bool]
) -> dict[str, Any]:
  """Reads `layer_types`.

  Args:
    fields: Of config.json.
    window: The sliding window of the layers that have one.
    default: Which layers have it where the field is absent.

  Returns:
    `sliding_window` and `sliding_layers` of `DecoderConfig`.

  Raises:
    CheckpointError: An unknown kind of layer, or no window for one.
  """
  names = fields.get("layer_types", list, None)
  if names is None:
    local = list(default)
  else:
    for name in names:
      if not isinstance(name, str) or name not in _KINDS:
        raise fields.error(
          f"layer_types holds {name!r}, expected one of {', '.join(_KINDS)}"
        )
    if len(names) != len(default):
      raise fields.error(
        f"layer_types names {len(names)} layers, expected {len(default)}"
      )
    local = [_KINDS[name] for name in names]
  if not any(local):
    return {"sliding_window": None, "sliding_layers": None}
  if window is None:
    raise fields.error("layer_types: sliding_attention needs sliding_window")
  return {
    "sliding_window": window,
    "sliding_layers": None if all(local) else tuple(local),
  }


def write_layers(config: DecoderConfig) -> dict[str, Any]:
  """Writes what `read_layers` reads, and the window."""
  names = {local: name for name, local in _KINDS.items()}
  return {
    "sliding_window": config.sliding_window,
    "layer_types": [
      names[config.has_window(i)] for i in range(config.num_layers)
    ],
  }
