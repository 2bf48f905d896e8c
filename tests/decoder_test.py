"""The decoder against an independent NumPy one, and against itself."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import errors, sharding, trees
from fedfm.models import losses
from fedfm.models.decoder import DecoderConfig, decoder

CONFIG = DecoderConfig(
  vocab_size=16,
  width=16,
  num_layers=2,
  num_heads=8,
  num_kv_heads=4,
  head_dim=4,
  mlp_width=24,
  rope_theta=100.0,
  tie_embeddings=False,
)
TOKENS = np.random.default_rng(0).integers(0, 16, (2, 7))


def make(seed=1, **changes):
  """Returns a model and parameters large enough for every part to matter."""
  config = dataclasses.replace(CONFIG, **changes)
  model = decoder(config)
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.7, x.shape), x.dtype), model.shapes
  )
  return model, params


def reference(config, params, tokens):
  """One sequence through the decoder in float64, a token at a time."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  layers = params["layers"]
  half = config.head_dim // 2
  group = config.num_heads // config.num_kv_heads

  def norm(x, scale):
    return x / math.sqrt(np.mean(x * x) + config.norm_epsilon) * scale

  def rotate(x, position):
    out = np.empty_like(x)
    for i in range(half):
      angle = position * config.rope_theta ** (-2 * i / config.head_dim)
      pair = complex(x[i], x[i + half]) * complex(
        math.cos(angle), math.sin(angle)
      )
      out[i], out[i + half] = pair.real, pair.imag
    return out

  def heads(x, count):
    return x.reshape(count, config.head_dim)

  seen_keys = [[] for _ in range(config.num_layers)]
  seen_values = [[] for _ in range(config.num_layers)]
  all_logits = []
  for position, token in enumerate(tokens):
    x = params["embed"][token]
    for n in range(config.num_layers):
      y = norm(x, layers["attention_norm"][n])
      queries = heads(y @ layers["q_proj"][n], config.num_heads)
      keys = heads(y @ layers["k_proj"][n], config.num_kv_heads)
      seen_keys[n].append([rotate(k, position) for k in keys])
      seen_values[n].append(heads(y @ layers["v_proj"][n], config.num_kv_heads))
      outs = []
      for h, unrotated in enumerate(queries):
        query = rotate(unrotated, position)
        scores = np.array(
          [
            query @ k[h // group] / math.sqrt(config.head_dim)
            for k in seen_keys[n]
          ]
        )
        weights = np.exp(scores - scores.max())
        weights = weights / weights.sum()
        outs.append(
          sum(w * v[h // group] for w, v in zip(weights, seen_values[n]))
        )
      x = x + np.concatenate(outs) @ layers["o_proj"][n]
      y = norm(x, layers["mlp_norm"][n])
      gate = y @ layers["gate_proj"][n]
      y = gate / (1 + np.exp(-gate)) * (y @ layers["up_proj"][n])
      x = x + y @ layers["down_proj"][n]
    x = norm(x, params["final_norm"])
    head = params["embed"].T if config.tie_embeddings else params["lm_head"]
    all_logits.append(x @ head)
  return np.array(all_logits)


def loss_and_gradients(model, params, tokens):
  loss_fn = losses.language_model(lambda p, _, t: model.apply(p, t))
  ones = jnp.ones(tokens.shape)
  batch = {"tokens": tokens, "loss_mask": ones, "mask": ones[:, 0]}
  run = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, None, batch, None)[0]))
  return run(params)


@functools.cache
def default():
  """The default model, compiled once, and its logits of TOKENS."""
  model, params = make()
  apply = jax.jit(model.apply)
  return model, params, apply, np.asarray(apply(params, TOKENS))


@functools.cache
def default_gradients():
  model, params, *_ = default()
  return loss_and_gradients(model, params, TOKENS)


def assert_close(got, want):
  """Leaf by leaf, to 1e-5 of the leaf's largest element."""
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * np.abs(w).max())


@pytest.mark.parametrize("tied,kv_heads", [(True, 1), (False, 4), (True, 8)])
def test_matches_numpy_in_float32(tied, kv_heads):
  # 24-term float32 sums through 2 layers: about 1e-6 of the largest logit.
  model, params = make(tie_embeddings=tied, num_kv_heads=kv_heads)
  got = jax.jit(model.apply)(params, TOKENS)
  assert got.dtype == jnp.float32
  want = [reference(model.config, params, t) for t in TOKENS]
  assert_close(got, np.array(want))


@pytest.mark.parametrize("tied", [True, False])
def test_matches_numpy_in_float64(tied):
  with jax.enable_x64(True):
    model, params = make(
      tie_embeddings=tied, dtype="float64", param_dtype="float64"
    )
    got = jax.jit(model.apply)(params, TOKENS)
    assert got.dtype == jnp.float64
    want = [reference(model.config, params, t) for t in TOKENS]
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def test_long_sequences_match_numpy():
  # Longer than one block of queries, so that blocks meet earlier blocks.
  model, params = make(num_layers=1)
  tokens = np.random.default_rng(3).integers(0, 16, (1, 150))
  got = jax.jit(model.apply)(params, tokens)
  assert_close(got[0], reference(model.config, params, tokens[0]))


def test_a_token_does_not_see_later_ones():
  _, params, apply, want = default()
  changed = TOKENS.copy()
  changed[:, 4:] = (changed[:, 4:] + 1) % 16
  got = np.asarray(apply(params, changed))
  np.testing.assert_array_equal(got[:, :4], want[:, :4])
  assert (np.abs(got - want)[:, 4:].max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize(
  "changes",
  [
    {"scan_layers": False},
    {"remat": "full"},
    {"remat": "dots", "scan_layers": False},
  ],
  ids=str,
)
def test_execution_options_change_nothing(changes):
  model, params = make(**changes)
  assert_close(loss_and_gradients(model, params, TOKENS), default_gradients())


def test_gradient_matches_finite_differences():
  with jax.enable_x64(True):
    model, params = make(
      dtype="float64", param_dtype="float64", scan_layers=False
    )
    run = functools.partial(loss_and_gradients, model, tokens=TOKENS)
    loss_fn = losses.language_model(lambda p, _, t: model.apply(p, t))
    ones = jnp.ones(TOKENS.shape)
    batch = {"tokens": TOKENS, "loss_mask": ones, "mask": ones[:, 0]}
    value = jax.jit(lambda p: loss_fn(p, None, batch, None)[0])
    _, gradients = run(params)
    rng = np.random.default_rng(5)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params)

    def at(h):
      return value(jax.tree.map(lambda p, d: p + h * d, params, direction))

    slope = (at(1e-6) - at(-1e-6)) / 2e-6
    along = sum(
      np.vdot(g, d)
      for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction))
    )
    # Central differences: rounding 1e-16 / 1e-6, so about 1e-9 of the value.
    np.testing.assert_allclose(along, slope, rtol=1e-6)
    sizes = [float(np.abs(g).max()) for g in jax.tree.leaves(gradients)]
    assert min(sizes) > 0, dict(zip(trees.paths(gradients), sizes))


def test_segments_are_isolated():
  _, params, apply, alone = default()
  packed = apply(
    params,
    np.concatenate([TOKENS[:1, :3], TOKENS[1:, :4]], axis=1),
    segment_ids=np.array([[1, 1, 1, 2, 2, 2, 2]]),
    positions=np.array([[0, 1, 2, 0, 1, 2, 3]]),
  )
  assert_close(packed[0], np.concatenate([alone[0, :3], alone[1, :4]]))


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("prefill", [0, 3])
def test_cached_decoding_matches_full_forward(prefill, scan_layers):
  model, params = make(scan_layers=scan_layers)
  run = jax.jit(lambda tokens, cache: model.apply(params, tokens, cache=cache))
  cache = model.init_cache(2, 9)
  parts, start = [], 0
  for size in [prefill] * (prefill > 0) + [1] * (7 - prefill):
    logits, cache = run(TOKENS[:, start : start + size], cache)
    parts.append(logits)
    start += size
  assert int(cache["index"]) == 7
  assert_close(np.concatenate(parts, axis=1), default()[-1])


def test_hidden_output_and_unembed_make_the_logits():
  model, params, _, want = default()
  hidden = jax.jit(functools.partial(model.apply, output="hidden"))
  hidden = hidden(params, TOKENS)
  assert hidden.shape == (2, 7, 16)
  assert_close(model.unembed(params, hidden), want)


def test_bfloat16_is_near_float32():
  *_, want = default()
  model, params = make(dtype="bfloat16", param_dtype="bfloat16")
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
  got = np.asarray(jax.jit(model.apply)(params, TOKENS))
  assert got.dtype == np.float32
  # bfloat16 has 8 bits: 0.4% a rounding, and some dozen of them in a row.
  assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


@functools.cache
def wide_init():
  config = dataclasses.replace(CONFIG, width=64)
  return jax.jit(decoder(config).init)


def test_init_is_a_function_of_the_key():
  init = wide_init()
  first, again, other = (init(jax.random.key(i)) for i in (0, 0, 1))
  for a, b, c in zip(*map(jax.tree.leaves, (first, again, other))):
    np.testing.assert_array_equal(a, b)
    if a.ndim == 3:
      assert not np.array_equal(a, c)
      assert not np.array_equal(a[0], a[1])
  # 2 x 64 x 32 draws: the deviation of a standard deviation is about 1.1%.
  np.testing.assert_allclose(np.std(first["layers"]["q_proj"]), 0.02, rtol=0.05)
  np.testing.assert_array_equal(first["final_norm"], 1.0)


@pytest.mark.parametrize("tied", [True, False])
def test_axes_and_shapes_match_the_parameters(tied):
  model, _ = make(tie_embeddings=tied)
  params = jax.eval_shape(model.init, jax.random.key(0))
  axes = jax.tree.map(len, model.axes, is_leaf=sharding.is_axes)
  assert axes == jax.tree.map(lambda x: x.ndim, params)
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), model.shapes)
  assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), params)


MESHES = [
  (8 // (f * t), f, t) for f in (1, 2, 4, 8) for t in (1, 2, 4, 8) if f * t <= 8
]
EIGHT = np.random.default_rng(2).integers(0, 16, (8, 6))


def place(shape, model, params):
  """Shards parameters and EIGHT over a mesh of this shape."""
  mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, shape)))
  places = sharding.shardings(mesh, model.axes, model.shapes)
  tokens = jax.device_put(EIGHT, jax.NamedSharding(mesh, jax.P("fsdp")))
  return mesh, jax.device_put(params, places), tokens


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_sharded_logits_equal_one_device(shape):
  model, params, apply, _ = default()
  want = apply(params, EIGHT)
  mesh, params, tokens = place(shape, model, params)
  kernel = params["layers"]["q_proj"]
  assert kernel.addressable_shards[0].data.size * 8 == kernel.size * shape[0]
  with jax.set_mesh(mesh):
    assert_close(jax.jit(model.apply)(params, tokens), want)


@pytest.mark.slow
def test_sharded_gradients_equal_one_device():
  model, params = make(scan_layers=False)
  want = loss_and_gradients(model, params, EIGHT)
  mesh, params, tokens = place((2, 2, 2), model, params)
  with jax.set_mesh(mesh):
    assert_close(loss_and_gradients(model, params, tokens), want)


@pytest.mark.parametrize(
  "changes,words",
  [
    ({"num_heads": 3}, "num_heads"),
    ({"num_kv_heads": 3}, "num_kv_heads"),
    ({"head_dim": 3}, "head_dim"),
    ({"num_layers": 0}, "num_layers"),
    ({"remat": "ful"}, "did you mean 'full'"),
  ],
)
def test_bad_configs_are_refused(changes, words):
  fields = {
    "vocab_size": 16,
    "width": 16,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_width": 8,
  }
  with pytest.raises(errors.ConfigError, match=words) as e:
    DecoderConfig(**(fields | changes))
  assert "\n" not in str(e.value)
