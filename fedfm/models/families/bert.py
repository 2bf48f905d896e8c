"""BERT (arXiv 1810.04805), with MiniLM's files, and RoBERTa (1907.11692)."""

from typing import Any

from fedfm.models.encoder import EncoderConfig
from fedfm.models.families import classes
from fedfm.models.families.family import Family, FieldRow, Fields, TensorRow

_LAYER = "encoder.layer.{i}."
_LAYERS = tuple(
  row
  for path, name in (
    ("q_proj", "attention.self.query"),
    ("k_proj", "attention.self.key"),
    ("v_proj", "attention.self.value"),
    ("o_proj", "attention.output.dense"),
    ("attention_norm", "attention.output.LayerNorm"),
    ("up_proj", "intermediate.dense"),
    ("down_proj", "output.dense"),
    ("mlp_norm", "output.LayerNorm"),
  )
  for row in (
    TensorRow(
      f"layers/{path}", f"{_LAYER}{name}.weight", not path.endswith("norm")
    ),
    TensorRow(f"layers/{path}_bias", f"{_LAYER}{name}.bias"),
  )
)
_BODY = (
  TensorRow("embed", "embeddings.word_embeddings.weight"),
  TensorRow("position_embed", "embeddings.position_embeddings.weight"),
  TensorRow("type_embed", "embeddings.token_type_embeddings.weight"),
  TensorRow("embed_norm", "embeddings.LayerNorm.weight"),
  TensorRow("embed_norm_bias", "embeddings.LayerNorm.bias"),
  *_LAYERS,
  TensorRow("pooler", "pooler.dense.weight", True),
  TensorRow("pooler_bias", "pooler.dense.bias"),
)
_IGNORED = r"embeddings\.position_ids"


def _dense(path: str, name: str) -> tuple[TensorRow, TensorRow]:
  return (
    TensorRow(path, f"{name}.weight", True),
    TensorRow(f"{path}_bias", f"{name}.bias"),
  )


def _body(prefix: str) -> tuple[TensorRow, ...]:
  return tuple(row._replace(name=prefix + row.name) for row in _BODY)


def _masked_lm(dense: str, norm: str, bias: str) -> tuple[TensorRow, ...]:
  return (
    *_dense("masked_lm_dense", dense),
    TensorRow("masked_lm_norm", f"{norm}.weight"),
    TensorRow("masked_lm_norm_bias", f"{norm}.bias"),
    TensorRow("masked_lm_bias", bias),
  )


_FIELDS = (
  FieldRow("vocab_size", "vocab_size", int, 30522),
  FieldRow("hidden_size", "width", int, 768),
  FieldRow("num_hidden_layers", "num_layers", int, 12),
  FieldRow("num_attention_heads", "num_heads", int, 12),
  FieldRow("intermediate_size", "mlp_width", int, 3072),
  FieldRow("type_vocab_size", "num_types", int, 2),
  FieldRow("layer_norm_eps", "norm_epsilon", float, 1e-12),
)
_PAD = FieldRow("pad_token_id", "pad_id", int, 0, nullable=True)
_FIXED = {
  "is_decoder": False,
  "add_cross_attention": False,
  "position_embedding_type": "absolute",
}


def _read_roberta(fields: Fields) -> dict[str, Any]:
  rows = fields.get("max_position_embeddings", int, 512)
  # The first position is after the row of padding.
  offset = fields.get("pad_token_id", int, 1) + 1
  return {"max_length": rows - offset, "position_offset": offset}


def _write_roberta(config: EncoderConfig) -> dict[str, Any]:
  return {"max_position_embeddings": config.max_length + config.position_offset}


def _read_roberta_classes(fields: Fields) -> dict[str, Any]:
  return _read_roberta(fields) | classes.read(fields)


def _write_roberta_classes(config: EncoderConfig) -> dict[str, Any]:
  return _write_roberta(config) | classes.write(config)


BERT = Family(
  architecture="BertModel",
  model_type="bert",
  tensors=_body(""),
  fields=(
    *_FIELDS,
    _PAD,
    FieldRow("max_position_embeddings", "max_length", int, 512),
  ),
  activation=("hidden_act", "gelu"),
  options={"pooler": True},
  fixed=_FIXED,
  prefix="bert.",
  ignored=_IGNORED,
  heads=r"(cls|lm_head|classifier)\..*",
  # What TensorFlow's were called, in the original files.
  renamed={
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
  },
  config=EncoderConfig,
  classifier="BertForSequenceClassification",
)
BERT_CLASSIFIER = BERT._replace(
  architecture="BertForSequenceClassification",
  tensors=(*_body("bert."), *_dense("classifier", "classifier")),
  options={"pooler": True, "head": "pooled"},
  read=classes.read,
  write=classes.write,
)
BERT_MASKED_LM = BERT._replace(
  architecture="BertForMaskedLM",
  tensors=(
    *_body("bert."),
    *_masked_lm(
      "cls.predictions.transform.dense",
      "cls.predictions.transform.LayerNorm",
      "cls.predictions.bias",
    ),
  ),
  options={"pooler": False, "head": "masked_lm"},
  fixed=_FIXED | {"tie_word_embeddings": True},
  # Files of pre-training have its other head, and the tied table again.
  ignored=rf"{_IGNORED}|pooler\..*|cls\.seq_relationship\..*"
  r"|cls\.predictions\.decoder\.(weight|bias)",
)
ROBERTA = BERT._replace(
  architecture="RobertaModel",
  model_type="roberta",
  fields=(*_FIELDS, _PAD._replace(default=1, nullable=False)),
  read=_read_roberta,
  write=_write_roberta,
  prefix="roberta.",
  classifier="RobertaForSequenceClassification",
)
ROBERTA_CLASSIFIER = ROBERTA._replace(
  architecture="RobertaForSequenceClassification",
  tensors=(
    *_body("roberta."),
    *_dense("classifier_dense", "classifier.dense"),
    *_dense("classifier", "classifier.out_proj"),
  ),
  options={"pooler": False, "head": "dense"},
  read=_read_roberta_classes,
  write=_write_roberta_classes,
)
ROBERTA_MASKED_LM = ROBERTA._replace(
  architecture="RobertaForMaskedLM",
  tensors=(
    *_body("roberta."),
    *_masked_lm("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
  ),
  options={"pooler": False, "head": "masked_lm"},
  fixed=_FIXED | {"tie_word_embeddings": True},
  ignored=rf"{_IGNORED}|pooler\..*|lm_head\.decoder\.(weight|bias)",
)
FAMILIES = (
  BERT,
  BERT_CLASSIFIER,
  BERT_MASKED_LM,
  ROBERTA,
  ROBERTA_CLASSIFIER,
  ROBERTA_MASKED_LM,
)
