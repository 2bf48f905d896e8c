"""Folders of every format, converted, checked, loaded on any mesh."""

import shutil

import jax
import jax.numpy as jnp
from llama2c_test import write, write_vocabulary
from make_model_fixtures import FIXTURES
import numpy as np
import pytest
import reference
from script_runs import script

from fedfm import adapters, completion, data, errors, model_folders, sharding
from fedfm.checkpoint import weights

SOURCE = FIXTURES / "gemma3"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  folder = tmp_path_factory.mktemp("converted") / "orbax"
  model_folders.convert(SOURCE, folder, "orbax")
  return folder


def assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    assert g.dtype == w.dtype
    np.testing.assert_array_equal(g, w)


def test_orbax_holds_what_was_converted(converted, tmp_path):
  model, want = model_folders.load(SOURCE)
  again, got = model_folders.load(converted, scan_layers=False)
  assert_equal(got, want)
  assert not again.config.scan_layers
  assert model_folders.read_config(converted) == model_folders.read_config(
    SOURCE
  )
  assert jax.tree.map(lambda x: x.dtype, again.shapes) == jax.tree.map(
    lambda x: x.dtype, got
  )
  model_folders.convert(converted, tmp_path / "back", "huggingface")
  _, back = model_folders.load(tmp_path / "back")
  assert_equal(back, want)


def test_orbax_is_loaded_sharded_and_in_another_dtype(converted):
  mesh = sharding.make_mesh({"clients": 2, "fsdp": 2, "tensor": 2})
  model, want = model_folders.load(converted, dtype="float32")
  assert model.config.param_dtype == "float32"
  _, got = model_folders.load(converted, mesh, dtype="float32")
  assert_equal(got, want)
  places = sharding.shardings(mesh, model.axes, model.shapes)
  for x, place in zip(jax.tree.leaves(got), jax.tree.leaves(places)):
    assert x.sharding.is_equivalent_to(place, x.ndim)


def damaged(converted, tmp_path, change):
  """Copies the folder and changes the largest file of its weights."""
  folder = tmp_path / "damaged"
  shutil.copytree(converted, folder)
  files = (p for p in (folder / "weights").rglob("*") if p.is_file())
  largest = max(files, key=lambda p: p.stat().st_size)
  largest.write_bytes(change(largest.read_bytes()))
  return folder


def flip_bit(raw):
  raw = bytearray(raw)
  raw[len(raw) // 2] ^= 1
  return bytes(raw)


@pytest.mark.parametrize(
  "change", [flip_bit, lambda raw: raw[: len(raw) // 2]], ids=["bit", "cut"]
)
def test_damaged_weights_are_refused(converted, tmp_path, change):
  folder = damaged(converted, tmp_path, change)
  with pytest.raises(errors.CheckpointError) as e:
    model_folders.load(folder)
  assert "\n" not in str(e.value) and str(folder) in str(e.value)


def test_a_changed_manifest_is_refused(converted, tmp_path):
  folder = tmp_path / "changed"
  shutil.copytree(converted, folder)
  path = folder / "weights" / "_CHECKPOINT_METADATA"
  text = path.read_text()
  assert '"rope_theta": 100.0' in text
  path.write_text(text.replace('"rope_theta": 100.0', '"rope_theta": 10.0'))
  with pytest.raises(errors.CheckpointError, match="manifest was changed"):
    model_folders.read_config(folder)


def test_other_shapes_and_names_are_refused(converted, tmp_path):
  _, params = model_folders.load(converted)
  more = params | {"more": params["embed"]}
  for target, words in (
    (more, "more is missing"),
    ({"embed": params["embed"]}, "is not part of the model"),
    (params | {"embed": params["embed"][1:]}, r"embed has shape \[32, 16\]"),
  ):
    with pytest.raises(errors.CheckpointError, match=words):
      weights.load(converted, target)
  with pytest.raises(errors.CheckpointError, match="exists"):
    weights.save(converted, params, {})
  with pytest.raises(errors.CheckpointError, match="holds no weights"):
    weights.describe(tmp_path)
  weights.save(tmp_path / "nan", {"a": jnp.full(3, jnp.nan)}, {})
  with pytest.raises(errors.CheckpointError, match="NaN"):
    weights.load(tmp_path / "nan", {"a": jnp.zeros(3)})
  with pytest.raises(errors.CheckpointError, match="of no model"):
    model_folders.load(tmp_path / "nan")


def test_two_kinds_of_weights_are_never_in_one_folder(converted, tmp_path):
  mixed = tmp_path / "mixed"
  shutil.copytree(converted, mixed)
  with pytest.raises(errors.CheckpointError, match="mixed: holds weights in O"):
    model_folders.convert(SOURCE, mixed, "huggingface")
  shutil.copyfile(SOURCE / "model.safetensors", mixed / "model.safetensors")
  for read in (model_folders.load, model_folders.read_config):
    with pytest.raises(errors.CheckpointError) as e:
      read(mixed)
    reference.assert_one_line(
      e, "holds both model.safetensors and weights in Orbax's layout"
    )
  shutil.rmtree(mixed / "weights")
  with pytest.raises(errors.CheckpointError, match="holds model.safetensors"):
    model_folders.convert(SOURCE, mixed, "orbax")


@pytest.mark.parametrize("output_format", model_folders.FORMATS)
def test_a_file_is_no_folder_to_write_to(converted, tmp_path, output_format):
  file = tmp_path / "file"
  file.write_text("mine")
  with pytest.raises(errors.CheckpointError) as e:
    model_folders.convert(converted, file, output_format)
  reference.assert_one_line(e, str(file))
  assert file.read_text() == "mine"


def test_a_model_of_llama2c_is_exported_with_its_vocabulary(tmp_path):
  source = tmp_path / "llama2c"
  source.mkdir()
  write(source / "model.bin")
  write_vocabulary(source / "tok300.bin")
  want = data.load_tokenizer(source).encode("the cat").tolist()
  model, params = model_folders.load(source)
  adapter = adapters.full(model)
  trainable = adapter.init(jax.random.key(0), params)
  for like in (source, source / "model.bin"):
    output = tmp_path / f"of_{like.name}"
    adapters.export(output, model, params, adapter, trainable, like=like)
    assert data.load_tokenizer(output).encode("the cat").tolist() == want
    assert not (output / "model.bin").exists()
    assert_equal(model_folders.load(output)[1], params)
  with pytest.raises(errors.CheckpointError, match="no such file or folder"):
    adapters.export(
      tmp_path / "x", model, params, adapter, trainable, like=tmp_path / "no"
    )


@pytest.mark.slow
def test_scripts_convert_and_generate(tmp_path):
  source = tmp_path / "llama2c"
  source.mkdir()
  write(source / "model.bin")
  write_vocabulary(source / "tok300.bin")
  output = tmp_path / "out"
  code, out, err = script(
    "convert.py", f"--model={source}", f"--output={output}"
  )
  assert (code, out) == (0, ""), err
  model, params = model_folders.load(source)
  added = completion.generate_text(
    model, (params,), data.load_tokenizer(source), "the", max_new_tokens=5
  )
  code, out, err = script(
    "generate.py", f"--model={output}", "--prompt=the", "--max_new_tokens=5"
  )
  assert (code, out) == (0, f"the{added}\n"), err
  code, out, err = script(
    "convert.py", f"--model={tmp_path}", f"--output={tmp_path / 'other'}"
  )
  (line,) = err.splitlines()
  assert (code, out) == (2, "") and "found no model" in line
  with pytest.raises(errors.ConfigError, match="format: got 'gguf'"):
    model_folders.convert(source, tmp_path / "other", "gguf")
  with pytest.raises(errors.CheckpointError, match="exists"):
    model_folders.convert(source, output, "orbax")
