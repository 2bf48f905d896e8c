"""Hugging Face folders: written by hand, read, written, read again."""

import json

import jax
import jax.numpy as jnp
from llama_folder import CONFIG, tensors, write
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors import numpy as safetensors_numpy

from fedfm import errors, sharding
from fedfm.models import huggingface
from fedfm.models.decoder import DecoderConfig, decoder


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


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2), (8, 1, 1)], ids=str)
def test_sharded_load_equals_unsharded(tmp_path, shape):
  write(tmp_path)
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
