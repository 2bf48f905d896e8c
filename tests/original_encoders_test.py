"""BERT's and RoBERTa's files as they were first published."""

import shutil

import jax
from make_encoder_fixtures import FIXTURES
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from fedfm import errors
from fedfm.models import huggingface


@pytest.mark.parametrize(
  "name,prefix,head",
  [
    ("bert", "bert.", "cls.predictions.bias"),
    ("roberta", "roberta.", "lm_head.bias"),
  ],
)
def test_original_files_are_read(name, prefix, head, tmp_path, caplog):
  """TensorFlow's names of the norms, and a model's layers under its head."""
  folder = shutil.copytree(FIXTURES / name, tmp_path / name)
  path = folder / "model.safetensors"
  _, want = huggingface.load(FIXTURES / name, dtype="float32")

  def old(key):
    key = key.replace("LayerNorm.weight", "LayerNorm.gamma")
    return key.replace("LayerNorm.bias", "LayerNorm.beta")

  tensors = safetensors_numpy.load_file(path)
  renamed = {prefix + old(key): x for key, x in tensors.items()}
  assert sum(".gamma" in key for key in renamed) == 1 + 2 * 2
  head = {head: np.zeros(3, np.float32)}
  safetensors_numpy.save_file(renamed | head, path)
  _, got = huggingface.load(folder, dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert f"{next(iter(head))} is of a head" in caplog.text
  for extra in ("other.weight", f"{prefix}cls.x", f"{prefix}pooler.more"):
    more = {extra: np.zeros(3, np.float32)}
    safetensors_numpy.save_file(renamed | more, path)
    with pytest.raises(errors.CheckpointError, match="is not part of the mod"):
      huggingface.load(folder)


def test_a_head_keeps_to_its_own(tmp_path):
  folder = shutil.copytree(FIXTURES / "bert_masked_lm", tmp_path / "bert")
  path = folder / "model.safetensors"
  tensors = safetensors_numpy.load_file(path)
  renamed = {
    key.replace("LayerNorm.weight", "LayerNorm.gamma"): x
    for key, x in tensors.items()
  }
  safetensors_numpy.save_file(renamed, path)
  _, got = huggingface.load(folder, dtype="float32")
  _, want = huggingface.load(FIXTURES / "bert_masked_lm", dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, got, want)
  extra = {"classifier.bias": np.zeros(3, np.float32)}
  safetensors_numpy.save_file(renamed | extra, path)
  with pytest.raises(errors.CheckpointError, match="classifier.bias"):
    huggingface.load(folder)
