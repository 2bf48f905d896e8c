"""Quantised kernels: how far off they are, and what they cost."""

import functools
import re
import statistics

import hlo_text
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import (
  adapters,
  errors,
  models,
  sharding,
  trees,
)
from fedfm.models import huggingface, layers, quantization

FAST_COMPILE = {"xla_backend_optimization_level": "0"}
KINDS = list(quantization.KINDS)


def weights(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def nf4_codebook():
  """NF4 from its definition: quantiles of a normal, evenly spaced, with a 0.

  As in QLoRA: 8 positive and 7 negative quantiles, the outermost so far out as
  the mean of the two outermost of 16 and of 15 intervals.
  """
  normal = statistics.NormalDist()
  offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
  above = [normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
  below = [-normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
  values = np.array(sorted([*below, 0.0, *above]))
  return values / np.abs(values).max()


def nf4_reference(kernel):
  """Rounds [in, out] to NF4 in NumPy and float64, element by element."""
  codebook, result = nf4_codebook(), np.zeros_like(kernel, np.float64)
  for column in range(kernel.shape[1]):
    for begin in range(0, kernel.shape[0], 64):
      block = kernel[begin : begin + 64, column].astype(np.float64)
      scale = np.abs(block).max()
      for row, w in enumerate(block):
        if scale > 0:
          nearest = np.argmin(np.abs(codebook - w / scale))
          result[begin + row, column] = codebook[nearest] * scale
  return result


def test_codebook_is_the_quantiles_of_a_normal():
  np.testing.assert_allclose(
    quantization.NF4_CODEBOOK, nf4_codebook(), rtol=0, atol=2e-7
  )


@pytest.mark.parametrize("rows", [128, 80, 7])
def test_nf4_is_the_reference(rows):
  kernel = weights(rows, 5) * np.array([1, 10, 0.01, 0, 1e-3])
  kernel = kernel.astype(np.float32)
  got = quantization.nf4(jnp.asarray(kernel))
  assert got.shape == kernel.shape
  assert got.codes.shape == ((rows + 1) // 2, 5)
  assert got.codes.dtype == jnp.uint8
  want = nf4_reference(kernel)
  scale = np.abs(kernel).max(axis=0)
  assert (np.abs(got.array() - want) <= 4e-7 * scale).all()


def test_int8_is_off_by_half_a_step_at_most():
  kernel = weights(3, 40, 6)
  kernel[1, :, 2] = 0
  got = quantization.int8(jnp.asarray(kernel))
  assert got.values.dtype == jnp.int8
  step = np.abs(kernel).max(axis=1, keepdims=True) / 127
  error = np.abs(np.asarray(got.array()) - kernel)
  assert (error <= step / 2 * (1 + 1e-5)).all()
  # And some are: the bound is tight.
  assert (error > 0.45 * step).any()
  assert not got.array()[1, :, 2].any()
  # The largest of each channel is kept.
  largest = np.take_along_axis(
    error, np.abs(kernel).argmax(axis=1, keepdims=True), axis=1
  )
  assert (largest <= 1e-6 * np.abs(kernel).max()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_error_of_the_product_is_bounded(kind):
  kernel, x = weights(192, 24), weights(9, 192, seed=1)
  quantised = quantization.KINDS[kind](jnp.asarray(kernel))
  y = np.asarray(layers.dense(jnp.asarray(x), quantised))
  exact = x.astype(np.float64) @ kernel
  if kind == "int8":
    step = np.abs(kernel).max(axis=0) / 127
    bound = np.abs(x).sum(axis=1, keepdims=True) * step / 2
  else:
    # Half the widest gap of the codebook, of each block's largest.
    gap = np.diff(nf4_codebook()).max() / 2
    largest = np.abs(kernel.reshape(3, 64, 24)).max(axis=1)
    bound = np.abs(x).reshape(9, 3, 64).sum(axis=2) @ largest * gap
  error = np.abs(y - exact)
  assert (error <= bound + 1e-4).all()
  # Rounding errors are independent: in truth they mostly cancel.
  typical = np.linalg.norm(y - exact) / np.linalg.norm(exact)
  low, high = {"int8": (0.003, 0.012), "nf4": (0.05, 0.12)}[kind]
  assert low < typical < high, typical


@pytest.mark.parametrize("kind", KINDS)
def test_dense_is_the_product_with_its_array_in_value_and_gradient(kind):
  kernel = quantization.KINDS[kind](jnp.asarray(weights(70, 6)))
  x, bias = jnp.asarray(weights(4, 70, seed=1)), jnp.asarray(weights(6, seed=2))

  def through(x, kernel):
    return jnp.sum(jnp.sin(layers.dense(x, kernel, bias)))

  got = jax.value_and_grad(through)(x, kernel)
  want = jax.value_and_grad(through)(x, kernel.array())
  jax.tree.map(np.testing.assert_array_equal, got, want)
  # Forward mode too: forward gradients go through a quantised base.
  dot = jax.jvp(lambda x: through(x, kernel), (x,), (jnp.ones_like(x),))[1]
  np.testing.assert_allclose(dot, jnp.sum(want[1]), rtol=1e-4)
  half = layers.dense(x.astype(jnp.bfloat16), kernel)
  assert half.dtype == jnp.bfloat16


# Widths that say in the HLO what a shape belongs to.
CONFIG = models.DecoderConfig(
    vocab_size=32, width=16, num_layers=3, num_heads=4, head_dim=6,
    num_kv_heads=2, mlp_width=40,
)  # fmt: skip
LANES = 4


@functools.cache
def pieces(kind):
  """A model, LoRA on it, and what its gradient over lanes is taken of."""
  model = models.decoder(CONFIG)
  if kind:
    model = quantization.quantized(model, kind)
  adapter = adapters.lora(model, rank=3, targets=["q_proj", "up_proj"])

  @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  def init(key):
    params = model.init(key)
    trainable = adapter.init(key, params)
    return params, jax.tree.map(
      lambda x: jnp.stack([x + 0.1 * i for i in range(1, LANES + 1)]), trainable
    )

  params, trainables = init(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(0, 32, (LANES, 2, 11))
  return model, adapter, (trainables, params, tokens.astype(np.int32))


def gradients(adapter, trainables, params, tokens):
  """Losses [lanes] and gradients [lanes, ...]."""
  loss = models.losses.language_model(adapters.loss_apply(adapter))
  mesh = jax.sharding.get_abstract_mesh()

  def one(trainable, base, tokens):
    batch = {
      "tokens": tokens,
      "loss_mask": jnp.ones(tokens.shape),
      "mask": jnp.ones(tokens.shape[0]),
    }
    return jax.value_and_grad(loss, has_aux=True)(trainable, base, batch, None)

  (values, _), grads = jax.vmap(
    one,
    in_axes=(0, None, 0),
    spmd_axis_name=None if mesh.empty else "clients",
  )(trainables, params, tokens)
  return values, grads


@functools.cache
def compiled(kind):
  _, adapter, arguments = pieces(kind)
  run = jax.jit(
    functools.partial(gradients, adapter), compiler_options=FAST_COMPILE
  )
  return run.lower(*arguments).compile()


@pytest.mark.parametrize(
  "kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)]
)
def test_kernels_become_float_once_for_all_lanes(kind):
  text = compiled(kind).as_text()
  base = models.decoder(CONFIG).shapes["layers"]
  kernels = {x.shape[1:] for x in base.values() if len(x.shape) == 3}
  stacked = {x.shape for x in base.values() if len(x.shape) == 3}
  floats = hlo_text.shapes_in("\n".join(re.findall(r"= (f32\[[\d,]*\])", text)))
  # A layer's kernel is made float, never a stack of them, and never a lane's.
  assert any(s in kernels or s[::-1] in kernels for s in floats)
  for shape in floats:
    assert shape not in stacked, shape
    per_lane = len(shape) >= 3 and shape[0] == LANES and shape[-2:] in kernels
    assert not per_lane, shape
  for operands, batched in hlo_text.dots(text):
    for operand in operands:
      assert not (batched and len(operand) > 2 and operand[-2:] in kernels)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_and_memory_is_less(kind):
  arguments = pieces(kind)[-1]
  losses, grads = compiled(kind)(*arguments)
  assert np.isfinite(losses).all()
  for path, g in trees.by_path(grads).items():
    assert np.isfinite(g).all(), path
    assert (np.abs(g).reshape(LANES, -1).max(axis=1) > 0).all(), path
  sizes = [
    trees.num_bytes({k: x for k, x in p["layers"].items() if "proj" in k})
    for p in (arguments[1], pieces("")[-1][1])
  ]
  # int8: a byte, and a scale a channel of 12 to 40 weights; nf4: half a byte,
  # and here, where kernels are lower than a block, a scale a channel too.
  assert sizes[0] < {"int8": 0.35, "nf4": 0.2}[kind] * sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_sharded_is_one_device(kind):
  _, adapter, (trainables, params, tokens) = pieces(kind)
  mesh = sharding.make_mesh({"clients": 2, "fsdp": 2, "tensor": 2})
  model = quantization.quantized(models.decoder(CONFIG), kind, mesh)
  places = sharding.shardings(mesh, model.axes, model.shapes)
  lanes = jax.NamedSharding(mesh, jax.P("clients"))
  with jax.set_mesh(mesh):
    params = jax.device_put(params, places)
    one = params["layers"]["q_proj"]
    stored = one.values if kind == "int8" else one.codes
    rows = 16 if kind == "int8" else 8
    assert stored.addressable_shards[0].data.shape == (3, rows // 2, 12)
    run = jax.jit(
      functools.partial(gradients, adapter), compiler_options=FAST_COMPILE
    )
    losses, grads = run(
      jax.device_put(trainables, lanes), params, jax.device_put(tokens, lanes)
    )
  want_losses, want = compiled(kind)(*pieces(kind)[-1])
  np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
  for path, x in trees.by_path(want).items():
    got = trees.by_path(grads)[path]
    np.testing.assert_allclose(got, x, rtol=0, atol=1e-5 * np.abs(x).max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loaded_is_quantised_tensor_by_tensor(kind, tmp_path, monkeypatch):
  model = models.decoder(CONFIG)
  params = model.init(jax.random.key(0))
  huggingface.save(tmp_path, model, params)
  held = []
  plain = quantization.KINDS[kind]

  def watch(kernel):
    held.append(kernel.shape)
    return plain(kernel)

  monkeypatch.setitem(quantization.KINDS, kind, watch)
  loaded, got = huggingface.load(tmp_path, quantize=kind)
  assert {len(shape) for shape in held} == {3}  # A parameter at a time.
  want = quantization.quantized(model, kind).shapes
  assert jax.tree.structure(got) == jax.tree.structure(want)
  assert loaded.shapes == want
  for path, x in trees.by_path(got, layers.is_kernel).items():
    original = trees.by_path(params)[path]
    if path in model.kernels:
      want = layers.array(plain(original))
      np.testing.assert_allclose(layers.array(x), want, rtol=1e-6, atol=1e-8)
    else:
      np.testing.assert_array_equal(x, original)
  # Mesh: where a load puts its shards, tables and all.
  mesh = sharding.make_mesh({"clients": 2, "fsdp": 2, "tensor": 2})
  _, placed = huggingface.load(tmp_path, mesh=mesh, quantize=kind)
  jax.tree.map(np.testing.assert_array_equal, placed, got)
  kernel = placed["layers"]["gate_proj"]
  shard = jax.tree.leaves(kernel)[0].addressable_shards[0].data
  assert shard.size * 4 == jax.tree.leaves(kernel)[0].size


def test_scales_that_a_mesh_does_not_divide_are_replicated():
  config = models.DecoderConfig(
    vocab_size=8, width=192, num_layers=1, num_heads=2, mlp_width=256
  )
  mesh = sharding.make_mesh({"clients": 2, "fsdp": 2, "tensor": 2})
  model = quantization.quantized(models.decoder(config), "nf4", mesh)
  axes = model.axes["layers"]
  assert axes["q_proj"].codes == ("layers", "embed", "heads")
  assert axes["q_proj"].scale == ("layers", None, "heads")  # 3 blocks of 64.
  assert axes["down_proj"].scale == ("layers", "mlp", "embed")  # 4 blocks.
  sharding.shardings(mesh, model.axes, model.shapes)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_train_the_base_are_refused(kind):
  model = quantization.quantized(models.decoder(CONFIG), kind)
  for make in (
    adapters.full,
    adapters.last_layers,
    lambda m: adapters.subset(m, ("o_proj",)),
  ):
    with pytest.raises(errors.ConfigError, match="trains layers/.*quantised"):
      make(model)
  adapters.head(model)
  adapters.subset(model, ("norm",))


def test_what_cannot_be_quantised_is_refused():
  model = models.decoder(CONFIG)
  with pytest.raises(errors.ConfigError, match="'int3'.*int8, nf4"):
    quantization.quantized(model, "int3")
  with pytest.raises(errors.ConfigError, match="names no kernel"):
    quantization.quantized(model._replace(kernels={}), "int8")


@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_merged_is_applied_on_a_quantised_base(name):
  model = quantization.quantized(models.decoder(CONFIG), "nf4")
  options = {"rank": 2} if name != "ia3" else {}
  adapter = getattr(adapters, name)(model, **options)
  params = pieces("nf4")[-1][1]
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 32, (2, 6))

  @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  def run(params):
    trainable = adapter.init(jax.random.key(0), params)
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    merged = quantization.dequantize(adapter.merge(params, trainable))
    return (
      model.apply(params, tokens),
      adapter.apply(params, trainable, tokens),
      model.apply(merged, tokens),
    )

  base, applied, merged = run(params)
  assert np.abs(applied - base).max() > 1e-3
  np.testing.assert_allclose(merged, applied, rtol=1e-3, atol=1e-5)
