"""ViT (arXiv 2010.11929)."""

from typing import Any

from fedfm.models.families import classes
from fedfm.models.families.family import Family, FieldRow, Fields, TensorRow
from fedfm.models.vision import VisionConfig

_LAYER = "vit.encoder.layer.{i}."
_BODY = (
  TensorRow("class_token", "vit.embeddings.cls_token"),
  TensorRow("position_embed", "vit.embeddings.position_embeddings"),
  TensorRow("patch_embed", "vit.embeddings.patch_embeddings.projection.weight"),
  TensorRow(
    "patch_embed_bias", "vit.embeddings.patch_embeddings.projection.bias"
  ),
  *(
    row
    for path, name in (
      ("q_proj", "attention.attention.query"),
      ("k_proj", "attention.attention.key"),
      ("v_proj", "attention.attention.value"),
      ("o_proj", "attention.output.dense"),
      ("attention_norm", "layernorm_before"),
      ("up_proj", "intermediate.dense"),
      ("down_proj", "output.dense"),
      ("mlp_norm", "layernorm_after"),
    )
    for row in (
      TensorRow(
        f"layers/{path}", f"{_LAYER}{name}.weight", not path.endswith("norm")
      ),
      TensorRow(f"layers/{path}_bias", f"{_LAYER}{name}.bias"),
    )
  ),
  TensorRow("final_norm", "vit.layernorm.weight"),
  TensorRow("final_norm_bias", "vit.layernorm.bias"),
)


def _read_pooler(fields: Fields) -> dict[str, Any]:
  width = fields.get("hidden_size", int, 768)
  pooled = fields.get("pooler_output_size", int, width)
  if pooled != width:
    raise fields.error(
      f"pooler_output_size is {pooled}, only hidden_size {width} is supported"
    )
  return {}


VIT = Family(
  architecture="ViTModel",
  model_type="vit",
  tensors=(
    *(row._replace(name=row.name.removeprefix("vit.")) for row in _BODY),
    TensorRow("pooler", "pooler.dense.weight", True),
    TensorRow("pooler_bias", "pooler.dense.bias"),
  ),
  fields=(
    FieldRow("hidden_size", "width", int, 768),
    FieldRow("num_hidden_layers", "num_layers", int, 12),
    FieldRow("num_attention_heads", "num_heads", int, 12),
    FieldRow("intermediate_size", "mlp_width", int, 3072),
    FieldRow("layer_norm_eps", "norm_epsilon", float, 1e-12),
    FieldRow("image_size", "image_size", int, 224),
    FieldRow("patch_size", "patch_size", int, 16),
    FieldRow("num_channels", "num_channels", int, 3),
  ),
  activation=("hidden_act", "gelu"),
  options={"pooler": True},
  fixed={"qkv_bias": True, "pooler_act": "tanh"},
  read=_read_pooler,
  prefix="vit.",
  ignored=r"$^",
  config=VisionConfig,
  classifier="ViTForImageClassification",
)
VIT_CLASSIFIER = VIT._replace(
  architecture="ViTForImageClassification",
  tensors=(
    *_BODY,
    TensorRow("classifier", "classifier.weight", True),
    TensorRow("classifier_bias", "classifier.bias"),
  ),
  options={"pooler": False},
  fixed={"qkv_bias": True},
  read=classes.read,
  write=classes.write,
)
FAMILIES = (VIT, VIT_CLASSIFIER)
