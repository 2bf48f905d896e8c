"""What loading and saving Hugging Face folders refuse, in one line."""

import pathlib

from llama_folder import tensors, write
import ml_dtypes
import numpy as np
import pytest

from fedfm import errors, sharding
from fedfm.models import huggingface, linen


def refuse(folder, *words, error=errors.CheckpointError, **options):
  """Checks that loading ends in one line with all of these words."""
  with pytest.raises(error) as e:
    huggingface.load(folder, **options)
  assert "\n" not in str(e.value)
  for word in words:
    assert word in str(e.value), str(e.value)


@pytest.mark.parametrize(
  "fields,words",
  [
    ({"architectures": ["OPTForCausalLM"]}, ["OPT", "LlamaForCausalLM"]),
    ({"architectures": None, "model_type": "t5"}, ["'t5'", "LlamaForCausalLM"]),
    (
      {"architectures": None, "model_type": "bert"},
      ["architectures is missing", "BertModel, Bert", "name one"],
    ),
    ({"architectures": "LlamaForCausalLM"}, ["a list of one name"]),
    ({"architectures": ["A", "B"]}, ["A, B", "name one"]),
    ({"rope_scaling": {"rope_type": "llama3"}}, ["rope_scaling.", "missing"]),
    ({"rope_parameters": {"rope_type": "x"}}, ["rope_parameters", "'x'"]),
    ({"rope_parameters": 3}, ["rope_parameters"]),
    ({"hidden_act": "tanh"}, ["hidden_act", "tanh", "silu"]),
    ({"attention_bias": True}, ["q_proj.bias", "missing"]),
    ({"quantization_config": {}}, ["quantization_config"]),
    ({"hidden_size": None}, ["hidden_size", "missing"]),
    ({"hidden_size": "16"}, ["hidden_size", "'16'", "int"]),
    ({"num_hidden_layers": True}, ["num_hidden_layers"]),
    ({"num_attention_heads": 0}, ["num_heads"]),
    ({"num_hidden_layers": 3}, ["model.layers.2.", "missing"]),
    ({"num_hidden_layers": 1}, ["model.layers.1.", "not part"]),
    ({"tie_word_embeddings": True}, ["lm_head", "not part"]),
    ({"vocab_size": 15}, ["embed_tokens", "[16, 16]", "[15, 16]"]),
  ],
  ids=str,
)
def test_bad_configs_are_refused(tmp_path, fields, words):
  write(tmp_path, **fields)
  refuse(tmp_path, str(tmp_path), *words)


@pytest.mark.parametrize(
  "text,words",
  [
    ("{", ["config.json", "JSON"]),
    ("[1]", ["config.json", "object"]),
    ('{"vocab_size": 1, "vocab_size": 2}', ["'vocab_size' is given twice"]),
    ("[" * 100_000, ["config.json"]),
  ],
  ids=["cut", "list", "twice", "deep"],
)
def test_malformed_config_is_refused(tmp_path, text, words):
  write(tmp_path)
  (tmp_path / "config.json").write_text(text)
  refuse(tmp_path, *words)


def test_missing_config_is_refused(tmp_path):
  refuse(tmp_path, "config.json", "no such file")


def change(name, value):
  """Returns a damage: one tensor replaced, or removed for None."""

  def damage(values):
    del values[name]
    if value is not None:
      values[name] = value

  return damage


Q = "model.layers.1.self_attn.q_proj.weight"
NAN = np.full((32, 16), np.nan, np.float32)


@pytest.mark.parametrize(
  "damage,words",
  [
    (change(Q, None), [Q, "missing"]),
    (change(Q, np.ones((16, 32), "f4")), [Q, "[16, 32]", "[32, 16]", "trans"]),
    (change(Q, np.ones((32, 8), "f4")), [Q, "[32, 8]", "[32, 16]"]),
    (change(Q, np.ones((32, 16), "i4")), [Q, "I32"]),
    (change(Q, NAN), [Q, "NaN"]),
    (change(Q, NAN.astype(ml_dtypes.bfloat16)), [Q, "NaN"]),
    (lambda values: values.update(more=np.ones(2, "f4")), ["more", "not part"]),
  ],
  ids=[
    "missing",
    "transposed",
    "shape",
    "integers",
    "nan",
    "bf16 nan",
    "extra",
  ],
)
def test_damaged_tensors_are_refused(tmp_path, damage, words):
  values = tensors()
  damage(values)
  write(tmp_path, values)
  refuse(
    tmp_path, "model.safetensors" if "missing" not in words else "", *words
  )


def test_nan_is_found_in_every_slice_and_overflow_is_too(tmp_path):
  values = tensors()
  values[Q] = np.zeros((32, 16), np.float32)
  values[Q][31, 15] = np.nan
  write(tmp_path, values)
  refuse(tmp_path, Q, mesh=sharding.make_mesh({"fsdp": 4, "tensor": 2}))
  values[Q][31, 15] = 1e6
  write(tmp_path, values)
  refuse(tmp_path, Q, "float16", dtype="float16")


@pytest.mark.parametrize(
  "options,words",
  [
    ({"scan_layer": True}, ["scan_layer", "did you mean 'scan_layers'"]),
    ({"remat": "all"}, ["remat"]),
    ({"dtype": "int8"}, ["dtype", "int8", "bfloat16"]),
    ({"compute_dtype": "fp32"}, ["compute_dtype"]),
    ({"param_dtype": "float32"}, ["param_dtype"]),
  ],
)
def test_bad_options_are_refused(tmp_path, options, words):
  write(tmp_path)
  refuse(tmp_path, *words, error=errors.ConfigError, **options)


def test_save_refuses_what_is_not_the_model(tmp_path):
  write(tmp_path)
  model, params = huggingface.load(tmp_path)

  def refuse_save(model, params, *words, folder=tmp_path / "out", **options):
    with pytest.raises(errors.CheckpointError) as e:
      huggingface.save(folder, model, params, **options)
    assert "\n" not in str(e.value)
    assert all(word in str(e.value) for word in words), str(e.value)

  less = {k: v for k, v in params.items() if k != "lm_head"}
  refuse_save(model, less, "lm_head", "(16, 16)")
  refuse_save(model, params | {"b": params["embed"]}, "b has shape")
  refuse_save(
    model, params | {"embed": params["embed"][:3]}, "embed", "(3, 16)"
  )
  refuse_save(linen.Model(None, None, None), {}, "only models")
  refuse_save(
    model, params, "other weights", folder=tmp_path, max_shard_bytes=1
  )
  assert not pathlib.Path(tmp_path / "out").exists()
  huggingface.save(tmp_path, model, params)  # Over its own files is fine.
