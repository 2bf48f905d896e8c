"""Whole modules beside an adapter in PEFT's files: its `modules_to_save`.

A module's tensors have their own names there, after `peft_modules.PREFIX`. PEFT
finds modules by what their names end in, letters and not words: "norm" is
"input_layernorm" too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedfm import errors
from fedfm.adapters import peft_modules
from fedfm.adapters.adapter import parameters
from fedfm.models import families
from fedfm.models.model import Model

# What PEFT saves whole, whatever it holds, where texts are classified.
_CLASSIFIER = "classifier"


def _by_tensor(model: Model) -> dict[str, list[families.TensorRow]]:
  """Our parameters by the tensor of the files that they are parts of."""
  shapes = parameters(model.shapes)
  tensors: dict[str, list[families.TensorRow]] = {}
  for row in families.family_of(model.config).tensors:
    if row.path in shapes:
      tensors.setdefault(row.name, []).append(row)
  return tensors


def _module(name: str) -> str:
  return name.removesuffix(".weight").removesuffix(".bias")


def _names(name: str, layers: int) -> list[str]:
  """Names in the file, one a layer."""
  count = layers if "{i}" in name else 1
  return [peft_modules.PREFIX + name.format(i=i) for i in range(count)]


def paths(model: Model, tensors: Mapping[str, Any]) -> list[str]:
  """Finds our parameters that a file has whole.

  Args:
    model: The model.
    tensors: The file's, by name.

  Returns:
    Their paths.
  """
  shapes = parameters(model.shapes)
  return [
    row.path
    for name, rows in _by_tensor(model).items()
    for row in rows
    if any(n in tensors for n in _names(name, shapes[row.path].shape[0]))
  ]


def read(
  model: Model, chosen: Sequence[str], read_fn: peft_modules.Read
) -> dict[str, np.ndarray]:
  """Reads parameters.

  Args:
    model: The model.
    chosen: From `paths`.
    read_fn: Gives a tensor.

  Returns:
    {path: parameter}, in our layout.
  """
  shapes, found = parameters(model.shapes), {}
  for name, rows in _by_tensor(model).items():
    if rows[0].path not in chosen:
      continue
    stacked = "{i}" in name
    sizes = [shapes[row.path].shape[-1] for row in rows]
    first = shapes[rows[0].path].shape
    own = (*first[1 if stacked else 0 : -1], sum(sizes))
    names = _names(name, first[0])
    whole = [
      read_fn(n, own[::-1]).T if rows[0].transpose else read_fn(n, own)
      for n in names
    ]
    together = np.stack(whole) if stacked else whole[0]
    parts = np.split(together, np.cumsum(sizes)[:-1], axis=-1)
    found |= {row.path: part for row, part in zip(rows, parts)}
  return found


def write(
  model: Model, trained: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
  """Lays parameters out.

  Args:
    model: The model.
    trained: {path: parameter}, on the host.

  Returns:
    Name -> tensor, and the names of `modules_to_save`.

  Raises:
    CheckpointError: A part of a module only, one that PEFT would tie to
      another, or a parameter that is no module's weight or bias.
  """
  by_tensor = _by_tensor(model)
  tied = "embed" in trained and "lm_head" not in parameters(model.shapes)
  if tied and not getattr(model.config, "num_classes", 0):
    raise errors.CheckpointError(
      "adapter.also: embed is the output head too, which PEFT would untie; "
      "export the merged model"
    )
  chosen = set()
  for name, rows in by_tensor.items():
    if any(row.path in trained for row in rows):
      if _module(name) == name:
        raise errors.CheckpointError(
          f"adapter.also: {rows[0].path} is no module's weight or bias, and "
          "PEFT saves modules; export the merged model"
        )
      chosen.add(_root(name))
  tensors = {}
  for name, rows in by_tensor.items():
    if _root(name) not in chosen:
      continue
    absent = [row.path for row in rows if row.path not in trained]
    if absent:
      raise errors.CheckpointError(
        f"adapter.also: {absent[0]} is part of {_root(name)}, which PEFT saves "
        "whole; train it too"
      )
    whole = np.concatenate([trained[row.path] for row in rows], axis=-1)
    layers = whole if "{i}" in name else whole[None]
    names = _names(name, len(layers))
    tensors |= {
      n: x.T if rows[0].transpose else x for n, x in zip(names, layers)
    }
  others = {_root(name) for name in by_tensor} - chosen
  return tensors, sorted(_ending(name, others) for name in chosen)


def _root(name: str) -> str:
  """The module that PEFT saves for a tensor."""
  is_classifier = name.partition(".")[0] == _CLASSIFIER
  return _CLASSIFIER if is_classifier else _module(name)


def _ending(name: str, others: set[str]) -> str:
  """The shortest end of a module's name that no other's has."""
  words = name.split(".")
  for first in reversed(range(len(words))):
    ending = ".".join(words[first:])
    if "{i}" in ending:
      break
    if not any(other.endswith(ending) for other in others):
      return ending
  raise errors.CheckpointError(
    f"adapter.also: {name} is named like another module, so that PEFT cannot "
    "save it alone; export the merged model"
  )
