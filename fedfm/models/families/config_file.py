"""Reads and writes config.json by a family's tables."""

import dataclasses
import pathlib
from typing import Any

from fedfm import errors
from fedfm.models import decoder_config, tensor_files
from fedfm.models.families import (
  bert,
  clip,
  emnist_cnn,
  gemma,
  gpt2,
  llama,
  olmo2,
  phi3,
  vit,
)
from fedfm.models.families.family import ACTIVATIONS, Family, Fields

FAMILIES = {
  family.architecture: family
  for family in (
    llama.LLAMA,
    llama.MISTRAL,
    llama.QWEN2,
    llama.QWEN3,
    gemma.GEMMA2,
    gemma.GEMMA3,
    gpt2.GPT2,
    olmo2.OLMO2,
    phi3.PHI3,
    *bert.FAMILIES,
    *vit.FAMILIES,
    clip.CLIP,
    emnist_cnn.EMNIST_CNN,
  )
}


def family_of(config: Any) -> Family:
  """Returns the family that a model is written as.

  Args:
    config: The model's.

  Returns:
    The family.

  Raises:
    ConfigError: `config.architecture` names none.
  """
  name = config.architecture
  if name not in FAMILIES:
    raise errors.ConfigError(
      f"model.architecture: got {name!r}{errors.nearest(name, FAMILIES)}"
    )
  return FAMILIES[name]


def write_config(config: Any, dtype: str) -> dict[str, Any]:
  """Builds config.json.

  Args:
    config: The model's.
    dtype: Dtype of the weights.

  Returns:
    A JSON object.

  Raises:
    ConfigError: An option that the family's format cannot say.
  """
  family = family_of(config)
  values = {
    "architectures": [family.architecture],
    "model_type": family.model_type,
    **family.fixed,
    **_activation(family, config),
    **{row.name: getattr(config, row.field) for row in family.fields},
    **family.write(config),
    "torch_dtype": dtype,
  }
  again = _decode(family, Fields(pathlib.Path("config.json"), values))
  for option in dataclasses.fields(family.config):
    name = option.name
    wanted, got = getattr(config, name), getattr(again, name)
    if name not in decoder_config.EXECUTION and wanted != got:
      raise errors.ConfigError(
        f"model.{name}: {wanted!r} cannot be said in the format of "
        f"{family.architecture}, whose models have {got!r}"
      )
  return values


def _activation(family: Family, config: Any) -> dict[str, str]:
  if family.activation is None:
    return {}
  field, default = family.activation
  names = [n for n, ours in ACTIVATIONS.items() if ours == config.activation]
  return {field: default if default in names else names[0]}


def with_classifier(config: Any, num_classes: int) -> Any:
  """Changes a config to that of a classifier on the same layers.

  Args:
    config: What a folder says of its model.
    num_classes: Classes to tell apart.

  Returns:
    The config, with a classifier in the place of whatever head it had.

  Raises:
    ConfigError: A model that no classifier goes on.
  """
  name = family_of(config).classifier
  if not name:
    raise errors.ConfigError(
      f"model.num_classes: got {num_classes}, but {config.architecture} takes "
      "no classifier, expected 0"
    )
  return dataclasses.replace(
    config,
    architecture=name,
    num_classes=num_classes,
    **FAMILIES[name].options,
  )


def read_config(path: pathlib.Path) -> tuple[Family, Any]:
  """Reads config.json strictly.

  What transformers reads is read, or must have the only value that is
  supported; what it ignores is ignored.

  Args:
    path: The file.

  Returns:
    The family and our own config.

  Raises:
    CheckpointError: An unknown architecture, or a field that is missing,
      malformed or asks for what the model cannot do.
  """
  return parse_config(path, tensor_files.read_json(path))


def parse_config(
  path: pathlib.Path, values: dict[str, Any]
) -> tuple[Family, Any]:
  """Does what `read_config` does, with the content of the file.

  Args:
    path: What to name in messages.
    values: A JSON object.

  Returns:
    The family and our own config.

  Raises:
    CheckpointError: As `read_config` does.
  """
  names = values.get("architectures")
  if names:
    where = "architectures"
    if not isinstance(names, list) or not all(type(x) is str for x in names):
      raise errors.CheckpointError(
        f"{path}: architectures is {names!r}, which is not supported: expected "
        "a list of one name"
      )
  else:
    kind = values.get("model_type")
    where = f"model_type {kind!r}, and architectures is missing"
    names = [n for n, family in FAMILIES.items() if family.model_type == kind]
  if len(names) > 1:
    raise errors.CheckpointError(
      f"{path}: {where}: {', '.join(names)}; expected architectures to name one"
    )
  if not names or names[0] not in FAMILIES:
    given = f"architecture {names[0]}" if names else where
    raise errors.CheckpointError(
      f"{path}: {given} is not supported, only {', '.join(FAMILIES)}"
    )
  family = FAMILIES[names[0]]
  return family, _decode(family, Fields(path, values))


def _decode(family: Family, fields: Fields) -> Any:
  """Turns the fields of config.json to options of the model."""
  for name, expected in {**family.fixed, "quantization_config": None}.items():
    value = fields.values.get(name)
    if value is not None and value != expected:
      raise fields.error(f"{name} is {value!r}, only {expected!r} is supported")
  options: dict[str, Any] = {
    "architecture": family.architecture,
    **family.options,
  }
  if family.activation is not None:
    name, default = family.activation
    activation = fields.get(name, str, default)
    if activation not in ACTIVATIONS:
      raise fields.error(
        f"{name} is {activation!r}, expected one of {', '.join(ACTIVATIONS)}"
      )
    options["activation"] = ACTIVATIONS[activation]
  for row in family.fields:
    options[row.field] = fields.get(
      row.name, row.kind, row.default, nullable=row.nullable
    )
  try:
    return family.config(**(options | family.read(fields)))
  except errors.ConfigError as e:
    raise errors.CheckpointError(f"{fields.path}: {e}") from None
