"""Where an adapter's arrays are in PEFT's files.

PEFT adapts the modules of the architecture's own code, one by one. Our kernels
are stacked over layers, are the transpose of most of theirs, and may be parts
of one of theirs: GPT-2's `c_attn` is our q_proj, k_proj and v_proj. The names
and parts are those of the weights' files, `fedfm.models.families`.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import re
from typing import Any, NamedTuple

import numpy as np

from fedfm import errors
from fedfm.adapters.adapter import Adapter, parameters
from fedfm.models import families
from fedfm.models.model import Model

PREFIX = "base_model.model."
_LORA = {"a": "lora_A.weight", "b": "lora_B.weight"}
_MAGNITUDE = "lora_magnitude_vector"
_IA3 = "ia3_l"
_HEAD = "lm_head"
# read(name, shape) -> that tensor in float32, checked.
Read = Callable[[str, tuple[int, ...]], np.ndarray]


class Module(NamedTuple):
  """A module of the architecture's code that holds kernels of ours.

  Attributes:
    name: Its name, with "{i}" for the layer where there is one a layer.
    parts: Our kernels, side by side along their last dimension.
    sizes: How many outputs each has.
    rows: How many inputs they have.
    num_layers: How many there are of it; None for one outside of the layers.
    transpose: Whether its weight is [out, in], as a Linear's.
  """

  name: str
  parts: tuple[str, ...]
  sizes: tuple[int, ...]
  rows: int
  num_layers: int | None
  transpose: bool

  def tensors(self, field: str) -> list[str]:
    """Names of the tensors of one kind, one a layer."""
    layers = (0,) if self.num_layers is None else range(self.num_layers)
    return [f"{PREFIX}{self.name.format(i=i)}.{field}" for i in layers]

  def stack(self, parts: Sequence[np.ndarray]) -> np.ndarray:
    """One array of ours out of one a layer."""
    return parts[0] if self.num_layers is None else np.stack(parts)

  def split(self, whole: np.ndarray) -> list[np.ndarray]:
    """Divides outputs [..., out] among the parts."""
    return np.split(whole, np.cumsum(self.sizes)[:-1], axis=-1)

  def layers(self, x: np.ndarray) -> np.ndarray:
    """An array of ours as [layers, ...]."""
    return x[None] if self.num_layers is None else x


def modules(model: Model) -> list[Module]:
  """Lists the modules whose kernels an adapter may sit on.

  Args:
    model: A decoder.

  Returns:
    The modules, in the order of the family's table.
  """
  shapes = parameters(model.shapes)
  by_name: dict[str, list[families.TensorRow]] = {}
  for row in families.family_of(model.config).tensors:
    if row.path in (model.kernels or {}) and row.path in shapes:
      by_name.setdefault(row.name.removesuffix(".weight"), []).append(row)
  return [
    Module(
      name=name,
      parts=tuple(row.path for row in rows),
      sizes=tuple(shapes[row.path].shape[-1] for row in rows),
      rows=shapes[rows[0].path].shape[-2],
      num_layers=shapes[rows[0].path].shape[0] if "{i}" in name else None,
      transpose=rows[0].transpose,
    )
    for name, rows in by_name.items()
  ]


def shortest_names(model: Model, chosen: Sequence[Module]) -> list[str]:
  """Names modules as PEFT's `target_modules` do: by what their names end in.

  Args:
    model: A decoder.
    chosen: Some of its modules.

  Returns:
    The shortest endings that no other module of the model has; one that is
    longer than what differs between layers, for each layer.
  """
  rows = families.family_of(model.config).tensors
  others = {
    row.name.removesuffix(".weight").removesuffix(".bias") for row in rows
  }
  others -= {module.name for module in chosen}
  names = set()
  for module in chosen:
    words = module.name.split(".")
    endings = [".".join(words[i:]) for i in reversed(range(len(words)))]
    shortest = next(
      ending
      for ending in endings
      if not any(("." + other).endswith("." + ending) for other in others)
    )
    names |= {shortest.format(i=i) for i in range(module.num_layers or 1)}
  return sorted(names)


def targets(
  model: Model, tensors: Mapping[str, Any], peft_type: str
) -> list[str]:
  """Finds our kernels that a file has an adapter for.

  Args:
    model: A decoder.
    tensors: The file's, by name.
    peft_type: "LORA" or "IA3".

  Returns:
    Paths; empty where the file has none of this model's.
  """
  field = _IA3 if peft_type == "IA3" else _LORA["a"]
  return [
    path
    for module in modules(model)
    if any(name in tensors for name in module.tensors(field))
    for path in module.parts
  ]


def check_named(
  model: Model, tensors: Mapping[str, Any], named: Any, where: str
) -> None:
  """Refuses a module that a file adapts but its config does not name.

  Args:
    model: A decoder.
    tensors: The file's, by name.
    named: `target_modules`, as PEFT reads it: ends of names; or a pattern of
      whole names, or "all-linear", which is all but the output head. None says
      nothing.
    where: What to name in messages.

  Raises:
    CheckpointError: There is such a module, or `named` is none of these.
  """
  if named is None:
    return
  is_list = isinstance(named, list) and all(isinstance(x, str) for x in named)
  if not is_list and not isinstance(named, str):
    raise errors.CheckpointError(
      f"{where} is {named!r}, expected names or a pattern"
    )

  def has(name: str) -> bool:
    if isinstance(named, list):
      return any(("." + name).endswith("." + ending) for ending in named)
    return re.fullmatch(named, name) is not None

  for module in modules(model):
    for i in range(module.num_layers or 1):
      name = module.name.format(i=i)
      start = f"{PREFIX}{name}."
      # Its own weights are there where it is among `modules_to_save`.
      whole = (f"{start}weight", f"{start}bias")
      if not any(x.startswith(start) and x not in whole for x in tensors):
        continue
      try:
        ok = module.parts != (_HEAD,) if named == "all-linear" else has(name)
      except re.error as e:
        raise errors.CheckpointError(
          f"{where} is {named!r}, no pattern: {e}"
        ) from None
      if not ok:
        raise errors.CheckpointError(
          f"{where} is {named!r}, but the file adapts {name} too"
        )


def on_inputs(model: Model, tensors: Mapping[str, Any]) -> list[str]:
  """Finds our kernels whose inputs an IA3 file rescales, by its shapes."""
  return [
    path
    for module in modules(model)
    if module.tensors(_IA3)[0] in tensors
    and tensors[module.tensors(_IA3)[0]].shape[0] == 1
    for path in module.parts
  ]


def read_low_rank(
  model: Model, adapter: Adapter, read: Read
) -> dict[str, dict[str, np.ndarray]]:
  """Reads A, B and DoRA's magnitudes.

  Args:
    model: A decoder.
    adapter: "lora" or "dora", on the kernels that the file has.
    read: Gives a tensor.

  Returns:
    The trainable. Parts of one module have the same A.
  """
  rank, trainable = adapter.config["rank"], {}
  for module in modules(model):
    if module.parts[0] not in adapter.config["targets"]:
      continue
    out = sum(module.sizes)
    a = [read(n, (rank, module.rows)).T for n in module.tensors(_LORA["a"])]
    b = [
      module.split(read(n, (out, rank)).T) for n in module.tensors(_LORA["b"])
    ]
    for index, path in enumerate(module.parts):
      trainable[path] = {
        "a": module.stack(a),
        "b": module.stack([layer[index] for layer in b]),
      }
    if adapter.kind == "dora":
      m = [module.split(read(n, (out,))) for n in module.tensors(_MAGNITUDE)]
      for index, path in enumerate(module.parts):
        magnitude = module.stack([layer[index] for layer in m])
        trainable[path]["magnitude"] = magnitude
  return trainable


def write_low_rank(
  model: Model, adapter: Adapter, trainable: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Lays out A, B and DoRA's magnitudes.

  Parts of one module share its A. Where theirs differ, or some have no adapter,
  the module gets all their columns and B is zero off the blocks; then the rank
  is larger, of all modules, and alpha with it, so that the scale is the same.

  Args:
    model: A decoder.
    adapter: "lora" or "dora".
    trainable: Its weights, on the host.

  Returns:
    Name -> tensor; and the fields of adapter_config.json that say how to read
    them.

  Raises:
    CheckpointError: DoRA on a part of a module only.
  """
  chosen = [m for m in modules(model) if any(p in trainable for p in m.parts)]
  pairs = [_pair(module, trainable) for module in chosen]
  rank = max(a.shape[-1] for a, _ in pairs)
  tensors = {}
  for module, (a, b) in zip(chosen, pairs):
    missing = rank - a.shape[-1]
    a = np.pad(a, ((0, 0), (0, 0), (0, missing)))
    b = np.pad(b, ((0, 0), (0, missing), (0, 0)))
    tensors |= dict(zip(module.tensors(_LORA["a"]), a.mT))
    tensors |= dict(zip(module.tensors(_LORA["b"]), b.mT))
    if adapter.kind == "dora":
      absent = [path for path in module.parts if path not in trainable]
      if absent:
        raise errors.CheckpointError(
          f"adapter.targets: {absent[0]} is part of {module.name}, whose other "
          "parts have DoRA: PEFT has it for all of them or for none"
        )
      m = [module.layers(trainable[p]["magnitude"]) for p in module.parts]
      tensors |= dict(
        zip(module.tensors(_MAGNITUDE), np.concatenate(m, axis=-1))
      )
  root, config = adapter.config["use_rslora"], adapter.config
  grown = rank / config["rank"]
  alpha = config["alpha"] * (math.sqrt(grown) if root else grown)
  return tensors, {
    "target_modules": shortest_names(model, chosen),
    "fan_in_fan_out": not any(module.transpose for module in chosen),
    "r": rank,
    "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
    "use_rslora": root,
    "use_dora": adapter.kind == "dora",
  }


def _pair(module: Module, trainable) -> tuple[np.ndarray, np.ndarray]:
  """A [layers, in, rank] and B [layers, rank, out] of a whole module."""
  parts = [trainable.get(path) for path in module.parts]
  own = [
    (module.layers(p["a"]), module.layers(p["b"]))
    for p in parts
    if p is not None
  ]
  if len(own) == len(parts) and all(
    np.array_equal(a, own[0][0]) for a, _ in own
  ):
    return own[0][0], np.concatenate([b for _, b in own], axis=-1)
  blocks, present = [], iter(range(len(own)))
  depth, rank, _ = own[0][1].shape
  for part, size in zip(parts, module.sizes):
    block = np.zeros((depth, rank * len(own), size), np.float32)
    if part is not None:
      i = next(present)
      block[:, i * rank : (i + 1) * rank] = own[i][1]
    blocks.append(block)
  a = np.concatenate([a for a, _ in own], axis=-1)
  return a, np.concatenate(blocks, axis=-1)


def read_ia3(
  model: Model, adapter: Adapter, read: Read
) -> dict[str, np.ndarray]:
  """Reads the factors.

  Args:
    model: A decoder.
    adapter: "ia3", on the kernels that the file has.
    read: Gives a tensor.

  Returns:
    The trainable. Parts of one module have the same factors on their inputs.
  """
  trainable = {}
  for module in modules(model):
    if module.parts[0] not in adapter.config["targets"]:
      continue
    inner = module.parts[0] in adapter.config["feedforward"]
    shape = (1, module.rows) if inner else (sum(module.sizes), 1)
    factors = [read(n, shape).reshape(-1) for n in module.tensors(_IA3)]
    for index, path in enumerate(module.parts):
      trainable[path] = module.stack(
        factors if inner else [module.split(f)[index] for f in factors]
      )
  return trainable


def write_ia3(
  model: Model, adapter: Adapter, trainable: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Lays out the factors; a part of a module that has none gets ones.

  Args:
    model: A decoder.
    adapter: "ia3".
    trainable: Its weights, on the host.

  Returns:
    As `write_low_rank`.

  Raises:
    CheckpointError: Parts of one module whose inputs are rescaled differently.
  """
  tensors, chosen, inside = {}, [], []
  for module in modules(model):
    present = [path for path in module.parts if path in trainable]
    if not present:
      continue
    chosen.append(module)
    factors = [module.layers(trainable[path]) for path in present]
    inner = present[0] in adapter.config["feedforward"]
    if inner:
      inside.append(module)
      if len(present) < len(module.parts) or any(
        not np.array_equal(f, factors[0]) for f in factors
      ):
        raise errors.CheckpointError(
          f"adapter: the inputs of {module.name} are rescaled differently for "
          f"its parts {', '.join(module.parts)}: PEFT has one factor for all"
        )
      whole = factors[0][:, None, :]
    else:
      known = dict(zip(present, factors))
      depth = len(factors[0])
      whole = np.concatenate(
        [
          known.get(path, np.ones((depth, size), np.float32))
          for path, size in zip(module.parts, module.sizes)
        ],
        axis=-1,
      )[:, :, None]
    tensors |= dict(zip(module.tensors(_IA3), whole))
  return tensors, {
    "target_modules": shortest_names(model, chosen),
    "feedforward_modules": shortest_names(model, inside),
    "fan_in_fan_out": not any(module.transpose for module in chosen),
  }
