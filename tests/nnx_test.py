"""A user's own nnx module as a Model."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import errors, models, sharding

X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


class Mlp(nnx.Module):
  """With a partitioned kernel, a list, and dropout that is given its keys."""

  def __init__(self, rngs):
    init = nnx.with_partitioning(
      nnx.initializers.lecun_normal(), ("embed", "mlp")
    )
    self.up = nnx.Linear(8, 16, kernel_init=init, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(16, 3, rngs=rngs)])
    self.dropout = nnx.Dropout(0.5)

  def __call__(self, x, rngs=None):
    x = nnx.relu(self.up(x))
    x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
    return self.layers[0](x)


MODEL = models.nnx.from_nnx(Mlp)


def test_init_and_apply_are_the_modules_own():
  key = jax.random.key(3)
  params = MODEL.init(key)
  with nnx.use_eager_sharding(False):
    module = Mlp(nnx.Rngs(key))
  want = nnx.to_pure_dict(nnx.state(module, nnx.Param))
  jax.tree.map(np.testing.assert_array_equal, params, want)
  np.testing.assert_array_equal(MODEL.apply(params, X), module(X))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
    lambda x: (x.shape, x.dtype), MODEL.shapes
  )


def test_keyword_arguments_reach_the_module():
  params = MODEL.init(jax.random.key(0))
  out = [MODEL.apply(params, X, rngs=nnx.Rngs(dropout=i)) for i in (1, 1, 2)]
  np.testing.assert_array_equal(out[0], out[1])
  assert not np.array_equal(out[0], out[2])


def test_named_parameters_shard_and_give_the_same():
  assert MODEL.axes["up"] == {"kernel": ("embed", "mlp"), "bias": (None,)}
  assert MODEL.axes["layers"][0]["kernel"] == (None, None)
  params = MODEL.init(jax.random.key(0))
  run = jax.jit(jax.grad(lambda p: jnp.sum(MODEL.apply(p, X) ** 2)))
  want = run(params)
  mesh = sharding.make_mesh({"clients": 1, "fsdp": 2, "tensor": 4})
  with jax.set_mesh(mesh):
    placed = jax.device_put(
      params, sharding.shardings(mesh, MODEL.axes, MODEL.shapes)
    )
    assert placed["up"]["kernel"].addressable_shards[0].data.shape == (4, 4)
    got = run(placed)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


def test_other_state_is_refused():
  with pytest.raises(errors.ConfigError, match="BatchNorm.*BatchStat"):
    models.nnx.from_nnx(lambda rngs: nnx.BatchNorm(3, rngs=rngs))
