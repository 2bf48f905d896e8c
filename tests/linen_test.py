"""A user's own linen module as a Model."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import errors, sharding
from fedfm.models import linen, losses


class Mlp(nn.Module):
  partitioned: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    init = nn.initializers.lecun_normal()
    if self.partitioned:
      init = nn.with_partitioning(init, ("embed", "mlp"))
    x = nn.relu(nn.Dense(16, kernel_init=init, name="up")(x))
    x = nn.Dropout(0.5, deterministic=not train)(x)
    return nn.Dense(3, name="head")(x)


X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


def test_init_and_apply_are_the_modules_own():
  model = linen.from_linen(Mlp(), X)
  params = model.init(jax.random.key(0))
  want = Mlp().init(jax.random.key(0), X)
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(want["params"])):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(model.apply(params, X), Mlp().apply(want, X))
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), model.shapes)
  assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), params)


def test_keyword_arguments_reach_the_module():
  model = linen.from_linen(Mlp(), X)
  params = model.init(jax.random.key(0))
  out = [
    model.apply(params, X, train=True, rngs={"dropout": jax.random.key(i)})
    for i in (1, 1, 2)
  ]
  np.testing.assert_array_equal(out[0], out[1])
  assert not np.array_equal(out[0], out[2])


def test_several_inputs_are_a_tuple():
  model = linen.from_linen(Two(), (X, X))
  params = model.init(jax.random.key(0))
  assert model.apply(params, X, X).shape == (4, 3)


class Two(nn.Module):
  @nn.compact
  def __call__(self, x, y):
    return nn.Dense(3)(x * y)


def test_parameters_are_replicated_unless_named():
  plain = linen.from_linen(Mlp(), X).axes
  named = linen.from_linen(Mlp(partitioned=True), X).axes
  assert plain["up"] == {"kernel": (None, None), "bias": (None,)}
  assert named["up"] == {"kernel": ("embed", "mlp"), "bias": (None,)}
  assert named["head"] == plain["head"]


@pytest.mark.slow
def test_named_parameters_shard_and_give_the_same_loss():
  model = linen.from_linen(Mlp(partitioned=True), X)
  params = model.init(jax.random.key(0))
  assert isinstance(params["up"]["kernel"], jax.Array)
  loss_fn = losses.classification(lambda p, _, x: model.apply(p, x))
  batch = {"x": X, "label": jnp.asarray([0, 1, 2, 0]), "mask": jnp.ones(4)}
  run = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, None, batch, None)[0]))
  want = run(params)
  mesh = sharding.make_mesh({"clients": 1, "fsdp": 2, "tensor": 4})
  with jax.set_mesh(mesh):
    placed = jax.device_put(
      model.init(jax.random.key(0)),
      sharding.shardings(mesh, model.axes, model.shapes),
    )
    assert placed["up"]["kernel"].addressable_shards[0].data.shape == (4, 4)
    got = run(placed)
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)


def test_other_state_is_refused():
  with pytest.raises(errors.ConfigError, match="BatchNorm.*batch_stats"):
    linen.from_linen(nn.BatchNorm(use_running_average=False), X)
