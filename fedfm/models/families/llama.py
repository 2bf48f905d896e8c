"""Llama (arXiv 2302.13971) and what is laid out like it: Mistral, Qwen."""

from typing import Any

from fedfm.models.decoder_config import DecoderConfig
from fedfm.models.families import rotary, windows
from fedfm.models.families.family import Family, FieldRow, Fields, TensorRow

LAYER = "model.layers.{i}."
MODEL = (
  TensorRow("embed", "model.embed_tokens.weight"),
  TensorRow("final_norm", "model.norm.weight"),
  TensorRow("lm_head", "lm_head.weight", True),
)
PRE_NORMS = (
  TensorRow("layers/attention_norm", LAYER + "input_layernorm.weight"),
  TensorRow("layers/mlp_norm", LAYER + "post_attention_layernorm.weight"),
)
QK_NORMS = tuple(
  TensorRow(f"layers/{k}", f"{LAYER}self_attn.{k}.weight")
  for k in ("q_norm", "k_norm")
)
PROJECTIONS = tuple(
  row
  for part, kernels in (
    ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
    ("mlp", ("gate_proj", "up_proj", "down_proj")),
  )
  for k in kernels
  for row in (
    TensorRow(f"layers/{k}", f"{LAYER}{part}.{k}.weight", True),
    TensorRow(f"layers/{k}_bias", f"{LAYER}{part}.{k}.bias"),
  )
)
SIZES = (
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
)
# One field for the biases of all four projections.
ATTENTION_BIAS = (
  FieldRow("attention_bias", "qkv_bias", bool, False),
  FieldRow("attention_bias", "output_bias", bool, False),
)
MISTRAL_WINDOW = FieldRow(
  "sliding_window", "sliding_window", int, 4096, nullable=True
)


def _qwen_read(fields: Fields) -> dict[str, Any]:
  window = None
  if fields.get("use_sliding_window", bool, False):
    window = fields.get("sliding_window", int, 4096, nullable=True)
  count = fields.get("num_hidden_layers", int)
  first = fields.get("max_window_layers", int, 28)
  default = [window is not None and i >= first for i in range(count)]
  return rotary.read_rope(fields) | windows.read_layers(fields, window, default)


def _qwen_write(config: DecoderConfig) -> dict[str, Any]:
  local = [config.has_window(i) for i in range(config.num_layers)]
  return rotary.write_rope(config) | {
    "use_sliding_window": config.sliding_window is not None,
    "max_window_layers": local.index(True) if any(local) else len(local),
    **windows.write_layers(config),
  }


LLAMA = Family(
  architecture="LlamaForCausalLM",
  model_type="llama",
  tensors=(*MODEL, *PRE_NORMS, *PROJECTIONS),
  fields=(
    *SIZES,
    *ATTENTION_BIAS,
    FieldRow("mlp_bias", "mlp_bias", bool, False),
  ),
  read=rotary.read_rope,
  write=rotary.write_rope,
)
MISTRAL = LLAMA._replace(
  architecture="MistralForCausalLM",
  model_type="mistral",
  fields=(*SIZES, MISTRAL_WINDOW),
)
QWEN2 = Family(
  architecture="Qwen2ForCausalLM",
  model_type="qwen2",
  tensors=(*MODEL, *PRE_NORMS, *PROJECTIONS),
  fields=SIZES,
  options={"qkv_bias": True},
  read=_qwen_read,
  write=_qwen_write,
)
QWEN3 = Family(
  architecture="Qwen3ForCausalLM",
  model_type="qwen3",
  tensors=(*MODEL, *PRE_NORMS, *QK_NORMS, *PROJECTIONS),
  fields=(*SIZES, *ATTENTION_BIAS),
  options={"qk_norm": "head"},
  read=_qwen_read,
  write=_qwen_write,
)
