"""Models' folders, loaded, saved and loaded again."""

import jax
import numpy as np
from safetensors import numpy as safetensors_numpy

from fedfm import sharding
from fedfm.models import families, huggingface


def check_bitwise(folder, output):
  """Load, save and load on eight devices: the same bits, and the same config.

  Args:
    folder: A model's, of one safetensors file.
    output: Another folder, to save to.
  """
  model, params = huggingface.load(folder)
  huggingface.save(output, model, params)
  want = safetensors_numpy.load_file(folder / "model.safetensors")
  got = safetensors_numpy.load_file(output / "model.safetensors")
  assert want.keys() == got.keys()
  for key, value in want.items():
    assert value.dtype == got[key].dtype
    assert value.shape == got[key].shape
    assert value.tobytes() == got[key].tobytes(), key
  before, after = (
    families.read_config(x / "config.json") for x in (folder, output)
  )
  assert before == after
  mesh = sharding.make_mesh({"clients": 2, "fsdp": 2, "tensor": 2})
  again, spread = huggingface.load(output, mesh=mesh)
  assert again.config == model.config
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(spread)):
    np.testing.assert_array_equal(a, b)
