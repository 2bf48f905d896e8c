"""CLIP (arXiv 2103.00020): a config.json of two objects, one a tower."""

from typing import Any

from fedfm.models.clip import CLIPConfig
from fedfm.models.encoder_layers import StackConfig
from fedfm.models.families.family import (
  ACTIVATIONS,
  Family,
  FieldRow,
  Fields,
  TensorRow,
)

# What OpenAI's files call the end of a text, which is really their highest id.
_LEGACY_EOS = 2
_SIZES = (
  ("hidden_size", "width", 512, 768),
  ("num_hidden_layers", "num_layers", 12, 12),
  ("num_attention_heads", "num_heads", 8, 12),
  ("intermediate_size", "mlp_width", 2048, 3072),
)
_IMAGE = (
  ("image_size", "image_size", 224),
  ("patch_size", "patch_size", 32),
  ("num_channels", "num_channels", 3),
)


def _tower(ours: str, theirs: str) -> tuple[TensorRow, ...]:
  layer = f"{theirs}.encoder.layers.{{i}}."
  return tuple(
    row
    for path, name in (
      ("q_proj", "self_attn.q_proj"),
      ("k_proj", "self_attn.k_proj"),
      ("v_proj", "self_attn.v_proj"),
      ("o_proj", "self_attn.out_proj"),
      ("attention_norm", "layer_norm1"),
      ("up_proj", "mlp.fc1"),
      ("down_proj", "mlp.fc2"),
      ("mlp_norm", "layer_norm2"),
    )
    for row in (
      TensorRow(
        f"{ours}/layers/{path}",
        f"{layer}{name}.weight",
        not path.endswith("norm"),
      ),
      TensorRow(f"{ours}/layers/{path}_bias", f"{layer}{name}.bias"),
    )
  )


def _norm(path: str, name: str) -> tuple[TensorRow, TensorRow]:
  return (
    TensorRow(path, f"{name}.weight"),
    TensorRow(f"{path}_bias", f"{name}.bias"),
  )


_TEXT, _VISION = "text_model.embeddings.", "vision_model.embeddings."


def _read(fields: Fields) -> dict[str, Any]:
  text = _inside(fields, "text_config")
  image = _inside(fields, "vision_config")
  eos = text.get("eos_token_id", int, 49407)
  return {
    "text": _read_stack(text, 0),
    "image": _read_stack(image, 1),
    "vocab_size": text.get("vocab_size", int, 49408),
    "max_length": text.get("max_position_embeddings", int, 77),
    "eos_id": None if eos == _LEGACY_EOS else eos,
    **{ours: image.get(name, int, value) for name, ours, value in _IMAGE},
  }


def _inside(fields: Fields, name: str) -> Fields:
  return Fields(fields.path, fields.get(name, dict), f"{name}.")


def _read_stack(fields: Fields, tower: int) -> StackConfig:
  activation = fields.get("hidden_act", str, "quick_gelu")
  if activation not in ACTIVATIONS:
    raise fields.error(
      f"hidden_act is {activation!r}, expected one of {', '.join(ACTIVATIONS)}"
    )
  return StackConfig(
    **{row[1]: fields.get(row[0], int, row[2 + tower]) for row in _SIZES},
    norm_epsilon=fields.get("layer_norm_eps", float, 1e-5),
    activation=ACTIVATIONS[activation],
  )


def _write_stack(config: StackConfig) -> dict[str, Any]:
  ours = [n for n, name in ACTIVATIONS.items() if name == config.activation]
  return {
    **{name: getattr(config, field) for name, field, *_ in _SIZES},
    "layer_norm_eps": config.norm_epsilon,
    "hidden_act": ours[0],
  }


def _write(config: CLIPConfig) -> dict[str, Any]:
  return {
    "text_config": {
      "model_type": "clip_text_model",
      **_write_stack(config.text),
      "vocab_size": config.vocab_size,
      "max_position_embeddings": config.max_length,
      "eos_token_id": _LEGACY_EOS if config.eos_id is None else config.eos_id,
      "bos_token_id": None,
      "pad_token_id": None,
    },
    "vision_config": {
      "model_type": "clip_vision_model",
      **_write_stack(config.image),
      **{name: getattr(config, field) for name, field, _ in _IMAGE},
    },
  }


CLIP = Family(
  architecture="CLIPModel",
  model_type="clip",
  tensors=(
    TensorRow("logit_scale", "logit_scale"),
    TensorRow("text/embed", _TEXT + "token_embedding.weight"),
    TensorRow("text/position_embed", _TEXT + "position_embedding.weight"),
    *_tower("text", "text_model"),
    *_norm("text/final_norm", "text_model.final_layer_norm"),
    TensorRow("text/projection", "text_projection.weight", True),
    TensorRow("image/class_token", _VISION + "class_embedding"),
    TensorRow("image/position_embed", _VISION + "position_embedding.weight"),
    TensorRow("image/patch_embed", _VISION + "patch_embedding.weight"),
    *_norm("image/embed_norm", "vision_model.pre_layrnorm"),  # Their spelling.
    *_tower("image", "vision_model"),
    *_norm("image/final_norm", "vision_model.post_layernorm"),
    TensorRow("image/projection", "visual_projection.weight", True),
  ),
  fields=(
    FieldRow("projection_dim", "projection_width", int, 512),
    FieldRow("logit_scale_init_value", "logit_scale", float, 2.6592),
  ),
  activation=None,
  read=_read,
  write=_write,
  ignored=r".*\.embeddings\.position_ids",
  config=CLIPConfig,
)
