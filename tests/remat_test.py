"""What remat keeps of a layer for the backward pass, scanned and vmapped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import adapters, models

LAYERS, LANES, BATCH, LENGTH = 3, 2, 2, 5
CONFIG = functools.partial(
    models.DecoderConfig, vocab_size=17, width=8, num_layers=LAYERS,
    num_heads=2, num_kv_heads=1, head_dim=6, mlp_width=22, scan_layers=True,
)  # fmt: skip
# Query heads, one key and one value head, and both products of the SwiGLU.
QUERY, KEY_VALUE, MLP = 2 * 6, 6, 22


def gradients(remat):
  """The lanes' gradients of LoRA on all kernels, and their arguments."""
  model = models.decoder(CONFIG(remat=remat))
  names = [k for k, x in model.shapes["layers"].items() if len(x.shape) == 3]
  adapter = adapters.lora(model, rank=3, targets=names)
  loss = models.losses.language_model(adapters.loss_apply(adapter))
  params = model.init(jax.random.key(0))
  trainable = adapter.init(jax.random.key(1), params)
  lanes = jax.tree.map(lambda x: jnp.stack([x + 0.01, x - 0.02]), trainable)
  tokens = np.random.default_rng(0).integers(0, 17, (LANES, BATCH, LENGTH))
  batch = {
    "tokens": tokens,
    "loss_mask": np.ones(tokens.shape, np.float32),
    "mask": np.ones((LANES, BATCH), np.float32),
  }

  def gradient(trainable, batch):
    return jax.grad(loss, has_aux=True)(trainable, params, batch, None)[0]

  return jax.vmap(gradient), (lanes, batch)


def scans(jaxpr):
  for equation in jaxpr.eqns:
    if equation.primitive.name == "scan":
      yield equation
    for inner in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield from scans(inner)


def kept_per_token(remat):
  """Numbers a token and layer that the forward pass keeps, array by array."""
  run, arguments = gradients(remat)
  found = [
    equation
    for equation in scans(jax.make_jaxpr(run)(*arguments).jaxpr)
    if equation.params["length"] == LAYERS
  ]
  assert len(found) == 2  # Forward, and backward.
  stacked = [v.aval for v in found[0].outvars if v.aval.shape[:1] == (LAYERS,)]
  tokens = LAYERS * LANES * BATCH * LENGTH
  sizes = [x.size / tokens for x in stacked if x.size >= tokens]
  return sorted(sizes)


@pytest.mark.slow
def test_what_is_kept():
  width = 8
  assert kept_per_token("full") == [width]
  assert kept_per_token("mlp") == [width, MLP, MLP]
  dots = kept_per_token("dots")
  # Every kernel's product, none of attention's, and LoRA's inner ones.
  for size in (QUERY, KEY_VALUE, MLP):
    assert size in dots
  assert sum(dots) < sum(kept_per_token("none"))


@pytest.mark.slow
@pytest.mark.parametrize(
  "remat",
  ["mlp", *(pytest.param(x, marks=pytest.mark.slow) for x in ("full", "dots"))],
)
def test_gradients_are_the_same(remat):
  run, arguments = gradients("none")
  expected = jax.jit(run)(*arguments)
  run, arguments = gradients(remat)
  got = jax.jit(run)(*arguments)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
