"""One digest whatever the mesh, on the host and on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import sharding
from fedfm.checkpoint import digests

DTYPES = ("float32", "bfloat16", "int8", "bool", "int32", "complex64")
SHAPES = ((), (8,), (8, 4), (4, 8, 2))


def array(shape, dtype, seed=0):
  rng = np.random.default_rng(seed)
  x = 50 * rng.normal(size=shape)
  if dtype == "complex64":
    x = x + 1j * rng.normal(size=shape)
  return np.asarray(x).astype(jnp.dtype(dtype))


def digest(x):
  return digests.digests({"x": x})["x"]


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh({"clients": 4, "fsdp": 2})


@pytest.mark.parametrize("dtype", DTYPES)
def test_placement_changes_nothing(mesh, dtype):
  for shape in SHAPES:
    x = array(shape, dtype)
    specs = [jax.P()]
    if shape:
      specs += [jax.P("clients"), jax.P("fsdp")]
    if shape == (8, 4):
      specs += [jax.P(("clients", "fsdp")), jax.P("fsdp", "clients")]
    for spec in specs:
      placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
      assert digest(placed) == digest(x), (shape, spec)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool", "complex64"])
def test_the_device_counts_as_the_host_does(dtype):
  """What runs where arrays are not in host memory, on part of an array."""
  start, whole = (3, 2), array((9, 6), dtype)
  part = whole[3:7, 2:]
  on_device = digests._sum_on_device(part, np.array(start, np.uint32))
  on_host = digests._sum_on_host(part, start)
  np.testing.assert_array_equal(on_device, on_host)


def test_wide_elements_count_whole(mesh):
  with jax.enable_x64(True):
    x = array((8, 4), "float64")
    spec = jax.sharding.NamedSharding(mesh, jax.P("clients", "fsdp"))
    assert digest(jax.device_put(x, spec)) == digest(x)
    on_device = digests._sum_on_device(jnp.asarray(x), np.zeros(2, np.uint32))
    np.testing.assert_array_equal(on_device, digests._sum_on_host(x, (0, 0)))
  assert digest(x.view(np.float32)) == digest(x)  # The manifest has the dtype.


def test_every_change_is_seen():
  rng = np.random.default_rng(1)
  x = array((70, 1000), "float32")  # More than a block.
  whole = digest(x)
  assert digest(x.copy()) == whole
  seen = {whole}
  for _ in range(20):
    bits = x.copy().view(np.uint32)
    bits[rng.integers(70), rng.integers(1000)] ^= 1 << rng.integers(32)
    seen.add(digest(bits.view(np.float32)))
  seen |= {digest(x[::-1]), digest(x[:, ::-1]), digest(x.T), digest(-x)}
  swapped = x.copy()
  swapped[[3, 5]] = swapped[[5, 3]]
  seen |= {digest(swapped), digest(np.zeros_like(x)), digest(x * np.nan)}
  assert len(seen) == 28
  assert digest(np.float32(0.0)) != digest(np.float32(-0.0))


def test_keys_count_as_their_data():
  keys = jax.random.split(jax.random.key(3), 4)
  assert digest(keys) == digest(jax.random.key_data(keys))
