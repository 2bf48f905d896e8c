"""Gemma 2 (arXiv 2408.00118) and the text part of Gemma 3 (2503.19786)."""

from typing import Any

from fedfm.models.decoder_config import DecoderConfig
from fedfm.models.families import rotary, windows
from fedfm.models.families.family import Family, FieldRow, Fields, TensorRow
from fedfm.models.families.llama import (
  ATTENTION_BIAS,
  LAYER,
  MODEL,
  PROJECTIONS,
  QK_NORMS,
  SIZES,
)

_NORMS = tuple(
  TensorRow(f"layers/{ours}", f"{LAYER}{theirs}.weight")
  for ours, theirs in (
    ("attention_norm", "input_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("mlp_norm", "pre_feedforward_layernorm"),
    ("post_mlp_norm", "post_feedforward_layernorm"),
  )
)
_OPTIONS = {
  "norm": "rms_unit_offset",
  "norm_placement": "both",
  "scale_embeddings": True,
}
_REPLACED = ("head_dim", "tie_word_embeddings", "max_position_embeddings")


def _fields(max_length: int, attention_cap: Any, logit_cap: Any):
  """Gemma's fields, with the defaults of one generation."""
  return (
    *(row for row in SIZES if row.name not in _REPLACED),
    *ATTENTION_BIAS,
    FieldRow("head_dim", "head_dim", int, 256),
    FieldRow("tie_word_embeddings", "tie_embeddings", bool, True),
    FieldRow("max_position_embeddings", "max_length", int, max_length),
    FieldRow("query_pre_attn_scalar", "query_scalar", int, 256),
    FieldRow(
      "attn_logit_softcapping",
      "attention_softcap",
      float,
      attention_cap,
      nullable=True,
    ),
    FieldRow(
      "final_logit_softcapping",
      "logit_softcap",
      float,
      logit_cap,
      nullable=True,
    ),
  )


def _window(fields: Fields) -> int | None:
  return fields.get("sliding_window", int, 4096, nullable=True)


def _read_2(fields: Fields) -> dict[str, Any]:
  count = fields.get("num_hidden_layers", int)
  alternate = [i % 2 == 0 for i in range(count)]
  return rotary.read_rope(fields) | windows.read_layers(
    fields, _window(fields), alternate
  )


def _write_2(config: DecoderConfig) -> dict[str, Any]:
  return rotary.write_rope(config) | windows.write_layers(config)


def _read_3(fields: Fields) -> dict[str, Any]:
  """Reads two bases of rotary wavelengths, in either layout, and layers."""
  found = {
    "rope_theta": fields.get("rope_theta", float, 1_000_000.0),
    "rope_scaling": None,
  }
  local = fields.get("rope_local_base_freq", float, 10_000.0)
  nested = fields.get("rope_parameters", dict, {})
  for kind in nested:
    if kind not in ("full_attention", "sliding_attention"):
      raise fields.error(
        f"rope_parameters: unknown {kind!r} (known: full_attention, "
        "sliding_attention)"
      )
  full = nested.get("full_attention") or {}
  found |= rotary.read_scaling(fields, "rope_parameters.full_attention", full)
  scaling = fields.get("rope_scaling", dict, {})
  if scaling:
    found |= rotary.read_scaling(fields, "rope_scaling", scaling)
  name = "rope_parameters.sliding_attention"
  sliding = rotary.read_scaling(
    fields, name, nested.get("sliding_attention") or {}
  )
  if sliding["rope_scaling"] is not None:
    raise fields.error(f"{name} is scaled, only 'default' is supported")
  for values in (found, sliding):
    if values.pop("rotary_fraction", 1.0) != 1:
      raise fields.error("partial_rotary_factor: only 1.0 is supported")
  count = fields.get("num_hidden_layers", int)
  pattern = fields.get("sliding_window_pattern", int, 6)
  if pattern < 1:
    raise fields.error(f"sliding_window_pattern is {pattern}, expected above 0")
  default = [(i + 1) % pattern != 0 for i in range(count)]
  return (
    found
    | {"local_rope_theta": sliding.get("rope_theta", local)}
    | windows.read_layers(fields, _window(fields), default)
  )


def _write_3(config: DecoderConfig) -> dict[str, Any]:
  scaling = rotary.write_scaling(config)
  theta, local = config.rope_theta, config.local_rope_theta
  return windows.write_layers(config) | {
    "rope_theta": theta,
    "rope_local_base_freq": local,
    "rope_scaling": scaling if config.rope_scaling else None,
    "rope_parameters": {
      "full_attention": {"rope_theta": theta} | scaling,
      "sliding_attention": {"rope_theta": local, "rope_type": "default"},
    },
  }


GEMMA2 = Family(
  architecture="Gemma2ForCausalLM",
  model_type="gemma2",
  tensors=(*MODEL, *_NORMS, *PROJECTIONS),
  fields=_fields(8192, 50.0, 30.0),
  activation=("hidden_activation", "gelu_pytorch_tanh"),
  options=_OPTIONS,
  fixed={"use_bidirectional_attention": False},
  read=_read_2,
  write=_write_2,
)
GEMMA3 = Family(
  architecture="Gemma3ForCausalLM",
  model_type="gemma3_text",
  tensors=(*MODEL, *_NORMS, *QK_NORMS, *PROJECTIONS),
  fields=_fields(131_072, None, None),
  activation=("hidden_activation", "gelu_pytorch_tanh"),
  options=_OPTIONS | {"qk_norm": "head"},
  fixed={"use_bidirectional_attention": False},
  read=_read_3,
  write=_write_3,
)
