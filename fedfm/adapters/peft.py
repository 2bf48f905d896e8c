"""Reads and writes adapters as the PEFT library of Hugging Face does.

A folder holds adapter_config.json and adapter_model.safetensors; where an array
is in the latter, `fedfm.adapters.peft_modules` says. Pickles are not read: they
run code.
"""

from collections.abc import Mapping
import json
import math
import os
import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from fedfm import errors
from fedfm.adapters import peft_modules, peft_saved
from fedfm.adapters.adapter import Adapter, parameters
from fedfm.adapters.dora import dora
from fedfm.adapters.ia3 import ia3
from fedfm.adapters.lora import lora
from fedfm.adapters.prefix_tuning import prefix_tuning
from fedfm.adapters.prompt_tuning import prompt_tuning
from fedfm.adapters.with_parameters import with_paths
from fedfm.models import tensor_files
from fedfm.models.encoder import EncoderConfig
from fedfm.models.model import Model

PyTree = Any
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PROMPT = "prompt_embeddings"
_TYPES = {
  "lora": "LORA",
  "dora": "LORA",
  "ia3": "IA3",
  "prompt_tuning": "PROMPT_TUNING",
  "prefix_tuning": "PREFIX_TUNING",
}
# Fields of adapter_config.json that are read, or say nothing of the function.
_READ = {
  "peft_type", "r", "lora_alpha", "use_rslora", "use_dora",
  "num_virtual_tokens", "auto_mapping", "base_model_name_or_path",
  "encoder_hidden_size",
  "ensure_weight_tying", "exclude_modules", "fan_in_fan_out",
  "feedforward_modules", "inference_mode", "init_ia3_weights", "init_weights",
  "layers_pattern", "lora_dropout", "megatron_core", "modules_to_save",
  "num_attention_heads",
  "num_layers", "peft_version", "prefix_projection", "prompt_tuning_init",
  "prompt_tuning_init_text", "qalora_group_size", "revision", "runtime_config",
  "target_modules", "task_type", "token_dim", "tokenizer_kwargs",
  "tokenizer_name_or_path",
}  # fmt: skip
# Others must have one of these values: what else they say is not supported.
_NEUTRAL = (None, False, 0, "", "none", [], {})
_ALLOWED = {
  "bias": ("none",),
  "num_transformer_submodules": (1, None),
  # Other ways to start from change the base's own weights.
  "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None),
}


def load(
  directory: str | os.PathLike, model: Model
) -> tuple[Adapter, dict[str, Any]]:
  """Loads an adapter that PEFT, or `save`, has written.

  Args:
    directory: Folder with adapter_config.json and adapter_model.safetensors, of
      type LORA (rsLoRA and DoRA too), IA3, PROMPT_TUNING or PREFIX_TUNING.
    model: The model that it was trained on.

  Returns:
    The adapter, and its trainable in float32.

  Raises:
    CheckpointError: The folder is incomplete, damaged, asks for what is not
      supported, or belongs to another model.
  """
  directory = pathlib.Path(directory)
  config = tensor_files.read_json(directory / CONFIG)
  if not (directory / WEIGHTS).exists() and (directory / _PICKLE).exists():
    raise tensor_files.refuse_pickle(directory / _PICKLE)
  entries = tensor_files.open_file(directory / WEIGHTS)
  try:
    adapter = _adapter(directory / CONFIG, config, entries, model)
    beside = _saved_whole(directory / CONFIG, config, entries, model)
    if beside:
      adapter = with_paths(model, adapter, beside)
  except errors.ConfigError as e:
    raise errors.CheckpointError(f"{directory / CONFIG}: {e}") from None
  used = set()

  def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
    used.add(name)
    return _read(directory / WEIGHTS, entries, name, shape)

  trainable = _trainable(adapter, model, read)
  trainable |= peft_saved.read(model, beside, read)
  extra = sorted(entries.keys() - used)
  if extra:
    raise errors.CheckpointError(
      f"{directory / WEIGHTS}: tensor {extra[0]} {entries[extra[0]].shape} is "
      f"not part of {adapter.kind} on this model ({len(extra)} such)"
    )
  return adapter, jax.tree.map(jnp.asarray, trainable)


def save(
  directory: str | os.PathLike,
  model: Model,
  adapter: Adapter,
  trainable: Mapping[str, Any],
  base_model: str | None = None,
) -> None:
  """Writes a folder that PEFT (and `load`) reads.

  Modules are named as in the model's files. Transformers 5 has other names for
  ViT's, so that PEFT finds them with transformers 4 only.

  In a run of several processes all call it and the first one writes.

  Args:
    directory: Folder to write; made if needed.
    model: The model.
    adapter: "lora", "dora", "ia3", "prompt_tuning" or "prefix_tuning".
    trainable: Its weights.
    base_model: Name or folder of the model, for PEFT's own use.

  Raises:
    CheckpointError: A kind that PEFT does not have, a trainable that is not the
      adapter's, or a folder that cannot be made.
  """
  directory = pathlib.Path(directory)
  if adapter.kind not in _TYPES:
    raise errors.CheckpointError(
      f"{directory}: PEFT has no format for adapter.kind {adapter.kind!r}, only"
      f" for {', '.join(_TYPES)}"
    )
  if adapter.kind.endswith("_tuning") and model.init_cache is None:
    raise errors.CheckpointError(
      f"{directory}: PEFT puts a prompt before the first token of a text, not "
      f"after it as {adapter.kind!r} on this model does"
    )
  beside = adapter.config.get("paths", ())
  if beside and adapter.kind.endswith("_tuning"):
    raise errors.CheckpointError(
      f"{directory}: {beside[0]} is trained beside {adapter.kind!r}, which has "
      "no format in PEFT; save it beside lora, dora or ia3"
    )
  shapes = jax.eval_shape(adapter.init, jax.random.key(0), model.shapes)
  got = {path: x.shape for path, x in parameters(trainable).items()}
  for path, x in parameters(shapes).items():
    if got.pop(path, None) != x.shape:
      raise errors.CheckpointError(
        f"{directory}: the trainable's {path} is not {x.shape}, as "
        f"{adapter.kind} on this model has it"
      )
  if got:
    raise errors.CheckpointError(
      f"{directory}: the trainable's {min(got)} is not part of {adapter.kind}"
    )
  on_host = jax.tree.map(_to_host, dict(trainable))
  whole, names = peft_saved.write(model, {p: on_host.pop(p) for p in beside})
  tensors, fields = _tensors(adapter, model, on_host)
  tensors |= whole
  config = {
    "base_model_name_or_path": base_model,
    "peft_type": _TYPES[adapter.kind],
    "task_type": _task(model, names),
    "inference_mode": True,
    **fields,
    **({"modules_to_save": names} if names else {}),
  }
  if jax.process_index() == 0:
    tensor_files.make_folder(directory)
    layout = {n: (x.dtype.name, x.shape) for n, x in tensors.items()}
    part = directory / f"{WEIGHTS}.part"
    tensor_files.write_file(part, layout, tensors.values())
    os.replace(part, directory / WEIGHTS)
    part = directory / f"{CONFIG}.part"
    part.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(part, directory / CONFIG)


def _task(model: Model, saved: list[str]) -> str | None:
  """What PEFT wraps the model for; a classifier of texts it always saves."""
  if model.init_cache is not None:
    return "CAUSAL_LM"
  if not isinstance(model.config, EncoderConfig):
    return None
  return "SEQ_CLS" if "classifier" in saved else "FEATURE_EXTRACTION"


def _to_host(x: Any) -> np.ndarray:
  """Brings one array to the host, from all processes if it is spread."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    x = multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


def _read(path, entries, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Reads one tensor as float32, checked."""
  if name not in entries:
    raise errors.CheckpointError(f"{path}: tensor {name} is missing")
  entry = entries[name]
  if entry.shape != shape:
    hint = " (transposed?)" if entry.shape == shape[::-1] else ""
    raise errors.CheckpointError(
      f"{path}: tensor {name} has shape {list(entry.shape)}, expected "
      f"{list(shape)}{hint}; is it of another model?"
    )
  value = entry.read(tuple(slice(0, n) for n in shape)).astype(np.float32)
  if not np.isfinite(value).all():
    raise errors.CheckpointError(f"{path}: tensor {name} holds NaN or infinity")
  return value


def _adapter(path, config, entries, model: Model) -> Adapter:
  """Builds the adapter that adapter_config.json and the tensors describe."""
  kind = config.get("peft_type")
  if kind not in _TYPES.values():
    known = ", ".join(sorted(set(_TYPES.values())))
    raise errors.CheckpointError(
      f"{path}: peft_type is {kind!r}, expected one of {known}"
    )
  for name, value in config.items():
    allowed = _ALLOWED.get(name, _NEUTRAL)
    if name not in _READ and value not in allowed:
      raise errors.CheckpointError(
        f"{path}: {name} is {value!r}, which is not supported (only "
        f"{allowed[0]!r})"
      )
  if kind in ("PROMPT_TUNING", "PREFIX_TUNING"):
    factory = prompt_tuning if kind == "PROMPT_TUNING" else prefix_tuning
    return factory(
      model, num_tokens=_number(path, config, "num_virtual_tokens")
    )
  peft_modules.check_named(
    model, entries, config.get("target_modules"), f"{path}: target_modules"
  )
  targets = peft_modules.targets(model, entries, kind)
  if not targets:
    raise errors.CheckpointError(
      f"{path.parent / WEIGHTS}: no tensor is of {kind} on this model's kernels"
    )
  if kind == "IA3":
    inner = peft_modules.on_inputs(model, entries)
    return ia3(model, targets=tuple(targets), feedforward=tuple(inner))
  for name in ("use_rslora", "use_dora"):
    if not isinstance(config.get(name) or False, bool):
      raise errors.CheckpointError(
        f"{path}: {name} is {config[name]!r}, expected true or false"
      )
  for name in ("lora_alpha", "lora_dropout"):
    value = config.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise errors.CheckpointError(
        f"{path}: {name} is {value!r}, expected a number"
      )
  options = {
    "rank": _number(path, config, "r"),
    "alpha": config.get("lora_alpha", 0),
    "targets": targets,
    "use_rslora": bool(config.get("use_rslora")),
  }
  if config.get("use_dora"):  # Without its dropout, which is for training.
    return dora(model, **options)
  return lora(model, **options, dropout=config.get("lora_dropout", 0.0))


def _saved_whole(path, config, entries, model: Model) -> list[str]:
  """The parameters that are in the file as they are."""
  names = config.get("modules_to_save")
  if not names:
    return []
  found = peft_saved.paths(model, entries)
  # PEFT adds its own two to what is asked for; a model need not have them.
  if not found and not {*names} <= {"classifier", "score"}:
    raise errors.CheckpointError(
      f"{path}: modules_to_save is {names!r}, but no tensor is of these on "
      "this model"
    )
  return found


def _number(path, config, name: str) -> int:
  value = config.get(name)
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise errors.CheckpointError(
      f"{path}: {name} is {value!r}, expected an integer of at least 1"
    )
  return value


def _trainable(
  adapter, model: Model, read: peft_modules.Read
) -> dict[str, Any]:
  """Reads the weights of an adapter."""
  if adapter.kind == "ia3":
    return peft_modules.read_ia3(model, adapter, read)
  if adapter.kind in ("lora", "dora"):
    return peft_modules.read_low_rank(model, adapter, read)
  c, n = model.config, adapter.config["num_tokens"]
  if adapter.kind == "prompt_tuning":
    return {"prompt": read(_PROMPT, (n, c.width))}
  shape = (n, c.num_layers, 2, c.num_kv_heads, c.head_dim)
  prefix = read(_PROMPT, (n, math.prod(shape[1:]))).reshape(shape)
  key, value = prefix.transpose(2, 1, 0, 3, 4)
  return {"key": key, "value": value}


def _tensors(
  adapter: Adapter, model: Model, trainable: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Lays the weights out, and says how in fields of adapter_config.json."""
  if adapter.kind == "ia3":
    return peft_modules.write_ia3(model, adapter, trainable)
  if adapter.kind in ("lora", "dora"):
    tensors, fields = peft_modules.write_low_rank(model, adapter, trainable)
    dropout = adapter.config.get("dropout", 0.0)
    return tensors, {"bias": "none", "lora_dropout": dropout, **fields}
  c = model.config
  fields = {
    "num_virtual_tokens": adapter.config["num_tokens"],
    "num_layers": c.num_layers,
    "num_transformer_submodules": 1,
  }
  if adapter.kind == "prompt_tuning":
    fields |= {"token_dim": c.width, "num_attention_heads": c.num_heads}
    return {_PROMPT: trainable["prompt"]}, fields
  fields |= {
    "token_dim": c.num_kv_heads * c.head_dim,
    "num_attention_heads": c.num_kv_heads,
    "prefix_projection": False,
  }
  both = np.stack([trainable["key"], trainable["value"]])
  prefix = both.transpose(2, 1, 0, 3, 4).reshape(both.shape[2], -1)
  return {_PROMPT: prefix}, fields
