"""GPT-2 (Radford et al. 2019): learned positions, kernels stored [in, out]."""

from typing import Any

from fedfm.models.decoder_config import DecoderConfig
from fedfm.models.families.family import Family, FieldRow, Fields, TensorRow

_LAYER = "transformer.h.{i}."
_QKV = ("q_proj", "k_proj", "v_proj")


def _read(fields: Fields) -> dict[str, Any]:
  inner = fields.get("n_inner", int, None)
  return {"mlp_width": inner or 4 * fields.get("n_embd", int)}


def _write(config: DecoderConfig) -> dict[str, Any]:
  return {"n_inner": config.mlp_width}


GPT2 = Family(
  architecture="GPT2LMHeadModel",
  model_type="gpt2",
  tensors=(
    TensorRow("embed", "transformer.wte.weight"),
    TensorRow("position_embed", "transformer.wpe.weight"),
    TensorRow("final_norm", "transformer.ln_f.weight"),
    TensorRow("final_norm_bias", "transformer.ln_f.bias"),
    TensorRow("lm_head", "lm_head.weight", True),
    TensorRow("layers/attention_norm", _LAYER + "ln_1.weight"),
    TensorRow("layers/attention_norm_bias", _LAYER + "ln_1.bias"),
    TensorRow("layers/mlp_norm", _LAYER + "ln_2.weight"),
    TensorRow("layers/mlp_norm_bias", _LAYER + "ln_2.bias"),
    *(TensorRow(f"layers/{k}", _LAYER + "attn.c_attn.weight") for k in _QKV),
    *(TensorRow(f"layers/{k}_bias", _LAYER + "attn.c_attn.bias") for k in _QKV),
    TensorRow("layers/o_proj", _LAYER + "attn.c_proj.weight"),
    TensorRow("layers/o_proj_bias", _LAYER + "attn.c_proj.bias"),
    TensorRow("layers/up_proj", _LAYER + "mlp.c_fc.weight"),
    TensorRow("layers/up_proj_bias", _LAYER + "mlp.c_fc.bias"),
    TensorRow("layers/down_proj", _LAYER + "mlp.c_proj.weight"),
    TensorRow("layers/down_proj_bias", _LAYER + "mlp.c_proj.bias"),
  ),
  fields=(
    FieldRow("vocab_size", "vocab_size", int),
    FieldRow("n_embd", "width", int),
    FieldRow("n_layer", "num_layers", int),
    FieldRow("n_head", "num_heads", int),
    FieldRow("n_positions", "max_length", int, 1024),
    FieldRow("layer_norm_epsilon", "norm_epsilon", float, 1e-5),
    FieldRow("tie_word_embeddings", "tie_embeddings", bool, True),
  ),
  activation=("activation_function", "gelu_new"),
  options={
    "positions": "learned",
    "norm": "layer",
    "gated_mlp": False,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
  },
  fixed={
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
  },
  read=_read,
  write=_write,
  prefix="transformer.",
  ignored=r"h\.\d+\.attn\.(masked_)?bias",  # The causal mask.
)
