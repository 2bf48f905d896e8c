"""Hugging Face folders: written by hand, read, written, read again."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors import numpy as safetensors_numpy

from fedfm import errors
from fedfm import sharding
from fedfm.models import huggingface
from fedfm.models import linen
from fedfm.models.decoder import DecoderConfig, decoder

CONFIG = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "hidden_act": "silu",
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 4,
  "vocab_size": 16,
  "max_position_embeddings": 64,
  "rms_norm_eps": 1e-5,
  "rope_theta": 500.0,
  "rope_scaling": None,
  "tie_word_embeddings": False,
  "torch_dtype": "float32",
}


def tensors(dtype=np.float32, tied=False):
  """What a Llama file holds, by the names and shapes of transformers."""
  rng = np.random.default_rng(0)
  shapes = {
    "model.embed_tokens.weight": (16, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (16, 16),
  }
  for i in range(2):
    layer = f"model.layers.{i}."
    shapes |= {
      layer + "input_layernorm.weight": (16,),
      layer + "post_attention_layernorm.weight": (16,),
      layer + "self_attn.q_proj.weight": (32, 16),
      layer + "self_attn.k_proj.weight": (16, 16),
      layer + "self_attn.v_proj.weight": (16, 16),
      layer + "self_attn.o_proj.weight": (16, 32),
      layer + "mlp.gate_proj.weight": (24, 16),
      layer + "mlp.up_proj.weight": (24, 16),
      layer + "mlp.down_proj.weight": (16, 24),
    }
  if tied:
    del shapes["lm_head.weight"]
  return {k: rng.normal(size=s).astype(dtype) for k, s in shapes.items()}


def write(folder, values=None, **fields):
  """Writes a folder with the reference library."""
  values = tensors() if values is None else values
  (folder / "config.json").write_text(json.dumps(CONFIG | fields))
  safetensors_numpy.save_file(
    values, folder / "model.safetensors", metadata={"format": "pt"}
  )


def write_shards(folder, values=None):
  """Writes two shards and their index."""
  values = tensors() if values is None else values
  (folder / "config.json").write_text(json.dumps(CONFIG))
  files = [
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
  ]
  weight_map = {n: files[i % 2] for i, n in enumerate(sorted(values))}
  for file in files:
    part = {n: values[n] for n, f in weight_map.items() if f == file}
    safetensors_numpy.save_file(part, folder / file)
  index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  return index


def read_all(folder):
  """All tensors of a folder, by the reference library, and their bytes."""
  values = {}
  for path in sorted(folder.glob("*.safetensors")):
    values |= safetensors_numpy.load_file(path)
  return values


def refuse(folder, *words, error=errors.CheckpointError, **options):
  """Checks that loading ends in one line with all of these words."""
  with pytest.raises(error) as e:
    huggingface.load(folder, **options)
  assert "\n" not in str(e.value)
  for word in words:
    assert word in str(e.value), str(e.value)


def test_tensors_land_where_they_belong(tmp_path):
  write(tmp_path)
  model, params = huggingface.load(tmp_path)
  values = tensors()
  layers = params["layers"]
  for i in range(2):
    layer = f"model.layers.{i}."
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
      want = values[f"{layer}self_attn.{name}.weight"].T
      np.testing.assert_array_equal(layers[name][i], want)
    for name in ("gate_proj", "up_proj", "down_proj"):
      want = values[f"{layer}mlp.{name}.weight"].T
      np.testing.assert_array_equal(layers[name][i], want)
    for ours, theirs in (
      ("attention_norm", "input_layernorm"),
      ("mlp_norm", "post_attention_layernorm"),
    ):
      np.testing.assert_array_equal(
        layers[ours][i], values[f"{layer}{theirs}.weight"]
      )
  np.testing.assert_array_equal(
    params["embed"], values["model.embed_tokens.weight"]
  )
  np.testing.assert_array_equal(
    params["final_norm"], values["model.norm.weight"]
  )
  np.testing.assert_array_equal(params["lm_head"], values["lm_head.weight"].T)
  c = model.config
  assert (c.width, c.mlp_width, c.num_layers, c.vocab_size) == (16, 24, 2, 16)
  assert (c.num_heads, c.num_kv_heads, c.head_dim) == (8, 4, 4)
  assert (c.rope_theta, c.norm_epsilon, c.max_length) == (500.0, 1e-5, 64)
  assert not c.tie_embeddings
  # That this layout means what transformers means by it is held by
  # decoder_test's NumPy decoder: halves rotated, groups of consecutive heads.
  logits = jax.jit(model.apply)(params, np.zeros((1, 3), np.int32))
  assert logits.shape == (1, 3, 16) and bool(jnp.isfinite(logits).all())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 4000])
@pytest.mark.parametrize(
  "dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str
)
def test_round_trip_is_bitwise(tmp_path, dtype, max_shard_bytes, tied):
  first, second = tmp_path / "a", tmp_path / "b"
  first.mkdir()
  write(first, tensors(dtype, tied), tie_word_embeddings=tied)
  model, params = huggingface.load(first)
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(dtype)}
  assert model.config.param_dtype == np.dtype(dtype).name
  huggingface.save(second, model, params, max_shard_bytes=max_shard_bytes)
  want, got = read_all(first), read_all(second)
  assert want.keys() == got.keys()
  for name in want:
    assert got[name].dtype == want[name].dtype
    assert got[name].tobytes() == want[name].tobytes(), name
  files = list(second.glob("*.safetensors"))
  assert (len(files) == 1) == (max_shard_bytes == 1 << 30)
  for file in files:
    with safetensors.safe_open(file, framework="np") as f:
      assert f.metadata() == {"format": "pt"}
    if len(files) > 1:
      assert file.stat().st_size < 4000 + 2000  # And a header.
  again, params_again = huggingface.load(second)
  assert again.config == model.config
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(params_again)):
    np.testing.assert_array_equal(a, b)
  assert not list(second.glob("*.part"))


def test_saved_config_is_what_transformers_reads(tmp_path):
  write(tmp_path, tensors(ml_dtypes.bfloat16))
  model, params = huggingface.load(tmp_path)
  huggingface.save(tmp_path, model, params)
  got = json.loads((tmp_path / "config.json").read_text())
  assert got["torch_dtype"] == "bfloat16"
  assert got["rope_parameters"] == {"rope_theta": 500.0, "rope_type": "default"}
  for name in CONFIG.keys() - {"rope_scaling", "torch_dtype"}:
    assert got[name] == CONFIG[name], name


def test_index_of_saved_shards_names_each_tensor(tmp_path):
  model = decoder(
    DecoderConfig(
      vocab_size=16, width=16, num_layers=3, num_heads=2, mlp_width=16
    )
  )
  params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), model.shapes)
  huggingface.save(tmp_path, model, params, max_shard_bytes=3000)
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  total = sum(x.nbytes for x in read_all(tmp_path).values())
  assert index["metadata"] == {"total_size": total}
  for name, file in index["weight_map"].items():
    with safetensors.safe_open(tmp_path / file, framework="np") as f:
      f.get_tensor(name)  # Raises if it is not there.


def test_shards_equal_one_file(tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  one.mkdir(), two.mkdir()
  write(one), write_shards(two)
  a, b = (huggingface.load(x)[1] for x in (one, two))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2), (8, 1, 1)], ids=str)
def test_sharded_load_equals_unsharded(tmp_path, shape):
  write_shards(tmp_path)
  model, want = huggingface.load(tmp_path)
  mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, shape)))
  _, got = huggingface.load(tmp_path, mesh=mesh)
  places = sharding.shardings(mesh, model.axes, model.shapes)
  for g, w, place in zip(*map(jax.tree.leaves, (got, want, places))):
    assert g.sharding.is_equivalent_to(place, g.ndim)
    np.testing.assert_array_equal(g, w)
  saved = tmp_path / "saved"
  huggingface.save(saved, model, got)
  assert read_all(saved).keys() == tensors().keys()
  for name, value in read_all(saved).items():
    np.testing.assert_array_equal(value, tensors()[name])


def test_sharded_load_reads_slices_only_and_each_once(tmp_path, monkeypatch):
  write(tmp_path)
  sizes = []
  entry = huggingface.tensor_files.TensorEntry
  original = entry.read

  def read(self, index):
    part = original(self, index)
    sizes.append((self.name, part.size))
    return part

  monkeypatch.setattr(entry, "read", read)
  mesh = sharding.make_mesh({"clients": 2, "fsdp": 2, "tensor": 2})
  huggingface.load(tmp_path, mesh=mesh)
  q = [n for name, n in sizes if name.endswith("0.self_attn.q_proj.weight")]
  assert q == [32 * 16 // 4] * 4
  assert sum(n for _, n in sizes) == sum(x.size for x in tensors().values())


def test_mesh_that_does_not_divide_is_refused(tmp_path):
  write(tmp_path, tensors(), num_hidden_layers=2)
  mesh = sharding.make_mesh(
    {"clients": 1, "fsdp": 1, "tensor": 3}, jax.devices()[:3]
  )
  refuse(tmp_path, "mesh.tensor", error=errors.ConfigError, mesh=mesh)


def test_dtype_converts_and_options_reach_the_model(tmp_path):
  write(tmp_path, tensors(ml_dtypes.bfloat16))
  model, params = huggingface.load(
    tmp_path,
    dtype="float32",
    compute_dtype="bfloat16",
    scan_layers=False,
    remat="full",
  )
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
  c = model.config
  assert (c.param_dtype, c.dtype) == ("float32", "bfloat16")
  assert (c.scan_layers, c.remat) == (False, "full")
  want = tensors(ml_dtypes.bfloat16)["model.norm.weight"].astype(np.float32)
  np.testing.assert_array_equal(params["final_norm"], want)


def test_mixed_dtypes_are_kept(tmp_path):
  values = tensors(ml_dtypes.bfloat16)
  values["model.norm.weight"] = values["model.norm.weight"].astype(np.float32)
  write(tmp_path, values)
  model, params = huggingface.load(tmp_path)
  assert params["final_norm"].dtype == jnp.float32
  assert params["embed"].dtype == jnp.bfloat16
  assert model.shapes["final_norm"].dtype == jnp.float32


def test_float64_needs_x64(tmp_path):
  write(tmp_path, tensors(np.float64))
  refuse(tmp_path, "float64", "dtype='float32'")
  with jax.enable_x64(True):
    _, params = huggingface.load(tmp_path)
    assert params["embed"].dtype == jnp.float64
  assert huggingface.load(tmp_path, dtype="float32")[1]["embed"].dtype == (
    jnp.float32
  )


@pytest.mark.parametrize(
  "fields",
  [
    {"rope_theta": None, "rope_parameters": {"rope_theta": 500.0}},
    {
      "rope_theta": 1.0,
      "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
    },
    {"rope_scaling": {"type": "default"}},
  ],
)
def test_both_layouts_of_rope(tmp_path, fields):
  write(tmp_path, **fields)
  assert huggingface.load(tmp_path)[0].config.rope_theta == 500.0


def test_absent_fields_take_llama_defaults(tmp_path):
  values = tensors()
  for i in range(2):
    for name in "kv":
      key = f"model.layers.{i}.self_attn.{name}_proj.weight"
      values[key] = np.ones((16, 16), np.float32)
    for name, shape in (("q", (16, 16)), ("o", (16, 16))):
      key = f"model.layers.{i}.self_attn.{name}_proj.weight"
      values[key] = np.ones(shape, np.float32)
  nothing = dict.fromkeys((
    "architectures",
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
  ))  # fmt: skip
  write(tmp_path, values, **nothing)
  c = huggingface.load(tmp_path)[0].config
  assert (c.num_kv_heads, c.head_dim, c.rope_theta) == (8, 2, 10_000.0)
  assert (c.norm_epsilon, c.max_length, c.tie_embeddings) == (1e-6, 2048, False)


def test_harmless_extras_are_ignored(tmp_path):
  values = tensors(tied=True)
  values["lm_head.weight"] = values["model.embed_tokens.weight"].copy()
  values["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, "f4")
  write(tmp_path, values, tie_word_embeddings=True)
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
  _, params = huggingface.load(tmp_path)
  assert "lm_head" not in params
  values["lm_head.weight"][0, 0] += 1
  write(tmp_path, values, tie_word_embeddings=True)
  refuse(tmp_path, "lm_head.weight", "not part of the model")


@pytest.mark.parametrize(
  "fields,words",
  [
    ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2", "LlamaForCausalLM"]),
    ({"architectures": None, "model_type": "bert"}, ["LlamaForCausalLM"]),
    ({"rope_scaling": {"rope_type": "llama3"}}, ["rope_scaling", "llama3"]),
    ({"rope_scaling": {"type": "linear"}}, ["rope_scaling", "linear"]),
    ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_parameters", "yarn"]),
    ({"rope_parameters": 3}, ["rope_parameters"]),
    ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
    ({"attention_bias": True}, ["attention_bias"]),
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


def test_missing_pieces_are_named(tmp_path):
  refuse(tmp_path, "config.json", "no such file")
  write(tmp_path)
  (tmp_path / "model.safetensors").unlink()
  refuse(tmp_path, "neither", "model.safetensors")


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
  refuse_save(linen.Model(None, None, None), {}, "only decoders")
  refuse_save(
    model, params, "other weights", folder=tmp_path, max_shard_bytes=1
  )
  assert not pathlib.Path(tmp_path / "out").exists()
  huggingface.save(tmp_path, model, params)  # Over its own files is fine.
