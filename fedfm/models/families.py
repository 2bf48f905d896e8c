"""Hugging Face's architectures, a table each: names, sizes, layouts.

A `Family` is read both ways, by `load` and by `save` in
`fedfm.models.huggingface`: a new architecture is a new table.
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any, NamedTuple

from fedfm import errors
from fedfm.models import tensor_files
from fedfm.models.decoder import DecoderConfig

_REQUIRED = object()


class TensorRow(NamedTuple):
  """One parameter: our path, the file's name, and how they differ.

  Attributes:
    path: Path in our tree, such as "layers/q_proj".
    name: Name in the file; "{i}" stands for the layer, and layers are stacked.
    transpose: Whether the file has [out, in] where we have [in, out].
  """

  path: str
  name: str
  transpose: bool = False


class FieldRow(NamedTuple):
  """One field of config.json: its name, ours, and the value when absent."""

  name: str
  field: str
  kind: type
  default: Any = _REQUIRED


class Family(NamedTuple):
  """An architecture's file format.

  Attributes:
    architecture: Its name in `architectures`.
    model_type: `model_type` in config.json.
    tensors: The parameters.
    fields: The sizes; rope's are read apart, as their layout varies.
    fixed: Fields of config.json that may have this value only.
    ignored: Pattern of names that hold no parameter.
  """

  architecture: str
  model_type: str
  tensors: Sequence[TensorRow]
  fields: Sequence[FieldRow]
  fixed: Mapping[str, Any]
  ignored: str


_LAYER = "model.layers.{i}."
FAMILIES = {
  "LlamaForCausalLM": Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    tensors=(
      TensorRow("embed", "model.embed_tokens.weight"),
      TensorRow("final_norm", "model.norm.weight"),
      TensorRow("lm_head", "lm_head.weight", True),
      TensorRow("layers/attention_norm", _LAYER + "input_layernorm.weight"),
      TensorRow("layers/mlp_norm", _LAYER + "post_attention_layernorm.weight"),
      *(
        TensorRow(f"layers/{k}", f"{_LAYER}self_attn.{k}.weight", True)
        for k in ("q_proj", "k_proj", "v_proj", "o_proj")
      ),
      *(
        TensorRow(f"layers/{k}", f"{_LAYER}mlp.{k}.weight", True)
        for k in ("gate_proj", "up_proj", "down_proj")
      ),
    ),
    fields=(
      FieldRow("vocab_size", "vocab_size", int),
      FieldRow("hidden_size", "width", int),
      FieldRow("num_hidden_layers", "num_layers", int),
      FieldRow("num_attention_heads", "num_heads", int),
      FieldRow("num_key_value_heads", "num_kv_heads", int, None),
      FieldRow("head_dim", "head_dim", int, None),
      FieldRow("intermediate_size", "mlp_width", int),
      FieldRow("max_position_embeddings", "max_length", int, 2048),
      FieldRow("rms_norm_eps", "norm_epsilon", float, 1e-6),
      FieldRow("tie_word_embeddings", "tie_embeddings", bool, False),
    ),
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
  ),
}


def write_config(
  family: Family, config: DecoderConfig, dtype: str
) -> dict[str, Any]:
  """Builds config.json.

  Args:
    family: The format.
    config: The sizes.
    dtype: Dtype of the weights.

  Returns:
    A JSON object.
  """
  theta = config.rope_theta
  return {
    "architectures": [family.architecture],
    "model_type": family.model_type,
    **family.fixed,
    **{row.name: getattr(config, row.field) for row in family.fields},
    "rope_theta": theta,  # transformers 4; the next line is for 5.
    "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
    "torch_dtype": dtype,
  }


def read_config(path: pathlib.Path) -> tuple[Family, DecoderConfig]:
  """Reads config.json strictly.

  Args:
    path: The file.

  Returns:
    The family and our own config.

  Raises:
    CheckpointError: An unknown architecture, or a field that is missing,
      malformed or asks for what the model cannot do.
  """
  values = tensor_files.read_json(path)
  names = values.get("architectures") or [
    name
    for name, family in FAMILIES.items()
    if family.model_type == values.get("model_type")
  ]
  if not isinstance(names, list) or len(names) != 1 or names[0] not in FAMILIES:
    raise errors.CheckpointError(
      f"{path}: architectures is {values.get('architectures')}, expected one "
      f"of {', '.join(FAMILIES)}"
    )
  family = FAMILIES[names[0]]
  for name, expected in {**family.fixed, "quantization_config": None}.items():
    if values.get(name, expected) != expected:
      raise errors.CheckpointError(
        f"{path}: {name} is {values[name]!r}, only {expected!r} is supported"
      )
  sizes: dict[str, Any] = {"rope_theta": _rope_theta(path, values)}
  for row in family.fields:
    sizes[row.field] = _field(path, values, row.name, row.kind, row.default)
  try:
    return family, DecoderConfig(**sizes)
  except errors.ConfigError as e:
    raise errors.CheckpointError(f"{path}: {e}") from None


def _field(path, values, name: str, kind: type, default: Any) -> Any:
  """Returns one field of config.json, or its default where it has one."""
  value = values.get(name)
  if value is None:
    if default is _REQUIRED:
      raise errors.CheckpointError(f"{path}: {name} is missing")
    return default
  kinds = (int, float) if kind is float else (kind,)
  if type(value) not in kinds:
    raise errors.CheckpointError(
      f"{path}: {name} is {value!r}, expected {kind.__name__}"
    )
  return kind(value)


def _rope_theta(path: pathlib.Path, values: dict[str, Any]) -> float:
  """Reads rope's base from either layout; scaled kinds are refused."""
  default = _field(path, values, "rope_theta", float, 10_000.0)
  for name in ("rope_parameters", "rope_scaling"):
    rope = values.get(name)
    if rope is None:
      continue
    if not isinstance(rope, dict):
      raise errors.CheckpointError(f"{path}: {name} is {rope!r}, not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
      raise errors.CheckpointError(
        f"{path}: {name} of kind {kind!r} is not supported, only 'default'"
      )
    default = _field(path, rope, "rope_theta", float, default)
  return default
