"""Makes tests/fixtures/encoders from the Hugging Face implementations.

Tiny BERT, RoBERTa, ViT and CLIP models with random weights, and what
transformers computes with them in float32: embeddings, pooled ones, logits,
the contrastive loss. Needs the extra `hf`.

  python tests/make_encoder_fixtures.py
"""

import pathlib
import shutil
from typing import Any, NamedTuple

import numpy as np

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "encoders"
VOCAB, LENGTH, PADDING, PAD = 24, 9, 3, 1
EOS = 23  # Of CLIP: ends a text, and is the highest id.
CLASSES, TEXTS, IMAGES, SIZE, PATCH = 3, 3, 2, 8, 4


class Case(NamedTuple):
  """One fixture.

  Attributes:
    kind: Its class in transformers.
    config: The config's class.
    fields: Of the config.
    outputs: Names of what is kept of the model's output.
  """

  kind: str
  config: str
  fields: dict[str, Any]
  outputs: tuple[str, ...]


def _sizes(**fields: Any) -> dict[str, Any]:
  return {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **fields,
  }


def _text(**fields: Any) -> dict[str, Any]:
  return _sizes(
    vocab_size=VOCAB,
    max_position_embeddings=LENGTH + 4,
    bos_token_id=None,
    eos_token_id=None,
    **fields,
  )


def _image(**fields: Any) -> dict[str, Any]:
  return _sizes(image_size=SIZE, patch_size=PATCH, **fields)


def _clip(eos: int) -> dict[str, Any]:
  return {
    "text_config": _text() | {"eos_token_id": eos, "pad_token_id": PAD},
    "vision_config": _image(num_hidden_layers=1),
    "projection_dim": 8,
  }


_LAST, _POOLED = "last_hidden_state", "pooler_output"
_CLIP = ("logits_per_text", "text_embeds", "image_embeds", "loss")
CASES = {
  "bert": Case("BertModel", "Bert", _text(pad_token_id=PAD), (_LAST, _POOLED)),
  "bert_classifier": Case(
    "BertForSequenceClassification",
    "Bert",
    _text(pad_token_id=PAD, num_labels=CLASSES, hidden_act="relu"),
    ("logits",),
  ),
  "bert_masked_lm": Case(
    "BertForMaskedLM", "Bert", _text(pad_token_id=PAD), ("logits",)
  ),
  "roberta": Case(
    "RobertaModel", "Roberta", _text(pad_token_id=PAD), (_LAST, _POOLED)
  ),
  "roberta_classifier": Case(
    "RobertaForSequenceClassification",
    "Roberta",
    _text(pad_token_id=PAD, num_labels=CLASSES, type_vocab_size=1),
    ("logits",),
  ),
  "roberta_masked_lm": Case(
    "RobertaForMaskedLM", "Roberta", _text(pad_token_id=PAD), ("logits",)
  ),
  "vit": Case("ViTModel", "ViT", _image(), (_LAST, _POOLED)),
  "vit_classifier": Case(
    "ViTForImageClassification",
    "ViT",
    _image(num_labels=CLASSES, num_channels=1),
    ("logits",),
  ),
  "clip": Case("CLIPModel", "CLIP", _clip(EOS - 1), _CLIP),
  "clip_legacy": Case("CLIPModel", "CLIP", _clip(2), _CLIP),
}


def texts(kind: str) -> dict[str, np.ndarray]:
  """Returns tokens [TEXTS, LENGTH], mask and types; the last is padded."""
  rng = np.random.default_rng(1)
  ids = rng.integers(3, VOCAB - 2, (TEXTS, LENGTH))
  mask = np.ones((TEXTS, LENGTH), np.int64)
  mask[-1, -PADDING:] = 0
  types = (np.arange(LENGTH) >= LENGTH // 2) * np.ones((TEXTS, 1), np.int64)
  if kind == "CLIP":
    ids[:, -PADDING - 1] = EOS - 1
    ids[0, -1] = EOS
  return {"tokens": np.where(mask, ids, PAD), "mask": mask, "types": types}


def images(channels: int) -> np.ndarray:
  """Returns images [IMAGES, SIZE, SIZE, channels]."""
  shape = (IMAGES, SIZE, SIZE, channels)
  return np.random.default_rng(2).normal(size=shape).astype(np.float32)


def make(case: Case, folder: pathlib.Path) -> None:
  """Makes a case in `folder`."""
  import torch
  import transformers

  config = getattr(transformers, f"{case.config}Config")(**case.fields)
  model = getattr(transformers, case.kind)(config)
  rng = np.random.default_rng(0)
  for name, parameter in sorted(model.named_parameters()):
    value = rng.normal(0, 0.4, tuple(parameter.shape))
    if "norm" in name.lower() or "layrnorm" in name or name == "logit_scale":
      value = parameter.detach().numpy() + 0.5 * value
    parameter.data.copy_(torch.tensor(value, dtype=torch.float32))
  model.to(torch.bfloat16).save_pretrained(folder)
  np.savez_compressed(folder / "expected.npz", **expected(case, folder))


def load(case: Case, folder: pathlib.Path) -> Any:
  """Loads a folder with transformers; every tensor must find its place."""
  import torch
  import transformers

  model, info = getattr(transformers, case.kind).from_pretrained(
    folder,
    dtype=torch.float32,
    attn_implementation="eager",
    output_loading_info=True,
  )
  wrong = {k: v for k, v in info.items() if v}
  assert not wrong, f"{folder}: {wrong}"
  return model.eval()


def expected(case: Case, folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Computes what transformers makes of a folder."""
  import torch

  inputs: dict[str, Any] = {}
  if case.config != "ViT":
    rows = texts(case.config)
    inputs = {"input_ids": rows["tokens"], "attention_mask": rows["mask"]}
    if case.fields.get("type_vocab_size", 2) > 1 and case.config != "CLIP":
      inputs["token_type_ids"] = rows["types"]
  if case.config in ("ViT", "CLIP"):
    channels = case.fields.get("num_channels", 3)
    # Theirs are [batch, channels, height, width].
    inputs["pixel_values"] = images(channels).transpose(0, 3, 1, 2)
  inputs = {k: torch.tensor(v) for k, v in inputs.items()}
  model = load(case, folder)
  with torch.no_grad():
    if "loss" in case.outputs:  # Of as many texts as images.
      square = {k: v[:IMAGES] for k, v in inputs.items()}
      loss = model(**square, return_loss=True).loss.numpy()
      out = model(**inputs)
      kept = [n for n in case.outputs if n != "loss"]
      return {"loss": loss, **{n: getattr(out, n).numpy() for n in kept}}
    out = model(**inputs)
  return {name: getattr(out, name).numpy() for name in case.outputs}


def make_all(root: pathlib.Path) -> None:
  """Makes every case below `root`."""
  for name, case in CASES.items():
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make(case, folder)


if __name__ == "__main__":
  make_all(FIXTURES)
