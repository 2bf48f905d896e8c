"""The classes of a classifier in config.json, which are its labels' names."""

from typing import Any

from fedfm.models.families.family import Fields


def read(fields: Fields) -> dict[str, Any]:
  """Reads `num_classes` off the labels' names; there are 2 by default."""
  labels = fields.get("id2label", dict, None)
  if labels is None:
    return {"num_classes": fields.get("num_labels", int, 2)}
  return {"num_classes": len(labels)}


def write(config: Any) -> dict[str, Any]:
  """Names the labels as transformers does."""
  names = [f"LABEL_{i}" for i in range(config.num_classes)]
  return {
    "id2label": {str(i): name for i, name in enumerate(names)},
    "label2id": {name: i for i, name in enumerate(names)},
  }
