"""Modules that PEFT saves whole beside an adapter, there and back."""

import json
import pathlib

import jax
import jax.numpy as jnp
import make_encoder_fixtures
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from fedfm import adapters, errors, models
from fedfm.adapters import peft

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
BERT, ROBERTA, VIT, LLAMA, PHI = (
  "encoders/bert_classifier",
  "encoders/roberta_classifier",
  "encoders/vit_classifier",
  "models/llama",
  "models/phi3",
)
# Model, what is trained beside LoRA, and what PEFT is told.
CASES = [
  (BERT, ("classifier", "pooler"), ["classifier", "pooler.dense"]),
  (ROBERTA, ("classifier",), ["classifier"]),
  (VIT, ("classifier", "final_norm"), ["classifier", "layernorm"]),
  (LLAMA, ("lm_head", "final_norm"), ["lm_head", "model.norm"]),
  (LLAMA, ("layers/mlp_norm",), ["post_attention_layernorm"]),
  (PHI, ("gate_proj", "up_proj"), ["gate_up_proj"]),
]


def load(name):
  return models.huggingface.load(FIXTURES / name, dtype="float32")


def make(model, also):
  lora = adapters.lora(model, rank=2, targets=["o_proj", "down_proj"])
  return adapters.with_parameters(model, lora, also)


def draw(adapter, params):
  """A trainable as if it had been trained."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype),
    adapter.init(jax.random.key(0), params),
  )


@pytest.mark.parametrize(("name", "also", "modules"), CASES)
def test_modules_go_there_and_back_bitwise(name, also, modules, tmp_path):
  model, params = load(name)
  adapter = make(model, also)
  trainable = draw(adapter, params)
  peft.save(tmp_path, model, adapter, trainable)
  config = json.loads((tmp_path / peft.CONFIG).read_text())
  assert config["modules_to_save"] == modules
  again, found = peft.load(tmp_path, model)
  assert found.keys() == trainable.keys()
  jax.tree.map(np.testing.assert_array_equal, found, trainable)
  assert again.config["paths"] == adapter.config["paths"]


def test_names_and_layouts_are_those_of_the_model(tmp_path):
  model, params = load(BERT)
  trainable = draw(make(model, ("classifier",)), params)
  peft.save(tmp_path, model, make(model, ("classifier",)), trainable)
  tensors = safetensors_numpy.load_file(tmp_path / peft.WEIGHTS)
  np.testing.assert_array_equal(
    tensors["base_model.model.classifier.weight"], trainable["classifier"].T
  )
  np.testing.assert_array_equal(
    tensors["base_model.model.classifier.bias"], trainable["classifier_bias"]
  )


def test_what_peft_cannot_save_is_refused(tmp_path):
  for name, also, message in (
    (PHI, ("up_proj",), "gate_proj is part of .*gate_up_proj, which PEFT"),
    (BERT, ("pooler_bias",), "pooler is part of bert.pooler.dense"),
    (VIT, ("class_token",), "class_token is no module's weight"),
    ("models/gpt2", ("embed",), "embed is the output head too"),
  ):
    model, params = load(name)
    targets = ["o_proj"]
    adapter = adapters.with_parameters(
      model, adapters.lora(model, rank=2, targets=targets), also
    )
    with pytest.raises(errors.CheckpointError, match=message):
      peft.save(tmp_path, model, adapter, draw(adapter, params))
  model, params = load(LLAMA)
  prompt = adapters.prompt_tuning(model, num_tokens=2)
  adapter = adapters.with_parameters(model, prompt, ("lm_head",))
  with pytest.raises(errors.CheckpointError, match="lm_head is trained beside"):
    peft.save(tmp_path, model, adapter, draw(adapter, params))


def test_one_tower_of_clip_is_named_layer_by_layer(tmp_path):
  model, params = load("encoders/clip")
  lora = adapters.lora(model, rank=2, targets=["text/layers/q_proj"])
  trainable = draw(lora, params)
  peft.save(tmp_path, model, lora, trainable)
  config = json.loads((tmp_path / peft.CONFIG).read_text())
  assert config["target_modules"][0] == (
    "text_model.encoder.layers.0.self_attn.q_proj"
  )
  _, found = peft.load(tmp_path, model)
  jax.tree.map(np.testing.assert_array_equal, found, trainable)


def theirs(name, library):
  """The Hugging Face model of a fixture, and what our model gives as it."""
  auto = {BERT: "SequenceClassification", ROBERTA: "SequenceClassification"}
  auto |= {VIT: "ImageClassification"}
  kind = getattr(library, f"AutoModelFor{auto.get(name, 'CausalLM')}")
  return kind.from_pretrained(FIXTURES / name, dtype="float32").eval()


def inputs(name):
  """Arguments for their model, and for ours."""
  if name == VIT:
    images = make_encoder_fixtures.images(3)
    return {"pixel_values": np.moveaxis(images, -1, 1)}, (images,), {}
  if name in (BERT, ROBERTA):
    kind = "Bert" if name == BERT else "Roberta"
    rows = make_encoder_fixtures.texts(kind)
    mask = rows["mask"].astype(np.int64)
    both = {"input_ids": rows["tokens"], "attention_mask": mask}
    return both, (rows["tokens"],), {"mask": rows["mask"]}
  tokens = np.random.default_rng(0).integers(0, 32, (2, 11))
  return {"input_ids": tokens}, (tokens,), {}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "also", "modules"), CASES)
def test_peft_reads_and_writes_them(name, also, modules, tmp_path):
  library = pytest.importorskip("peft", reason="needs the extra hf")
  torch = pytest.importorskip("torch", reason="needs the extra hf")
  transformers = pytest.importorskip("transformers", reason="needs hf")
  if name == VIT and int(transformers.__version__.split(".")[0]) >= 5:
    pytest.skip("transformers 5 names ViT's modules otherwise than its files")
  model, params = load(name)
  adapter = make(model, also)
  trainable = draw(adapter, params)
  peft.save(tmp_path / "ours", model, adapter, trainable)
  wrapped = library.PeftModel.from_pretrained(
    theirs(name, transformers), tmp_path / "ours"
  ).eval()
  their_inputs, args, options = inputs(name)

  def logits(wrapped):
    tensors = {k: torch.tensor(x) for k, x in their_inputs.items()}
    with torch.no_grad():
      return wrapped(**tensors).logits.float().numpy()

  want = adapter.apply(params, trainable, *args, **options)
  scale = np.abs(want).max()
  np.testing.assert_allclose(logits(wrapped), want, rtol=0, atol=2e-5 * scale)
  # And what PEFT makes of its own, changed at random.
  config = json.loads((tmp_path / "ours" / peft.CONFIG).read_text())
  made = library.get_peft_model(
    theirs(name, transformers),
    library.LoraConfig(
      task_type=config["task_type"],
      r=2,
      target_modules=config["target_modules"],
      modules_to_save=modules,
    ),
  ).eval()
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in made.parameters():
      if parameter.requires_grad:
        parameter.add_(0.2 * torch.randn_like(parameter))
  made.save_pretrained(tmp_path / "theirs")
  read, found = peft.load(tmp_path / "theirs", model)
  got = read.apply(params, found, *args, **options)
  np.testing.assert_allclose(got, logits(made), rtol=0, atol=2e-5 * scale)
