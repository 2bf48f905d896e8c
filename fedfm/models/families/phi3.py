"""Phi-3 (arXiv 2404.14219): one tensor for q, k and v, one for gate and up."""

from typing import Any

from fedfm.models import rope
from fedfm.models.decoder_config import DecoderConfig
from fedfm.models.families import rotary
from fedfm.models.families.family import Family, FieldRow, Fields, TensorRow
from fedfm.models.families.llama import LAYER, MODEL, PRE_NORMS, SIZES

_REPLACED = ("max_position_embeddings", "rms_norm_eps")


def _read(fields: Fields) -> dict[str, Any]:
  found = rotary.read_rope(fields, partial=True)
  if not isinstance(found["rope_scaling"], rope.LongRope | None):
    raise fields.error("rope_scaling: Phi-3 has 'default' and 'longrope' only")
  return found


def _write(config: DecoderConfig) -> dict[str, Any]:
  values = rotary.write_rope(config)
  scaling: Any = config.rope_scaling
  if scaling is not None:
    name = "original_max_position_embeddings"
    values[name] = getattr(scaling, name)
  return values


PHI3 = Family(
  architecture="Phi3ForCausalLM",
  model_type="phi3",
  tensors=(
    *MODEL,
    *PRE_NORMS,
    *(
      TensorRow(f"layers/{k}", LAYER + "self_attn.qkv_proj.weight", True)
      for k in ("q_proj", "k_proj", "v_proj")
    ),
    TensorRow("layers/o_proj", LAYER + "self_attn.o_proj.weight", True),
    *(
      TensorRow(f"layers/{k}", LAYER + "mlp.gate_up_proj.weight", True)
      for k in ("gate_proj", "up_proj")
    ),
    TensorRow("layers/down_proj", LAYER + "mlp.down_proj.weight", True),
  ),
  fields=(
    *(row for row in SIZES if row.name not in _REPLACED),
    FieldRow("max_position_embeddings", "max_length", int, 4096),
    FieldRow("rms_norm_eps", "norm_epsilon", float, 1e-5),
    FieldRow("sliding_window", "sliding_window", int, None, nullable=True),
  ),
  read=_read,
  write=_write,
)
