"""Adapters in the PEFT library's files: read, written, refused."""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from safetensors import numpy as safetensors_numpy

from fedfm import adapters, errors, models
from fedfm.adapters import peft

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
FOLDERS = sorted(p.name for p in (FIXTURES / "peft").iterdir() if p.is_dir())
# These programs run once: what LLVM could save is less than what it costs.
FAST_COMPILE = {"xla_backend_optimization_level": "0"}


@functools.cache
def base(name):
  return models.huggingface.load(FIXTURES / "models" / name, dtype="float32")


@functools.cache
def expected():
  return dict(np.load(FIXTURES / "peft" / "expected.npz"))


def loaded(folder):
  """Model, parameters, adapter and trainable of a fixture."""
  model, params = base(folder.partition("-")[0])
  return model, params, *peft.load(FIXTURES / "peft" / folder, model)


def logits(model, params, adapter, trainable, tokens):
  run = jax.jit(adapter.apply, compiler_options=FAST_COMPILE)
  return np.asarray(run(params, trainable, tokens))


def draw(adapter, model, seed=0):
  """A trainable as if it had been trained."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
    jax.eval_shape(adapter.init, jax.random.key(0), model.shapes),
  )


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_peft_saved_gives_the_logits_of_peft(folder):
  model, params, adapter, trainable = loaded(folder)
  tokens = expected()[f"{folder}.tokens"]
  got = logits(model, params, adapter, trainable, tokens)
  want = expected()[f"{folder}.logits"]
  scale = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * scale)
  # And it does something, or this could not fail.
  plain = jax.jit(model.apply, compiler_options=FAST_COMPILE)(params, tokens)
  assert np.abs(plain - want).max() > 1e-2 * scale


@pytest.mark.parametrize("folder", FOLDERS)
def test_loads_saves_and_loads_bitwise(folder, tmp_path):
  model, _, adapter, trainable = loaded(folder)
  peft.save(tmp_path, model, adapter, trainable)
  again, weights = peft.load(tmp_path, model)
  assert again.kind == adapter.kind
  assert again.config == adapter.config
  jax.tree.map(np.testing.assert_array_equal, weights, trainable)
  # The tensors are PEFT's own too, by name and bit.
  one = safetensors_numpy.load_file(tmp_path / peft.WEIGHTS)
  two = safetensors_numpy.load_file(FIXTURES / "peft" / folder / peft.WEIGHTS)
  assert one.keys() == two.keys()
  for name, x in one.items():
    np.testing.assert_array_equal(x, two[name])
  mine = json.loads((tmp_path / peft.CONFIG).read_text())
  theirs = json.loads((FIXTURES / "peft" / folder / peft.CONFIG).read_text())
  for field in mine:
    left, right = mine[field], theirs[field]
    if field.endswith("_modules"):
      left, right = sorted(left), sorted(right)
    assert left == right, field


@pytest.mark.parametrize(
  ("name", "make"),
  [
    ("llama", lambda m: adapters.lora(m, rank=2, targets=["all-linear"])),
    ("gpt2", lambda m: adapters.lora(m, rank=2, targets=["all-linear"])),
    ("gpt2", lambda m: adapters.lora(m, rank=3, targets=["v_proj", "o_proj"])),
    ("phi3", lambda m: adapters.lora(m, rank=2, use_rslora=True)),
    (
      "phi3",
      lambda m: adapters.dora(m, rank=2, targets=["gate_proj", "up_proj"]),
    ),
    ("phi3", adapters.ia3),
  ],
)  # fmt: skip
def test_parts_of_a_module_with_adapters_of_their_own(name, make, tmp_path):
  model, params = base(name)
  adapter = make(model)
  trainable = draw(adapter, model)
  peft.save(tmp_path, model, adapter, trainable)
  again, weights = peft.load(tmp_path, model)
  tokens = np.arange(12).reshape(2, 6)
  want = logits(model, params, adapter, trainable, tokens)
  got = logits(model, params, again, weights, tokens)
  scale = np.abs(want).max()
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * scale)


def test_names_of_modules_are_not_shared(tmp_path):
  model, _ = base("gpt2")
  adapter = adapters.lora(model, rank=2, targets=["o_proj"])
  peft.save(tmp_path, model, adapter, draw(adapter, model), "the/base")
  config = json.loads((tmp_path / peft.CONFIG).read_text())
  assert config["target_modules"] == ["attn.c_proj"]  # Not the MLP's.
  assert config["fan_in_fan_out"] is True
  assert config["base_model_name_or_path"] == "the/base"
  assert config["lora_alpha"] == 4


def edited(tmp_path, folder, change=None, **fields):
  """A copy of a fixture with other fields, or tensors."""
  copy = tmp_path / folder
  shutil.copytree(FIXTURES / "peft" / folder, copy)
  config = json.loads((copy / peft.CONFIG).read_text()) | fields
  (copy / peft.CONFIG).write_text(json.dumps(config))
  if change is not None:
    tensors = safetensors_numpy.load_file(copy / peft.WEIGHTS)
    change(tensors)
    safetensors_numpy.save_file(tensors, copy / peft.WEIGHTS)
  return copy


_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _poison(tensors):
  tensors[_A][0, 0] = np.nan


def _transpose(tensors):
  tensors[_A] = np.ascontiguousarray(tensors[_A].T)


def _rename(tensors):
  tensors["base_model.model.lm_head.lora_A.weight"] = tensors.pop(_A)


def _only_extra(tensors):
  tensors["base_model.model.model.layers.7.mlp.x.lora_A.weight"] = np.ones(3)


@pytest.mark.parametrize(
  ("folder", "change", "fields", "words"),
  [
    ("llama-lora", _poison, {}, [_A, "NaN"]),
    ("llama-lora", _transpose, {}, [_A, "[16, 3]", "[3, 16]", "transposed?"]),
    ("llama-lora", lambda t: t.pop(_A) is None, {}, [_A, "missing"]),
    ("llama-lora", _only_extra, {}, ["layers.7.mlp.x", "not part of lora"]),
    (
      "llama-lora",
      None,
      {"target_modules": ["q_proj", "v_proj"]},
      ["target_modules", "adapts model.layers.0.mlp.down_proj too"],
    ),
    (
      "llama-lora",
      None,
      {"target_modules": r".*\.0\.(self_attn|mlp)\..*"},
      ["target_modules", "adapts model.layers.1."],
    ),
    ("llama-lora", None, {"target_modules": "("}, ["'('", "no pattern"]),
    ("llama-lora", None, {"target_modules": 3}, ["target_modules is 3"]),
    ("qwen2-ia3", None, {"target_modules": ["k_proj"]}, ["v_proj too"]),
    ("llama-lora", None, {"use_rslora": "yes"}, ["use_rslora is 'yes'"]),
    ("llama-lora", None, {"use_dora": 1}, ["use_dora is 1", "true or false"]),
    ("llama-lora", None, {"r": 4}, [_A, "[3, 16]", "[4, 16]"]),
    ("llama-lora", None, {"r": 99}, ["adapter_config.json", "rank", "99"]),
    ("llama-lora", None, {"r": None}, ["r is None", "integer"]),
    ("llama-lora", None, {"lora_alpha": "8"}, ["lora_alpha", "'8'"]),
    ("llama-lora", None, {"peft_type": "VERA"}, ["peft_type", "VERA", "LORA"]),
    ("llama-lora", None, {"modules_to_save": ["norm"]}, ["no tensor", "norm"]),
    ("llama-lora", None, {"rank_pattern": {"q_proj": 4}}, ["rank_pattern"]),
    ("llama-lora", None, {"alpha_pattern": {"q_proj": 4}}, ["alpha_pattern"]),
    ("llama-lora", None, {"bias": "all"}, ["bias", "'all'", "'none'"]),
    ("llama-lora", None, {"lora_bias": True}, ["lora_bias"]),
    ("llama-lora", None, {"layers_to_transform": [0]}, ["layers_to_transform"]),
    ("llama-lora", None, {"init_lora_weights": "pissa"}, ["pissa"]),
    ("llama-lora", None, {"a_new_option": 3}, ["a_new_option", "3"]),
    (
      "llama-prompt_tuning",
      None,
      {"num_virtual_tokens": 5},
      ["prompt_embeddings", "[3, 16]", "[5, 16]"],
    ),
    (
      "llama-prompt_tuning",
      None,
      {"num_virtual_tokens": 5000},
      ["num_tokens", "5000"],
    ),
    (
      "llama-prefix_tuning",
      None,
      {"num_transformer_submodules": 2},
      ["num_transformer_submodules", "2"],
    ),
  ],
)  # fmt: skip
def test_what_is_refused(folder, change, fields, words, tmp_path):
  model, _ = base(folder.partition("-")[0])
  copy = edited(tmp_path, folder, change, **fields)
  with pytest.raises(errors.CheckpointError) as raised:
    peft.load(copy, model)
  reference.check_message(raised.value, words)


@pytest.mark.parametrize(
  "named",
  ["all-linear", r".*\.(q_proj|v_proj|down_proj)", None, ["proj", "q_proj",
   "self_attn.v_proj", "model.layers.0.mlp.down_proj",
   "layers.1.mlp.down_proj"]],
  ids=str,
)  # fmt: skip
def test_modules_are_named_in_any_way_of_peft(named, tmp_path):
  model, _ = base("llama")
  copy = edited(tmp_path, "llama-lora", target_modules=named)
  _, got = peft.load(copy, model)
  _, want = peft.load(FIXTURES / "peft" / "llama-lora", model)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_file_is_no_folder_to_write_to(tmp_path):
  model, params = base("llama")
  (tmp_path / "file").write_text("mine")
  adapter = adapters.lora(model, rank=1)
  with pytest.raises(errors.CheckpointError) as raised:
    peft.save(
      tmp_path / "file", model, adapter, adapter.init(jax.random.key(0), params)
    )
  reference.assert_one_line(raised, str(tmp_path / "file"))


def test_adapters_of_another_model_are_refused():
  with pytest.raises(errors.CheckpointError, match="no tensor is of LORA"):
    peft.load(FIXTURES / "peft" / "gpt2-lora", base("llama")[0])
  with pytest.raises(errors.CheckpointError, match="missing"):
    peft.load(FIXTURES / "peft" / "llama-lora", deeper())
  with pytest.raises(errors.CheckpointError, match="of another model"):
    peft.load(FIXTURES / "peft" / "llama-lora", deeper(2, 32))


def deeper(num_layers=3, width=16):
  return models.decoder(
    models.DecoderConfig(
      vocab_size=32,
      width=width,
      num_layers=num_layers,
      num_heads=4,
      num_kv_heads=2,
      mlp_width=24,
    )  # fmt: skip
  )


def test_pickles_are_not_read(tmp_path):
  copy = edited(tmp_path, "llama-lora")
  weights = copy / peft.WEIGHTS
  weights.rename(copy / "adapter_model.bin")
  with pytest.raises(errors.CheckpointError, match="pickled.*safetensors"):
    peft.load(copy, base("llama")[0])
  (copy / "adapter_model.bin").rename(copy / "elsewhere")
  with pytest.raises(errors.CheckpointError, match="no such file"):
    peft.load(copy, base("llama")[0])
  weights.write_bytes(b"\x80\x02}q\x00." + b"x" * 90)
  with pytest.raises(errors.CheckpointError, match="pickled"):
    peft.load(copy, base("llama")[0])


def test_what_cannot_be_written_is_refused(tmp_path):
  model, _ = base("phi3")
  full = adapters.full(model)
  with pytest.raises(errors.CheckpointError, match="'full', only for lora"):
    peft.save(tmp_path, model, full, {})
  dora = adapters.dora(model, rank=2, targets=["q_proj"])
  with pytest.raises(errors.CheckpointError, match="k_proj is part of.*qkv"):
    peft.save(tmp_path, model, dora, draw(dora, model))
  ia3 = adapters.ia3(
    model,
    targets=["gate_proj", "up_proj"],
    feedforward=["up_proj", "gate_proj"],
  )
  with pytest.raises(errors.CheckpointError, match="inputs of .*gate_up_proj"):
    peft.save(tmp_path, model, ia3, draw(ia3, model))
  lora = adapters.lora(model, rank=2)
  small = draw(adapters.lora(model, rank=1), model)
  with pytest.raises(errors.CheckpointError, match="q_proj.*is not"):
    peft.save(tmp_path, model, lora, small)
  assert not list(tmp_path.iterdir())
