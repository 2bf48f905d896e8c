"""Adapted kernels against their papers' formulas in NumPy and float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import adapters, models
from fedfm.adapters.bottleneck import BottleneckKernel
from fedfm.adapters.dora import DoRAKernel
from fedfm.adapters.ia3 import ScaledKernel
from fedfm.adapters.lora import LoRAKernel
from fedfm.models import generation, layers
from fedfm.models.decoder import embed_tokens

FAST_COMPILE = {"xla_backend_optimization_level": "0"}
IN, OUT, RANK = 7, 5, 2
rng = np.random.default_rng(0)
X, W, BIAS, A, B, M = (
  rng.normal(size=shape)
  for shape in ((3, IN), (IN, OUT), OUT, (IN, RANK), (RANK, OUT), OUT)
)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def dense(kernel, bias=BIAS):
  return layers.dense(jnp.asarray(X), kernel, bias)


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def arrays(*values):
  return [jnp.asarray(v) for v in values]


def test_lora():
  kernel = LoRAKernel(*arrays(W, A, B), scale=0.5)
  close(dense(kernel), X @ (W + 0.5 * A @ B) + BIAS)
  close(layers.array(kernel), W + 0.5 * A @ B)


def test_rslora_scales_by_the_root_of_the_rank():
  model = models.decoder(SIZES)
  plain = adapters.lora(model, rank=4, alpha=6)
  rooted = adapters.lora(model, rank=4, alpha=6, use_rslora=True)
  assert (plain.config["scale"], rooted.config["scale"]) == (1.5, 3.0)


def dora_in_numpy(a, b, m, norm=None):
  moved = W + 0.5 * a @ b
  norm = np.linalg.norm(moved, axis=0) if norm is None else norm
  return X @ (moved * (m / norm)) + BIAS


def test_dora_and_its_gradient_with_the_norm_held():
  make = functools.partial(DoRAKernel, jnp.asarray(W), scale=0.5)
  close(dense(make(*arrays(A, B, M))), dora_in_numpy(A, B, M))
  moved = W + 0.5 * A @ B
  norm = np.linalg.norm(moved, axis=0)
  close(layers.array(make(*arrays(A, B, M))), moved * (M / norm))

  def loss(a, b, m):
    return jnp.sum(jnp.sin(dense(make(a, b, m))))

  grads = jax.grad(loss, argnums=(0, 1, 2))(*arrays(A, B, M))
  outer = np.cos(dora_in_numpy(A, B, M))  # dL/dy
  d_moved = X.T @ outer * (M / norm)  # The norm is a constant.
  close(grads[0], 0.5 * d_moved @ B.T)
  close(grads[1], 0.5 * A.T @ d_moved)
  close(grads[2], np.sum(outer * (X @ moved) / norm, axis=0))


def test_dora_of_a_channel_of_zeros():
  kernel = DoRAKernel(*arrays(0 * W, A, 0 * B, 0 * M), scale=0.5)
  close(dense(kernel, None), np.zeros((3, OUT)))
  close(layers.array(kernel), np.zeros((IN, OUT)))


def test_ia3_scales_outputs_with_their_bias_or_inputs():
  outputs = ScaledKernel(*arrays(W, M), on_inputs=False)
  close(dense(outputs), (X @ W + BIAS) * M)
  close(layers.array(outputs), W * M)
  factor = A[:, 0]
  inputs = ScaledKernel(*arrays(W, factor), on_inputs=True)
  close(dense(inputs), (X * factor) @ W + BIAS)
  close(layers.array(inputs), W * factor[:, None])


def test_bottleneck_acts_on_the_output_with_its_bias():
  down, up = rng.normal(size=(OUT, 2)), rng.normal(size=(2, OUT))
  d, u = rng.normal(size=2), rng.normal(size=OUT)
  kernel = BottleneckKernel(*arrays(W, down, d, up, u), activation="relu")
  y = X @ W + BIAS
  close(dense(kernel), y + np.maximum(y @ down + d, 0) @ up + u)


SIZES = models.DecoderConfig(
    vocab_size=11, width=8, num_layers=2, num_heads=4, num_kv_heads=2,
    mlp_width=12, dtype="float64", param_dtype="float64",
)  # fmt: skip
PREFIX = np.asarray([[3, 8, 1]])
TEXT = np.asarray([[5, 2, 9, 0, 4], [7, 7, 1, 6, 10]])


@functools.cache
def decoder():
  model = models.decoder(SIZES)
  draws = np.random.default_rng(5)
  return model, jax.tree.map(
    lambda x: jnp.asarray(0.8 * draws.normal(size=x.shape)), model.shapes
  )


def virtual(kind):
  """An adapter that stands for the tokens of PREFIX, and its trainable."""
  model, params = decoder()
  adapter = getattr(adapters, kind)(model, num_tokens=3)
  if kind == "prompt_tuning":
    return adapter, {"prompt": embed_tokens(SIZES, params, PREFIX[0])}
  cache = model.init_cache(1, 3)
  _, cache = model.apply(params, PREFIX, cache=cache)
  return adapter, {k: cache[k][:, 0] for k in ("key", "value")}


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_that_are_real_are_the_text_with_them(kind):
  model, params = decoder()
  adapter, trainable = virtual(kind)
  whole = np.concatenate([np.repeat(PREFIX, 2, axis=0), TEXT], axis=1)
  run = functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  want = run(model.apply)(params, whole)[:, 3:]
  close(run(adapter.apply)(params, trainable, TEXT), want)
  # Every segment of a packed row sees them.
  segments = np.asarray([[1, 1, 2, 2, 2]] * 2)
  positions = np.asarray([[0, 1, 0, 1, 2]] * 2)
  packed = run(adapter.apply)(
    params, trainable, TEXT, segment_ids=segments, positions=positions
  )
  second = np.concatenate([np.repeat(PREFIX, 2, axis=0), TEXT[:, 2:]], axis=1)
  close(packed[:, 2:], run(model.apply)(params, second)[:, 3:])


@pytest.mark.slow
def test_virtual_tokens_come_before_what_is_generated():
  model, params = decoder()
  adapter, trainable = virtual("prompt_tuning")
  options = {"max_new_tokens": 4}
  got = generation.generate(
    adapter.apply, model.init_cache, (params, trainable), TEXT[:1], **options
  )
  whole = np.concatenate([PREFIX, TEXT[:1]], axis=1)
  want = generation.generate(
    model.apply, model.init_cache, (params,), whole, **options
  )
  np.testing.assert_array_equal(got.tokens, want.tokens)
  plain = generation.generate(
    model.apply, model.init_cache, (params,), TEXT[:1], **options
  )
  assert not np.array_equal(plain.tokens, want.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [True, False])
def test_dropout_zeroes_inputs_of_a_in_training_only(scan_layers):
  config = dataclasses.replace(SIZES, scan_layers=scan_layers)
  model, params = models.decoder(config), decoder()[1]
  adapter = adapters.lora(model, rank=2, dropout=0.5)
  draws = np.random.default_rng(2)
  trainable = jax.tree.map(
    lambda x: jnp.asarray(draws.normal(size=x.shape)),
    jax.eval_shape(adapter.init, jax.random.key(0), model.shapes),
  )
  batch = {
    "tokens": jnp.asarray(TEXT),
    "loss_mask": jnp.ones(TEXT.shape),
    "mask": jnp.ones(2),
  }
  make_loss = models.losses.language_model
  train = adapters.train_loss(adapter, make_loss)
  evaluate = make_loss(adapters.loss_apply(adapter))

  @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  def run(trainable):
    trained = [
      train(trainable, params, batch, jax.random.key(i))[0] for i in (0, 0, 1)
    ]
    return *trained, evaluate(trainable, params, batch, jax.random.key(0))[0]

  one, same, other, without = run(trainable)
  assert one == same
  assert len({float(one), float(other), float(without)}) == 3
  plain = adapters.lora(model, rank=2)
  want = make_loss(adapters.loss_apply(plain))(trainable, params, batch, None)
  close(without, want[0])


def test_dropout_is_unbiased():
  kernel = LoRAKernel(
    *arrays(0 * W, np.eye(IN), np.eye(IN)[:, :OUT]), scale=1.0
  )
  key_data = jax.random.key_data(jax.random.split(jax.random.key(0), 2000))
  ones = jnp.ones((1, IN))

  def one(key_data):
    return dataclasses.replace(kernel, dropout=0.25, key_data=key_data).dense(
      ones
    )

  out = np.asarray(jax.vmap(one)(key_data))
  assert set(np.unique(np.round(out, 9))) == {0, np.round(1 / 0.75, 9)}
  # A standard error is 0.0129; this is 5 of them, over 5 outputs.
  np.testing.assert_allclose(out.mean(axis=(0, 1)), 1, atol=0.065)
