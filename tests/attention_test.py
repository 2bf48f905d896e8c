"""Attention, in blocks and in tiles, against the plain formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import errors, sharding
from fedfm.models import attention, fused_attention
from fedfm.models.decoder import DecoderConfig, decoder
from fedfm.models.flash_attention import (
  flash_attention,
  flash_attention_to_cache,
)

BLOCK = 16
SCALE = 0.3
SEQ = 40  # Not a whole number of blocks.


def draw(seq=SEQ, prefix=0, dtype=np.float64, heads=4, kv_heads=2, dim=8):
  """Queries, keys, values, and what the output is multiplied by."""
  rng = np.random.default_rng(0)
  shapes = [(seq, heads), (prefix + seq, kv_heads), (prefix + seq, kv_heads)]
  arrays = [rng.normal(size=(2, *shape, dim)) for shape in [*shapes, shapes[0]]]
  return [np.asarray(x, dtype) for x in arrays]


def segments(seq=SEQ):
  rng = np.random.default_rng(1)
  return np.sort(rng.integers(0, 3, (2, seq)), axis=1)


def plain(q, k, v, own=None, window=None, softcap=None):
  """The formula, with one score for every pair."""
  seq, prefix = q.shape[1], k.shape[1] - q.shape[1]
  group = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
  scores = SCALE * jnp.einsum("bqhd,bkhd->bhqk", q, k)
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  behind = np.arange(seq)[:, None] - np.arange(-prefix, seq)
  window = seq + prefix + 1 if window is None else window
  mask = ((behind >= 0) & (behind < window))[None]
  if own is not None:
    same = own[:, :, None] == jnp.pad(own, ((0, 0), (prefix, 0)))[:, None]
    mask = mask & (same | (np.arange(-prefix, seq) < 0))
  scores = jnp.where(mask[:, None], scores, -jnp.inf)
  return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)


formula = jax.jit(plain, static_argnames=("window", "softcap"))


def output_and_gradients(run):
  """Returns a jitted `f(q, k, v, weight, *more)`, `run` without the weight."""

  def loss(q, k, v, weight, *more):
    out = run(q, k, v, *more)
    return jnp.vdot(weight, out), out

  grad = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)

  def both(*arguments):
    (_, out), gradients = grad(*arguments)
    return [out, *gradients]

  return jax.jit(both)


WHOLE = 1000  # A window that is none.


@pytest.mark.parametrize(
  "prefix,softcap,windows",
  [(0, None, (WHOLE, 18)), (5, 3.0, (7,))],
  ids=["plain", "prefix and soft cap"],
)
def test_blocks_and_tiles_match_the_formula(prefix, softcap, windows):
  with jax.enable_x64(True):
    arrays = draw(prefix=prefix)
    reference, tiles = (
      output_and_gradients(
        lambda q, k, v, own, window, run=run: run(
          q, k, v, own, window=window, softcap=softcap
        )
      )
      for run in (
        plain,
        functools.partial(flash_attention, scale=SCALE, block=BLOCK),
      )
    )
    for window in windows:
      unrolled = output_and_gradients(
        functools.partial(
          attention._unrolled,
          window=None if window == WHOLE else window,
          scale=SCALE,
          softcap=softcap,
          block=BLOCK,
        )
      )
      for own in (np.zeros((2, SEQ), int), segments()):
        want = reference(*arrays, own, np.int32(window))
        for got in (
          tiles(*arrays, own, np.int32(window)),
          unrolled(*arrays, own),
        ):
          for g, w in zip(got, want):
            np.testing.assert_allclose(g, w, rtol=0, atol=1e-12)


def test_a_window_known_at_run_time_only():
  """One layer of a scan over several kinds of layers."""
  q, k, v, _ = draw(dtype=np.float32)
  attend = functools.partial(attention.causal_attention, scale=SCALE, window=9)
  run = jax.jit(lambda is_local: attend(q, k, v, is_local=is_local))
  for is_local, window in ((True, 9), (False, None)):
    want = formula(q, k, v, window=window)
    np.testing.assert_allclose(run(is_local), want, rtol=0, atol=1e-5)


def test_tiles_in_bfloat16_are_near_the_formula():
  q, k, v, _ = draw()
  want = formula(q, k, v)
  low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  got = jax.jit(functools.partial(flash_attention, scale=SCALE, block=BLOCK))(
    *low
  )
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    got.astype(np.float32), want, rtol=0, atol=0.03 * np.abs(want).max()
  )


def test_tiles_under_vmap_with_a_shared_argument():
  q, k, v, _ = draw(seq=32, dtype=np.float32)
  run = functools.partial(flash_attention, scale=SCALE, block=BLOCK)

  def grad(run):
    return jax.grad(lambda q, k: jnp.sum(run(q, k, v) ** 2), (0, 1))

  many = np.stack([q, 2 * q])
  got = jax.jit(jax.vmap(grad(run), in_axes=(0, None)))(many, k)
  alone = jax.jit(grad(plain))
  for i, one in enumerate(many):
    for g, w in zip(got, alone(one, k)):
      np.testing.assert_allclose(g[i], w, rtol=0, atol=1e-5 * np.abs(w).max())


@pytest.mark.parametrize("window", [None, 9])
def test_tiles_against_a_cache(window):
  q, k, v, _ = draw(dtype=np.float32)
  want = formula(q, k, v, window=window)
  after = [np.pad(x, ((0, 0), (0, 26), (0, 0), (0, 0))) for x in (k, v)]
  run = jax.jit(
    functools.partial(
      flash_attention_to_cache, window=window, scale=SCALE, block=BLOCK
    )
  )
  got = run(q[:, 10:], *after, jnp.int32(10))
  np.testing.assert_allclose(got, want[:, 10:], rtol=0, atol=1e-5)


def largest(jaxpr):
  """The size of the largest array anywhere in a program."""
  sizes = [0]
  for equation in jaxpr.eqns:
    sizes += [v.aval.size for v in equation.outvars if hasattr(v.aval, "size")]
    for value in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(value, "jaxpr", value)
      if isinstance(inner, jax.extend.core.Jaxpr):
        sizes.append(largest(inner))
  return max(sizes)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_long_sequences_make_no_square(scan_layers):
  """Neither in training nor when a prompt fills a cache."""
  seq = 4096
  config = DecoderConfig(
    vocab_size=8,
    width=8,
    num_layers=2,
    num_heads=1,
    mlp_width=8,
    max_length=seq,
    sliding_window=600,
    sliding_layers=(True, False),
    scan_layers=scan_layers,
  )
  model = decoder(config)
  tokens = jax.ShapeDtypeStruct((1, seq), jnp.int32)
  loss = jax.grad(lambda p, t: jnp.sum(model.apply(p, t)))
  program = jax.make_jaxpr(loss)(model.shapes, tokens)
  assert seq * 8 <= largest(program.jaxpr) < seq * seq / 32
  cache = jax.eval_shape(lambda: model.init_cache(1, seq))
  apply = functools.partial(model.apply, output="hidden")
  program = jax.make_jaxpr(lambda p, t, c: apply(p, t, cache=c))(
    model.shapes, tokens, cache
  )
  assert seq * 8 <= largest(program.jaxpr) < seq * seq / 32


def test_the_counter_of_sizes_sees_a_square():
  q, k, v, _ = draw(seq=64, dtype=np.float32)
  program = jax.make_jaxpr(
    jax.jit(lambda *x: jax.lax.map(lambda i: plain(*x), jnp.arange(2)))
  )(q, k, v)
  assert largest(program.jaxpr) >= 2 * 4 * 64 * 64


@pytest.mark.slow
@pytest.mark.parametrize(
  "window,softcap,segmented", [(None, None, False), (100, 3.0, True)]
)
def test_splash_matches_the_formula(window, softcap, segmented):
  """The TPU kernel's own Python, run as it is."""
  own = segments(256) if segmented else None
  arrays = draw(seq=256, dtype=np.float32)
  run = functools.partial(
    fused_attention.splash,
    segment_ids=own,
    window=window,
    scale=SCALE,
    softcap=softcap,
    interpret=True,
  )
  reference = functools.partial(plain, own=own, window=window, softcap=softcap)
  want = output_and_gradients(reference)(*arrays)
  for g, w in zip(output_and_gradients(run)(*arrays), want):
    np.testing.assert_allclose(g, w, rtol=0, atol=1e-4 * np.abs(w).max())


def array(dtype=jnp.bfloat16, seq=256, heads=4, dim=64):
  return jax.ShapeDtypeStruct((2, seq, heads, dim), dtype)


@pytest.mark.parametrize(
  "kernel,query,key,own,softcap,words",
  [
    ("cudnn", array(jnp.float32), array(), None, None, "float32"),
    ("cudnn", array(), array(), np.ones((2, 256)), None, "segment ids"),
    ("cudnn", array(), array(), None, 3.0, "soft caps"),
    ("cudnn", array(dim=256), array(dim=256), None, None, "heads of 256"),
    ("cudnn", array(), array(seq=260), None, None, "prefix"),
    ("splash", array(), array(seq=260), None, None, "prefix"),
    ("splash", array(seq=200), array(seq=200), None, None, "multiples of 128"),
  ],
)
def test_a_kernel_that_cannot_is_refused_or_left(
  kernel, query, key, own, softcap, words, monkeypatch
):
  with pytest.raises(errors.ConfigError, match=words) as e:
    attention._choose(kernel, query, key, own, softcap)
  assert "model.attention_kernel" in str(e.value) and "\n" not in str(e.value)
  backend = {"cudnn": "gpu", "splash": "tpu"}[kernel]
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  choose = functools.partial(attention._choose, "auto")
  assert choose(query, key, own, softcap) == "xla"
  assert choose(array(), array(), None, None) == kernel


def test_auto_looks_at_the_machine_that_is_compiled_for(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  choose = functools.partial(attention._choose, "auto")
  mesh = sharding.make_mesh({"clients": 8})
  with jax.set_mesh(mesh):
    assert choose(array(), array(), None, None) == "xla"
  assert choose(array(), array(), None, None) == "splash"


def test_cudnn_is_asked_for_the_formula(monkeypatch):
  """With JAX's own attention, which takes the same arguments, in its place."""
  real = jax.nn.dot_product_attention

  def stand_in(*arrays, implementation, **options):
    assert implementation == "cudnn"
    return real(*arrays, implementation="xla", **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  q, k, v, _ = draw(dtype=np.float32)
  for window in (None, 9):
    run = functools.partial(fused_attention.cudnn, window=window, scale=SCALE)
    got = jax.jit(run)(q, k, v)
    want = formula(q, k, v, window=window)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
