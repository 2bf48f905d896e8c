"""Adapters on models that are not ours: linen and nnx modules as users write.

Each is held to the module itself with the adapter merged into its weights.
"""

import functools
import re

from flax import linen as nn
from flax import nnx
import hlo_text
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import adapters, errors, models, trees
from fedfm.models import quantization

WIDTH, HIDDEN, HEADS, VOCAB, DEPTH = 12, 20, 3, 17, 2
FAST_COMPILE = {"xla_backend_optimization_level": "0"}


class Block(nn.Module):
  """A transformer block; biases are kept as users have them."""

  @nn.compact
  def __call__(self, x, _=None):
    y = nn.LayerNorm(name="norm1")(x)
    x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(y, y)
    y = nn.LayerNorm(name="norm2")(x)
    y = nn.gelu(nn.Dense(HIDDEN, name="up")(y))
    return x + nn.Dense(WIDTH, name="down")(y), None


class Transformer(nn.Module):
  """With its blocks one by one, or in one scan."""

  scanned: bool = False

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(VOCAB, WIDTH, name="embed")(tokens)
    if self.scanned:
      scan = nn.scan(
        nn.remat(Block),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=DEPTH,
      )
      x, _ = scan(name="blocks")(x, None)
    else:
      for i in range(DEPTH):
        x, _ = Block(name=f"block_{i}")(x)
    return nn.Dense(VOCAB, name="head")(nn.LayerNorm(name="norm")(x))


class Mixer(nnx.Module):
  """An nnx module with a list, a shared layer, and an attention layer."""

  def __init__(self, rngs):
    self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      HEADS, WIDTH, rngs=rngs, decode=False
    )
    self.layers = nnx.List(
      [
        nnx.Linear(WIDTH, HIDDEN, rngs=rngs),
        nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs),
      ]
    )
    self.shared = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
    self.again = nnx.List([self.shared])
    self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens)
    x = x + self.attention(x)
    for layer in self.layers:
      x = nnx.gelu(layer(x))
    x = self.shared(x) + self.again[0](jnp.tanh(x))
    return self.head(x)


TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 5)).astype(np.int32)


@functools.cache
def model_of(kind):
  if kind == "nnx":
    return models.nnx.from_nnx(Mixer)
  return models.linen.from_linen(
    Transformer(scanned=kind == "linen_scanned"), TOKENS
  )


def draw(shapes, scale=0.3):
  """A tree of normal numbers; no program is compiled."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), shapes
  )


TARGETS = {
  "linen": ["attention/query", "out", "block_1/up", "head"],
  "linen_scanned": ["value", "out", "down"],
  "nnx": ["attention/query", "out", "layers/0", "layers/1", "again/0"],
}
MAKE = {
  "lora": lambda m, targets: adapters.lora(m, rank=2, targets=targets),
  "dora": lambda m, targets: adapters.dora(m, rank=2, targets=targets),
  "ia3": lambda m, targets: adapters.ia3(
    m, targets=targets, feedforward=targets[:1]
  ),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_kernels_are_found_with_their_dimensions(kind):
  model = model_of(kind)
  kernels = dict(model.kernels)
  known = trees.by_path(model.shapes)
  assert set(kernels) == {p for p in known if p.endswith("kernel")}
  for path, dims in kernels.items():
    if path.endswith(("query/kernel", "key/kernel", "value/kernel")):
      assert dims == (1, 2)
    elif path.endswith("out/kernel"):
      assert dims == (2, 1)
    else:
      assert dims == (1, 1)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("kind", TARGETS)
def test_applied_is_the_module_with_merged_weights(kind, name):
  model = model_of(kind)
  params = draw(model.shapes)
  adapter = MAKE[name](model, TARGETS[kind])
  key = jax.random.key(0)
  like = jax.eval_shape(adapter.init, key, model.shapes)

  @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  def run(params, noise):
    trainable = adapter.init(key, params)
    trained = trees.add(trainable, noise)
    return (
      model.apply(params, TOKENS),
      adapter.apply(params, trainable, TOKENS),
      adapter.apply(params, trained, TOKENS),
      model.apply(adapter.merge(params, trained), TOKENS),
    )

  base, start, applied, merged = run(params, draw(like))
  assert np.abs(base).max() > 0.5
  np.testing.assert_allclose(start, base, rtol=1e-4, atol=1e-5)
  assert np.abs(applied - base).max() > 0.1
  np.testing.assert_allclose(applied, merged, rtol=1e-3, atol=1e-4)


def test_bottlenecks_and_biases_of_a_linen_module():
  model = model_of("linen")
  params = draw(model.shapes)
  pfeiffer = adapters.pfeiffer(model, size=3, targets=["down"])
  trainable = draw(
    jax.eval_shape(pfeiffer.init, jax.random.key(0), model.shapes)
  )
  assert set(trainable) == {"block_0/down/kernel", "block_1/down/kernel"}
  plain = model.apply(params, TOKENS)
  assert np.abs(pfeiffer.apply(params, trainable, TOKENS) - plain).max() > 0.01
  bitfit = adapters.bitfit(model)
  biases = bitfit.init(jax.random.key(0), params)
  assert {p.rsplit("/", 1)[-1] for p in biases} == {"bias"}
  assert len(biases) == 8 * DEPTH + 2
  np.testing.assert_array_equal(bitfit.apply(params, biases, TOKENS), plain)


class Small(nn.Module):
  """Sizes that say in the HLO what a shape belongs to."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(40, name="up")(x))
    x = nn.DenseGeneral((5, 2), name="general")(x)
    return nn.DenseGeneral(6, axis=(-2, -1), name="head")(x)


class SmallNnx(nnx.Module):
  """The same in nnx."""

  def __init__(self, rngs):
    self.up = nnx.Linear(16, 40, rngs=rngs)
    self.general = nnx.LinearGeneral(40, (5, 2), rngs=rngs)
    self.head = nnx.LinearGeneral((5, 2), 6, axis=(-2, -1), rngs=rngs)

  def __call__(self, x):
    return self.head(self.general(nnx.relu(self.up(x))))


LANES, BATCH = 4, 7
SMALL = {
  "linen": lambda: models.linen.from_linen(Small(), jnp.zeros((1, 16))),
  "nnx": lambda: models.nnx.from_nnx(SmallNnx),
}


@pytest.mark.parametrize("quantize", ["", "int8"])
@pytest.mark.parametrize("kind", SMALL)
def test_the_base_product_is_one_matmul_for_all_lanes(kind, quantize):
  model = SMALL[kind]()
  if quantize:
    model = quantization.quantized(model, quantize)
  adapter = adapters.lora(model, rank=3, targets=["up", "general", "head"])
  trainable = jax.eval_shape(adapter.init, jax.random.key(0), model.shapes)
  lanes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((LANES, *x.shape), x.dtype), trainable
  )
  x = jax.ShapeDtypeStruct((LANES, BATCH, 16), jnp.float32)

  def gradient(trainable, params, x):
    return jax.grad(lambda t: jnp.sum(adapter.apply(params, t, x) ** 2))(
      trainable
    )

  text = (
    jax.jit(
      jax.vmap(gradient, in_axes=(0, None, 0)), compiler_options=FAST_COMPILE
    )
    .lower(lanes, model.shapes, x)
    .compile()
    .as_text()
  )
  rows = LANES * BATCH
  forward = {frozenset(shape): 0 for shape in ((16, 40), (40, 10), (10, 6))}
  for operands, batched in hlo_text.dots(text):
    shapes = [frozenset(o[-2:]) for o in operands]
    for shape in forward:
      if shape in shapes and any(o[0] == rows for o in operands):
        forward[shape] += 1
        assert not batched
    for operand, shape in zip(operands, shapes):  # No kernel a lane.
      assert not (batched and len(operand) > 2 and shape in forward)
  # Each forward; backward but for the first, whose input needs no gradient.
  assert list(forward.values()) == [1, 2, 2]
  if quantize:
    made = re.findall(r"= f32\[([\d,]+)\][^ ]* convert\(%?\S*", text)
    assert "16,40" in made or "40,16" in made
    assert not any(m.startswith(f"{LANES},16,40") for m in made)


class Convolution(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3), name="conv")(x)
    return nn.Dense(2, name="head")(x.reshape(len(x), -1))


class NnxConvolution(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)


def test_what_takes_no_adapter_is_named():
  model = models.linen.from_linen(Convolution(), jnp.zeros((1, 5, 5, 1)))
  with pytest.raises(errors.ConfigError, match=r"'conv' is conv/kernel.*dense"):
    adapters.lora(model, rank=1, targets=["conv"])
  with pytest.raises(errors.ConfigError, match="did you mean 'head'"):
    adapters.lora(model, rank=1, targets=["heads"])
  model = models.nnx.from_nnx(NnxConvolution)
  with pytest.raises(errors.ConfigError, match=r"'conv' is conv/kernel.*dense"):
    adapters.lora(model, rank=1, targets=["conv"])
  with pytest.raises(errors.ConfigError, match="needs a decoder"):
    adapters.prompt_tuning(model)


def test_a_bfloat16_module_keeps_its_dtype():
  module = nn.Dense(6, dtype=jnp.bfloat16, name="d")
  model = models.linen.from_linen(module, jnp.zeros((1, 5)))
  adapter = adapters.lora(model, rank=1, targets=["kernel"])
  params = draw(model.shapes)
  trainable = adapter.init(jax.random.key(0), params)
  x = jnp.ones((2, 5), jnp.float32)
  out = adapter.apply(params, trainable, x)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(out, model.apply(params, x))
