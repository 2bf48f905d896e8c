"""Where a restored array goes: exactly the place of its target."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedfm.checkpoint import manifest as manifests

PyTree = Any
_KEYS = {
  "key<fry>": "threefry2x32",
  "key<rbg>": "rbg",
  "key<urbg>": "unsafe_rbg",
}


def abstract(tree: PyTree) -> PyTree:
  """Returns shapes, dtypes and shardings, a target for `restore`.

  Args:
    tree: Tree of arrays; numpy ones stay as they are.

  Returns:
    Tree of `jax.ShapeDtypeStruct` and numpy arrays.
  """
  return jax.tree.map(spec_of, tree)


def spec_of(x) -> Any:
  """Returns a leaf's shape, dtype and sharding; a numpy array as it is."""
  if isinstance(x, np.ndarray):
    return x
  sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def has_content(x) -> bool:
  """Whether Orbax gets it: it refuses empty arrays, the manifest has those."""
  return x.size > 0 or jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def empty_like(x):
  """Makes an array without content, where its target is."""
  if isinstance(x, np.ndarray):
    return np.empty_like(x)
  return jax.device_put(np.empty(x.shape, x.dtype), x.sharding)


def placed_as(x, target):
  """Gives an array exactly its target's sharding, so that jit sees no change.

  One that was free to move between devices stays so.
  """
  if isinstance(x, np.ndarray):
    return x
  if getattr(target, "committed", True):
    wanted = spec_of(target).sharding
    return x if x.sharding == wanted else jax.device_put(x, wanted)
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    impl = jax.random.key_impl(x)
    # pyrefly: ignore[bad-argument-type]
    return jax.random.wrap_key_data(manifests.host(x), impl=impl)
  return jax.device_put(manifests.host(x))


def targets(records: list[dict[str, Any]]) -> dict[str, Any]:
  """Makes targets on this host for leaves that only a manifest describes.

  Args:
    records: A manifest's leaves.

  Returns:
    Path -> numpy array to be read into, or a spec of keys.
  """

  def one(record):
    shape, dtype = tuple(record["shape"]), record["dtype"]
    if dtype in _KEYS:
      key = jax.eval_shape(lambda: jax.random.key(0, impl=_KEYS[dtype]))
      place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      return jax.ShapeDtypeStruct(shape, key.dtype, sharding=place)
    return np.empty(shape, jnp.dtype(dtype))

  return {record["path"]: one(record) for record in records}
