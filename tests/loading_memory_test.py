"""Loading and saving hold one tensor on the host at a time, not the model.

Counted with tracemalloc, which sees NumPy's arrays and not the devices' own:
what a host needs beside what its devices hold.
"""

import tracemalloc

import jax
from jax.sharding import Mesh
import numpy as np
import pytest

from fedfm import sharding
from fedfm.models import huggingface, parameter_source, tensor_files
from fedfm.models.decoder import DecoderConfig, decoder

MIB = 1 << 20
CONFIG = DecoderConfig(
  vocab_size=64,
  width=256,
  num_layers=16,
  num_heads=4,
  mlp_width=1024,
  max_length=8,
)
LARGEST = 256 * 1024 * 4  # Bytes of a tensor in the file.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """(folder, model) of 64 MiB of weights, each its column's number and 1."""
  folder = tmp_path_factory.mktemp("saved")
  model = decoder(CONFIG)
  params = jax.tree.map(
    lambda x: np.broadcast_to(
      np.arange(x.shape[-1], dtype=np.float32) + 1, x.shape
    ),
    model.shapes,
  )
  huggingface.save(folder, model, params)
  size = (folder / tensor_files.SINGLE).stat().st_size
  assert size > 64 * MIB
  return folder, model


def peak(run):
  """Bytes that `run` had allocated at once, and what it returns."""
  tracemalloc.start()
  try:
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    result = run()
    return tracemalloc.get_traced_memory()[1] - before, result
  finally:
    tracemalloc.stop()


def mesh() -> Mesh:
  return sharding.make_mesh({"clients": 2, "fsdp": 2, "tensor": 2})


@pytest.mark.parametrize("on_mesh", [True, False])
def test_loading_and_saving(saved, on_mesh, monkeypatch, tmp_path):
  folder, model = saved
  monkeypatch.setattr(parameter_source, "_LARGE", 0)  # Every stack is large.
  place = mesh() if on_mesh else None
  most, (_, params) = peak(lambda: huggingface.load(folder, mesh=place))
  # A tensor, its copy in our layout, and what tracing and compiling need.
  assert most < 3 * LARGEST + 5 * MIB, most / MIB
  for x in jax.tree.leaves(params):
    want = np.broadcast_to(np.arange(x.shape[-1]) + 1, x.shape)
    np.testing.assert_array_equal(x, want)
  if on_mesh:
    places = sharding.shardings(place, model.axes, model.shapes)
    for x, want in zip(jax.tree.leaves(params), jax.tree.leaves(places)):
      assert x.sharding.is_equivalent_to(want, x.ndim)
  else:
    assert not any(x.committed for x in jax.tree.leaves(params))
  most, _ = peak(lambda: huggingface.save(tmp_path, model, params))
  assert most < 3 * LARGEST + 5 * MIB, most / MIB
  file = tensor_files.SINGLE
  assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


def test_small_stacks_are_built_at_once(saved):
  """The other way to build a stack gives the same, and is what is counted."""
  folder, _ = saved
  most, (_, params) = peak(lambda: huggingface.load(folder, mesh=mesh()))
  assert most > 16 * LARGEST / 4  # A device's part of a stack of layers.
  want = np.arange(CONFIG.mlp_width) + 1
  got = params["layers"]["up_proj"]
  np.testing.assert_array_equal(got, np.broadcast_to(want, got.shape))
