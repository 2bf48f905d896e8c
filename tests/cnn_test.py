"""The CNN against XLA's own convolution and pooling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import errors, models

CONFIG = models.CNNConfig(
  num_classes=5, image_size=10, num_channels=2, channels=(3, 4), hidden=6
)


def by_xla(params, x):
  """The same network out of `lax.conv_general_dilated` and `reduce_window`."""
  for kernel, bias in (("conv1", "bias1"), ("conv2", "bias2")):
    x = jax.lax.conv_general_dilated(
      x,
      params[kernel],
      (1, 1),
      "VALID",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jax.nn.relu(x + params[bias])
  x = jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
  ).reshape(x.shape[0], -1)
  x = jax.nn.relu(x @ params["dense"] + params["dense_bias"])
  return x @ params["head"] + params["head_bias"]


@pytest.fixture(scope="module")
def drawn():
  model = models.cnn(CONFIG)
  params = model.init(jax.random.key(0))
  params = jax.tree.map(lambda p: p + 0.01, params)  # Biases that count.
  x = jax.random.normal(jax.random.key(1), (7, 10, 10, 2))
  return model, params, x


def test_logits_and_gradients_are_those_of_xlas_convolution(drawn):
  model, params, x = drawn

  def run(apply):
    def loss(p, x):
      return jnp.sum(jnp.sin(apply(p, x)))

    return jax.jit(lambda p, x: (apply(p, x), jax.grad(loss, (0, 1))(p, x)))(
      params, x
    )

  for ours, theirs in zip(
    *map(jax.tree.leaves, map(run, (model.apply, by_xla)))
  ):
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


def test_vmapped_clients_stay_matmuls(drawn):
  model, params, x = drawn
  stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
  images = jnp.stack([x, x + 1])
  together = jax.vmap(model.apply)(stacked, images)
  for i in range(2):
    one = jax.tree.map(lambda p, i=i: p[i], stacked)
    np.testing.assert_allclose(
      together[i], model.apply(one, images[i]), rtol=1e-5, atol=1e-5
    )
  grad = jax.vmap(jax.grad(lambda p, x: jnp.sum(model.apply(p, x))))
  text = jax.jit(grad).lower(stacked, images).as_text()
  assert "stablehlo.convolution" not in text
  assert "select_and_scatter" not in text
  assert "stablehlo.dot_general" in text


def test_an_image_that_pooling_cannot_halve_is_refused():
  with pytest.raises(errors.ConfigError, match="model.image_size: got 7"):
    models.CNNConfig(image_size=7)
