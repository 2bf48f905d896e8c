"""config.json of real models' layouts, read; and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
from make_model_fixtures import CASES, FIXTURES
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from fedfm import errors
from fedfm.models import families, huggingface, rope
from fedfm.models.decoder import DecoderConfig, decoder

SIZES = {
  "vocab_size": 32,
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
}


def read(tmp_path, architecture, **fields):
  values = {"architectures": [architecture], **SIZES, **fields}
  path = tmp_path / "config.json"
  path.write_text(json.dumps(values))
  return families.read_config(path)[1]


LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
# As published, in the layout of transformers 4, but for the sizes.
PUBLISHED = [
  (
    "LlamaForCausalLM",  # Llama 3.1
    {"rope_scaling": LLAMA3, "rope_theta": 5e5, "pretraining_tp": 1},
    {
      "rope_theta": 5e5,
      "rope_scaling": rope.Llama3(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
      ),
    },
  ),
  (
    "LlamaForCausalLM",  # Old files say "type".
    {"rope_scaling": {"type": "linear", "factor": 4}},
    {"rope_scaling": rope.Linear(factor=4.0)},
  ),
  ("MistralForCausalLM", {}, {"sliding_window": 4096}),  # Mistral 0.1
  ("MistralForCausalLM", {"sliding_window": None}, {"sliding_window": None}),
  (
    "Qwen2ForCausalLM",
    {
      "use_sliding_window": False,
      "sliding_window": 131072,
      "max_window_layers": 3,
      "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
      },
    },
    {
      "qkv_bias": True,
      "output_bias": False,
      "sliding_window": None,
      "rope_scaling": rope.Yarn(
        factor=4.0, original_max_position_embeddings=32768
      ),
    },
  ),
  (
    "Qwen2ForCausalLM",
    {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
    {"sliding_window": 9, "sliding_layers": (False, False, False, True)},
  ),
  ("Qwen3ForCausalLM", {"head_dim": 8}, {"qk_norm": "head", "head_dim": 8}),
  (
    "Gemma2ForCausalLM",
    {"hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 144},
    {
      "activation": "gelu_tanh",
      "query_scalar": 144,
      "attention_softcap": 50.0,
      "logit_softcap": 30.0,
      "sliding_layers": (True, False, True, False),
      "tie_embeddings": True,
      "head_dim": 256,
    },
  ),
  (
    "Gemma3ForCausalLM",
    {
      "num_hidden_layers": 7,
      "sliding_window": 512,
      "sliding_window_pattern": 6,
      "rope_local_base_freq": 10000.0,
      "rope_theta": 1e6,
      "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    {
      "sliding_layers": (True,) * 5 + (False, True),
      "rope_theta": 1e6,
      "local_rope_theta": 10000.0,
      "rope_scaling": rope.Linear(factor=8.0),
      "attention_softcap": None,
    },
  ),
  (
    "Phi3ForCausalLM",  # Phi-3-mini-128k; Phi-4-mini rotates a part.
    {
      "original_max_position_embeddings": 4096,
      "max_position_embeddings": 131072,
      "partial_rotary_factor": 0.5,
      "hidden_size": 32,
      "rope_scaling": {
        "type": "su",
        "short_factor": [1.0, 1.1],
        "long_factor": [1, 9.5],
      },
      "sliding_window": 262144,
    },
    {
      "rotary_fraction": 0.5,
      "rope_scaling": rope.LongRope(
        short_factor=(1.0, 1.1),
        long_factor=(1.0, 9.5),
        original_max_position_embeddings=4096,
      ),
      "sliding_window": 262144,
    },
  ),
]


@pytest.mark.parametrize("architecture,fields,want", PUBLISHED)
def test_published_layouts(tmp_path, architecture, fields, want):
  config = read(tmp_path, architecture, **fields)
  assert config.architecture == architecture
  assert {name: getattr(config, name) for name in want} == want
  # What is written is read as the same, by the tables of this family.
  written = families.write_config(config, "float32")
  path = tmp_path / "config.json"
  path.write_text(json.dumps(written))
  assert families.read_config(path)[1] == config
  for layout in ("rope_parameters", "rope_scaling"):  # Of version 4 and of 5.
    one = {k: v for k, v in written.items() if k != layout}
    path.write_text(json.dumps(one))
    assert families.read_config(path)[1] == config


@pytest.mark.parametrize(
  "architecture,fields,words",
  [
    ("T5Model", {}, ["T5Model", *families.FAMILIES]),
    (["LlamaForCausalLM"], {}, ["not supported", "LlamaForCausalLM"]),
    ("LlamaForCausalLM", {"hidden_act": "tanh"}, ["'tanh'", "silu", "gelu"]),
    ("LlamaForCausalLM", {"attention_bias": 1}, ["attention_bias", "bool"]),
    (
      "LlamaForCausalLM",
      {"rope_scaling": {"rope_type": "magic"}},
      ["rope_scaling", "'magic'", "'linear'", "'longrope'"],
    ),
    (
      "LlamaForCausalLM",
      {"rope_scaling": {"rope_type": ["x"]}},
      ["rope_scaling", "['x']"],
    ),
    (
      "LlamaForCausalLM",
      {"rope_scaling": LLAMA3 | {"low_freq": 1.0}},
      ["rope_scaling", "'low_freq'", "did you mean 'low_freq_factor'"],
    ),
    (
      "LlamaForCausalLM",
      {"rope_scaling": {"rope_type": "linear"}},
      ["rope_scaling.factor is missing"],
    ),
    (
      "LlamaForCausalLM",
      {"rope_scaling": {"rope_type": "linear", "factor": "8"}},
      ["rope_scaling.factor is '8'", "float"],
    ),
    (
      "LlamaForCausalLM",
      {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
      ["rope_scaling.factor: got 0.5"],
    ),
    (
      "LlamaForCausalLM",
      {"partial_rotary_factor": 0.5},
      ["partial_rotary_factor is 0.5", "1.0"],
    ),
    (
      "Qwen3ForCausalLM",
      {"layer_types": ["full_attention", "linear_attention"]},
      ["layer_types", "linear_attention", "sliding_attention"],
    ),
    (
      "Gemma2ForCausalLM",
      {"layer_types": ["sliding_attention"]},
      ["layer_types", "1 layers", "expected 4"],
    ),
    ("Gemma2ForCausalLM", {"sliding_window": None}, ["sliding_window"]),
    (
      "Gemma3ForCausalLM",
      {"use_bidirectional_attention": True},
      ["use_bidirectional_attention is True", "False"],
    ),
    (
      "Gemma3ForCausalLM",
      {"rope_parameters": {"rope_theta": 1.0}},
      ["rope_parameters", "'rope_theta'", "full_attention"],
    ),
    (
      "Qwen2ForCausalLM",
      {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}},
      ["rope_scaling", "'mrope_section'"],
    ),
    (
      "Phi3ForCausalLM",
      {"rope_scaling": {"type": "yarn", "factor": 4.0}},
      ["rope_scaling", "longrope"],
    ),
    (
      "Phi3ForCausalLM",
      {
        "rope_scaling": {
          "type": "longrope",
          "short_factor": [1.0],
          "long_factor": [1.0, "2"],
        }
      },
      ["long_factor", "numbers"],
    ),
    (
      "GPT2LMHeadModel",
      {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "scale_attn_by_inverse_layer_idx": True,
      },
      ["scale_attn_by_inverse_layer_idx is True", "False"],
    ),
  ],
  ids=str,
)
def test_what_the_model_cannot_do_is_refused(
  tmp_path, architecture, fields, words
):
  with pytest.raises(errors.CheckpointError) as e:
    read(tmp_path, architecture, **fields)
  assert "\n" not in str(e.value)
  for word in ("config.json", *words):
    assert word in str(e.value), str(e.value)


@pytest.mark.parametrize(
  "changes,words",
  [
    ({"attention_softcap": 5.0}, ["attention_softcap", "5.0", "Llama"]),
    ({"qkv_bias": True}, ["qkv_bias"]),
    ({"architecture": "Llama"}, ["architecture", "LlamaForCausalLM"]),
    ({"architecture": "GPT2LMHeadModel"}, ["positions", "GPT2LMHeadModel"]),
  ],
)
def test_options_that_no_format_has_are_not_saved(tmp_path, changes, words):
  config = DecoderConfig(
    vocab_size=8, width=8, num_layers=1, num_heads=2, mlp_width=8, **changes
  )
  model = decoder(config)
  params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), model.shapes)
  with pytest.raises(errors.ConfigError) as e:
    huggingface.save(tmp_path / "out", model, params)
  assert all(word in str(e.value) for word in words), str(e.value)
  assert not (tmp_path / "out").exists()


def copy(name, tmp_path, change):
  """Copies a fixture with its tensors changed."""
  tensors = safetensors_numpy.load_file(FIXTURES / name / "model.safetensors")
  config = (FIXTURES / name / "config.json").read_text()
  (tmp_path / "config.json").write_text(config)
  safetensors_numpy.save_file(change(tensors), tmp_path / "model.safetensors")


def test_files_without_the_prefix_and_with_buffers_are_read(tmp_path):
  """As GPT-2's own are."""

  def change(tensors):
    bare = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    return bare | {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}

  copy("gpt2", tmp_path, change)
  _, got = huggingface.load(tmp_path)
  _, want = huggingface.load(FIXTURES / "gpt2")
  jax.tree.map(np.testing.assert_array_equal, got, want)


C_ATTN = "transformer.h.1.attn.c_attn.weight"
QKV = "model.layers.0.self_attn.qkv_proj.weight"


@pytest.mark.parametrize(
  "name,change,words",
  [
    ("gpt2", lambda t: t | {C_ATTN: t[C_ATTN].T}, [C_ATTN, "transposed"]),
    ("gpt2", lambda t: t | {C_ATTN: t[C_ATTN][:, 1:]}, [C_ATTN, "[16, 48]"]),
    (
      "phi3",
      lambda t: {k: v for k, v in t.items() if k != QKV},
      [QKV, "missing"],
    ),
    (
      "qwen2",
      lambda t: t | {"model.layers.0.self_attn.o_proj.bias": np.ones(16, "f4")},
      ["o_proj.bias", "not part"],
    ),
  ],
)
def test_damaged_fused_tensors_are_refused(tmp_path, name, change, words):
  copy(name, tmp_path, lambda t: {k: v.copy() for k, v in change(t).items()})
  with pytest.raises(errors.CheckpointError) as e:
    huggingface.load(tmp_path)
  assert "\n" not in str(e.value)
  assert all(word in str(e.value) for word in words), str(e.value)


def test_every_parameter_has_a_row():
  """A table that lacks a name would fail to load its models."""
  for name, case in CASES.items():
    family, config = families.read_config(FIXTURES / name / "config.json")
    paths = {row.path for row in family.tensors}
    untied = dataclasses.replace(config, tie_embeddings=False)
    shapes = decoder(untied).shapes
    assert {f"layers/{k}" for k in shapes["layers"]} <= paths, case
    assert shapes.keys() - {"layers"} <= paths, case


def test_an_override_that_the_files_cannot_have_is_refused():
  with pytest.raises(errors.CheckpointError, match="have no layers/k_norm"):
    huggingface.load(FIXTURES / "llama", qk_norm="head")


def test_learned_positions_end():
  model, params = huggingface.load(FIXTURES / "gpt2")
  with pytest.raises(errors.ConfigError, match="sequence of 65, .* is 64"):
    model.apply(params, jnp.zeros((1, 65), jnp.int32))
  with pytest.raises(errors.ConfigError, match="sequence of 65, .* is 64"):
    model.init_cache(1, 65)
