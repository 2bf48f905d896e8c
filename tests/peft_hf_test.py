"""PEFT and transformers read what is saved here; needs the extra `hf`."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import adapters, models
from fedfm.models import quantization

peft = pytest.importorskip("peft", reason="needs the extra hf")
torch = pytest.importorskip("torch", reason="needs the extra hf")
transformers = pytest.importorskip("transformers", reason="needs the extra hf")

pytestmark = pytest.mark.slow
FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "models"
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 11))
MAKE = {
  "lora": lambda m: adapters.lora(m, rank=2, targets=["all-linear"]),
  "rslora": lambda m: adapters.lora(m, rank=3, use_rslora=True),
  "dora": lambda m: adapters.dora(m, rank=2, targets=["o_proj", "up_proj"]),
  "ia3": adapters.ia3,
  "prompt_tuning": lambda m: adapters.prompt_tuning(m, num_tokens=3),
  "prefix_tuning": lambda m: adapters.prefix_tuning(m, num_tokens=3),
}


def load(name):
  folder = FIXTURES / name
  model, params = models.huggingface.load(folder, dtype="float32")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype="float32", attn_implementation="eager"
  )
  return model, params, theirs.eval()


def draw(adapter, params):
  """A trainable as if it had been trained."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype),
    adapter.init(jax.random.key(0), params),
  )


def theirs_logits(model):
  with torch.no_grad():
    logits = model(torch.tensor(TOKENS)).logits.float().numpy()
  return logits[:, -TOKENS.shape[1] :]


def close(got, want):
  scale = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen2", "gemma3"])
def test_peft_reads_what_is_saved(name, kind, tmp_path):
  if (name, kind) == ("phi3", "dora"):
    pytest.skip("up_proj is part of a module: refused, see peft_test")
  model, params, theirs = load(name)
  adapter = MAKE[kind](model)
  trainable = draw(adapter, params)
  adapters.peft.save(tmp_path, model, adapter, trainable)
  theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
  close(theirs_logits(theirs), adapter.apply(params, trainable, TOKENS))


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_transformers_reads_what_is_merged(name, kind, tmp_path):
  model, params, _ = load(name)
  adapter = MAKE[kind](model)
  trainable = draw(adapter, params)
  adapters.export(tmp_path, model, params, adapter, trainable)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
  close(theirs_logits(theirs), adapter.apply(params, trainable, TOKENS))


def test_a_head_is_untied_and_a_quantised_base_is_written_in_floats(tmp_path):
  model, params, _ = load("gpt2")
  leaves = iter(jax.tree.leaves(params))
  model, params = quantization.quantize(model, "nf4", leaves)
  adapter = adapters.head(model)
  trainable = draw(adapter, params)
  adapters.export(tmp_path, model, params, adapter, trainable)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
  close(theirs_logits(theirs), adapter.apply(params, trainable, TOKENS))
