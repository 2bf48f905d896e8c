"""OLMo 2 (arXiv 2501.00656): norms after each part, and of whole q and k."""

from fedfm.models.families import rotary
from fedfm.models.families.family import Family, FieldRow, TensorRow
from fedfm.models.families.llama import (
  ATTENTION_BIAS,
  LAYER,
  MODEL,
  PROJECTIONS,
  QK_NORMS,
  SIZES,
)

OLMO2 = Family(
  architecture="Olmo2ForCausalLM",
  model_type="olmo2",
  tensors=(
    *MODEL,
    TensorRow(
      "layers/post_attention_norm", LAYER + "post_attention_layernorm.weight"
    ),
    TensorRow(
      "layers/post_mlp_norm", LAYER + "post_feedforward_layernorm.weight"
    ),
    *QK_NORMS,
    *PROJECTIONS,
  ),
  fields=(
    *(row for row in SIZES if row.name != "rms_norm_eps"),
    *ATTENTION_BIAS,
    FieldRow("rms_norm_eps", "norm_epsilon", float, 1e-5),
  ),
  options={"norm_placement": "post", "qk_norm": "projection"},
  read=rotary.read_rope,
  write=rotary.write_rope,
)
