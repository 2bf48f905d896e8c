"""Attention of encoders to all that is no padding, in every kernel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import errors, models
from fedfm.models import attention, fused_attention

# These programs run once: what LLVM could save is less than what it costs.
FAST_COMPILE = {"xla_backend_optimization_level": "0"}


def draw(seq, dim=8, batch=2):
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=(batch, seq, 2, dim)) for _ in "qkv"]
  mask = np.ones((batch, seq), bool)
  mask[1, seq // 3 :] = False
  return [np.float32(x) for x in arrays], mask


def formula(query, key, value, mask):
  """Softmax over the keys of the mask, in NumPy's float64."""
  q, k, v = (np.float64(x) for x in (query, key, value))
  scores = np.einsum("bshd,bthd->bhst", q, k) / np.sqrt(q.shape[-1])
  scores = np.where(mask[:, None, None], scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum("bhst,bthd->bshd", weights, v)


def gradients(run, mask):
  """The output and its gradients, real tokens weighing differently."""

  def loss(arrays):
    out = run(*arrays, mask)
    weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
    return jnp.sum(out * weights * mask[..., None, None]), out

  step = jax.jit(jax.grad(loss, has_aux=True), compiler_options=FAST_COMPILE)

  def call(arrays):
    grads, out = step(arrays)
    return [np.asarray(out), *map(np.asarray, grads)]

  return call


@pytest.mark.parametrize("seq", [40, 1100])
def test_it_is_the_formula(seq):
  """Below and above where queries go in tiles."""
  arrays, mask = draw(seq)
  run = jax.jit(attention.full_attention, compiler_options=FAST_COMPILE)
  for own in (mask, np.ones_like(mask)):
    want = formula(*arrays, own)
    np.testing.assert_allclose(run(*arrays, own), want, rtol=0, atol=1e-5)
  np.testing.assert_allclose(run(*arrays, None), want, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_tiles_have_the_gradients_of_all_at_once():
  arrays, mask = draw(1100)
  got = gradients(attention.full_attention, mask)(arrays)
  plain = lambda q, k, v, m: attention.attention(q, k, v, m[:, None])  # noqa: E731
  for g, w in zip(got, gradients(plain, mask)(arrays)):
    np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * np.abs(w).max())


@pytest.mark.slow
@pytest.mark.parametrize("seq", [130, 256])
def test_splash_matches_the_formula(seq):
  """The TPU kernel's own Python, on whole tiles and on a part of one."""
  arrays, mask = draw(seq)
  scale = arrays[0].shape[-1] ** -0.5
  splash = functools.partial(
    fused_attention.splash_full, scale=scale, interpret=True
  )
  got = gradients(splash, mask)(arrays)
  np.testing.assert_allclose(got[0], formula(*arrays, mask), rtol=0, atol=1e-5)
  for g, w in zip(got, gradients(attention.full_attention, mask)(arrays)):
    np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * np.abs(w).max())
  nothing = jnp.zeros_like(mask)
  assert np.isfinite(jax.jit(splash)(*arrays, nothing)).all()


def test_cudnn_is_asked_for_the_formula(monkeypatch):
  """With JAX's own attention, which takes the same arguments, in its place."""
  real = jax.nn.dot_product_attention

  def stand_in(*arrays, implementation, **options):
    assert implementation == "cudnn"
    return real(*arrays, implementation="xla", **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  arrays, mask = draw(12)
  for own in (mask, None):
    got = fused_attention.cudnn_full(*arrays, own, scale=8**-0.5)
    want = formula(*arrays, np.ones_like(mask) if own is None else own)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_the_kernel_is_chosen_by_the_backend(monkeypatch):
  called = []
  for name in ("cudnn_full", "splash_full"):
    monkeypatch.setattr(
      fused_attention, name, lambda *a, name=name, **kw: called.append(name)
    )
  (q, k, v), mask = draw(130)
  half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  attention.full_attention(q, k, v, mask)
  assert not called
  monkeypatch.setattr(attention, "_platform", lambda: "gpu")
  attention.full_attention(q, k, v, mask)  # cuDNN has no float32.
  attention.full_attention(*half, mask)
  monkeypatch.setattr(attention, "_platform", lambda: "tpu")
  attention.full_attention(q, k, v, mask)
  attention.full_attention(*draw(17)[0])  # Less than a tile.
  assert called == ["cudnn_full", "splash_full"]
  with pytest.raises(errors.ConfigError, match="'cudnn' cannot do float32"):
    attention.full_attention(q, k, v, mask, kernel="cudnn")


SIZES = {"width": 16, "num_layers": 1, "num_heads": 2, "mlp_width": 16}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "vit", "clip"])
def test_models_give_the_same_with_a_fused_kernel(kind, monkeypatch):
  """An encoder on padded texts, ViT on 17 places, CLIP's two towers."""
  splash = functools.partial(fused_attention.splash_full, interpret=True)
  causal = functools.partial(fused_attention.splash, interpret=True)
  monkeypatch.setattr(fused_attention, "splash_full", splash)
  monkeypatch.setattr(fused_attention, "splash", causal)
  rng = np.random.default_rng(0)
  tokens = rng.integers(2, 12, (2, 128))
  tokens[:, 99] = 12
  mask = np.arange(128) < np.array([[128], [100]])
  images = rng.normal(size=(2, 16, 16, 1)).astype(np.float32)
  pixels = {"image_size": 16, "patch_size": 4, "num_channels": 1}
  tower = models.StackConfig(**SIZES)
  config, args, options = {
    "encoder": (
      models.EncoderConfig(vocab_size=13, max_length=128, **SIZES),
      (tokens,),
      {"mask": mask, "output": "mean"},
    ),
    "vit": (
      models.VisionConfig(num_classes=3, **SIZES, **pixels),
      (images,),
      {},
    ),
    "clip": (
      models.CLIPConfig(
        text=tower, image=tower, projection_width=8, vocab_size=13,
        eos_id=12, max_length=128, **pixels,
      ),
      (tokens, images),
      {"mask": mask},
    ),
  }[kind]  # fmt: skip
  outputs = []
  for kernel in ("xla", "splash"):
    model = models.build(dataclasses.replace(config, attention_kernel=kernel))
    params = model.init(jax.random.key(0))
    outputs.append(jax.jit(model.apply, static_argnames="output")(
      params, *args, **options
    ))  # fmt: skip
  scale = np.abs(outputs[0]).max()
  np.testing.assert_allclose(*outputs, rtol=0, atol=1e-5 * max(scale, 1))
