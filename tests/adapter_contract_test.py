"""What holds for every adapter, by name."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import adapters, errors, models, sharding, trees
from fedfm.settings import checks

# These programs run once: what LLVM could save is less than what it costs.
FAST_COMPILE = {"xla_backend_optimization_level": "0"}
CONFIG = models.DecoderConfig(
    vocab_size=14, width=8, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=4, mlp_width=12, dtype="float64", param_dtype="float64",
    qkv_bias=True, output_bias=True, mlp_bias=True,
)  # fmt: skip
# What chunks of the loss may get wrong: the gradient of what they apply.
# Parameters that are trained whole keep their float32 when they are merged.
WHOLE = ("full", "head", "subset", "bitfit", "last_layers")
REACH_THE_HEAD = ("full", "head", "last_layers", "subset")
LANES = 2
CHUNK = 4  # Tokens: two positions of each row.
FLOAT32 = jnp.dtype("float32")
rng = np.random.default_rng(0)
TOKENS = jnp.asarray(rng.integers(0, 14, (LANES, 2, 6)), jnp.int32)


class Case(NamedTuple):
  """One adapter.

  Attributes:
    options: What its factory is given.
    starts_as_base: Whether its initial trainable changes nothing.
    merges: Whether it is a change of weights.
  """

  options: dict[str, Any]
  starts_as_base: bool = True
  merges: bool = True


CASES = {
  "bitfit": Case({}),
  "dora": Case({"rank": 2, "targets": ("q_proj", "o_proj")}),
  "full": Case({}),
  "head": Case({}),
  "houlsby": Case({"size": 3}, merges=False),
  "ia3": Case({}),
  "last_layers": Case({"num_layers": 1}),
  "lora": Case({"rank": 2, "targets": ("all-linear",)}),
  "pfeiffer": Case({"size": 3}, merges=False),
  "prefix_tuning": Case({"num_tokens": 3}, False, False),
  "prompt_tuning": Case({"num_tokens": 3}, False, False),
  "subset": Case({"names": ("norm", "o_proj")}),
}
NAMES = sorted(CASES)
# What costs a compilation is tried of a few kinds only, by default.
_FEW = ("lora", "prompt_tuning")
SOME = [
  name if name in _FEW else pytest.param(name, marks=pytest.mark.slow)
  for name in NAMES
]


def make(name, config=CONFIG):
  model = models.decoder(config)
  return model, getattr(adapters, name)(model, **CASES[name].options)


def noise(shapes, scale, lead=()):
  """Normal numbers of these shapes, float64; no program is compiled."""
  leaves, treedef = jax.tree.flatten(shapes)
  draws = np.random.default_rng(3)
  return treedef.unflatten(
    [scale * draws.normal(size=(*lead, *x.shape)) for x in leaves]
  )


def loss_of(adapter, trainable, base, tokens, **options):
  """The loss of one client."""
  loss = models.losses.language_model(adapters.loss_apply(adapter), **options)
  batch = {
    "tokens": tokens,
    "loss_mask": jnp.ones(tokens.shape),
    "mask": jnp.ones(tokens.shape[0]),
  }
  return loss(trainable, base, batch, None)[0]


def gradients(adapter, trainables, params, tokens):
  """Losses [lanes] and gradients [lanes, ...], lanes over axis `clients`."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.vmap(
    jax.value_and_grad(functools.partial(loss_of, adapter)),
    in_axes=(0, None, 0),
    spmd_axis_name=None if mesh.empty else "clients",
  )(trainables, params, tokens)


class Ran(NamedTuple):
  """An adapter, what it was given, and what came out.

  Attributes:
    params: The base.
    trainables: [lanes, ...], each as if it had been trained.
    out: What the program returned.
  """

  model: models.Model
  adapter: adapters.Adapter
  params: Any
  trainables: Any
  out: Any


@functools.cache
def ran(name):
  """Everything that needs a program, in one program an adapter, in float64."""
  model, adapter = make(name)
  _, unrolled = make(name, dataclasses.replace(CONFIG, scan_layers=False))
  _, half_adapter = make(name, dataclasses.replace(CONFIG, dtype="bfloat16"))

  @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  def run(params, noise):
    tokens = TOKENS[0]
    trainable = adapter.init(jax.random.key(1), params)
    trainables = trees.add(trainable, noise)
    one = jax.tree.map(lambda x: x[0], trainables)
    half = trees.cast(params, jnp.bfloat16)
    out = {
      "base": model.apply(params, tokens),
      "start": adapter.apply(params, trainable, tokens),
      "trained": adapter.apply(params, one, tokens),
      "unrolled": unrolled.apply(params, one, tokens),
      "half": half_adapter.apply(half, one, tokens),
      "lanes": gradients(adapter, trainables, params, TOKENS),
    }
    chunked = functools.partial(
      loss_of,
      adapter,
      unembed=adapters.loss_unembed(adapter, model),
      chunk=CHUNK,
    )
    if name in REACH_THE_HEAD:
      chunked = jax.value_and_grad(chunked)
    out["chunked"] = chunked(one, params, tokens)
    if CASES[name].merges:
      out["merged"] = model.apply(adapter.merge(params, one), tokens)
    return trainables, out

  with jax.enable_x64(True):
    key = jax.random.key(1)
    params = noise(model.shapes, 0.1)
    like = jax.eval_shape(adapter.init, key, model.shapes)
    trainables, out = run(params, noise(like, 0.1, (LANES,)))
    out = jax.device_get(out)
    params = jax.tree.map(jnp.asarray, params)
  return Ran(model, adapter, params, trainables, out)


def close(got, want):
  """Equal to the rounding of float64, on the scale of the whole array."""
  assert got.dtype == want.dtype == jnp.float64
  error = np.abs(np.asarray(got) - want).max() / np.abs(want).max()
  assert error < 1e-10, error


def test_every_adapter_is_here_and_in_the_settings():
  others = {"Adapter", "export", "loss_apply", "loss_unembed", "peft"}
  others |= {"train_loss", "with_parameters"}
  factories = set(adapters.__all__) - others
  # Of CLIP alone; see prompts_test.
  assert {*CASES, "maple"} == factories == set(checks._CHOICES["adapter.kind"])


@pytest.mark.parametrize("name", SOME)
def test_starts_as_the_base_where_promised(name):
  r = ran(name)
  assert r.adapter.kind == name
  assert np.abs(r.out["base"]).max() > 0.1
  if CASES[name].starts_as_base:
    close(r.out["start"], r.out["base"])
  else:
    assert np.abs(r.out["start"] - r.out["base"]).max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_trainable_is_float32_whatever_the_base(name, dtype):
  config = dataclasses.replace(CONFIG, dtype=dtype, param_dtype=dtype)
  model, adapter = make(name, config)
  trainable = jax.eval_shape(adapter.init, jax.random.key(1), model.shapes)
  assert {x.dtype for x in jax.tree.leaves(trainable)} == {FLOAT32}
  if CASES[name].merges and name not in WHOLE:
    merged = jax.eval_shape(adapter.merge, model.shapes, trainable)
    assert merged == model.shapes


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_scanned_unrolled_and_unjitted_agree(name):
  r = ran(name)
  want = r.out["trained"]
  assert want.shape == (2, 6, 14)
  assert np.abs(want - r.out["base"]).max() > 1e-3
  close(r.out["unrolled"], want)
  _, unrolled = make(name, dataclasses.replace(CONFIG, scan_layers=False))
  with jax.enable_x64(True):
    one = jax.tree.map(lambda x: x[0], r.trainables)
    close(unrolled.apply(r.params, one, TOKENS[0]), want)
  # bfloat16 has 8 bits: a few percent of the largest logit.
  error = np.abs(r.out["half"] - want).max() / np.abs(want).max()
  assert 1e-4 < error < 0.05, error


@pytest.mark.parametrize("name", SOME)
def test_merged_is_applied_or_refused(name):
  r = ran(name)
  if CASES[name].merges:
    close(r.out["merged"], r.out["trained"])
    return
  with pytest.raises(errors.ConfigError, match=f"'{name}'.*cannot be merged"):
    r.adapter.merge(r.params, r.trainables)


@pytest.mark.parametrize("name", SOME)
def test_gradients_are_finite_and_reach_every_leaf(name):
  losses, grads = ran(name).out["lanes"]
  assert np.isfinite(losses).all()
  assert losses[0] != losses[1]
  for path, g in trees.by_path(grads).items():
    assert np.isfinite(g).all(), path
    assert (np.abs(g).reshape(LANES, -1).max(axis=1) > 0).all(), path


@pytest.mark.parametrize("name", SOME)
def test_chunks_of_the_loss_change_nothing(name):
  losses, grads = ran(name).out["lanes"]
  got = ran(name).out["chunked"]
  loss, got = got if name in REACH_THE_HEAD else (got, {})
  close(loss, losses[0])
  for path, x in trees.by_path(got).items():
    close(x, trees.by_path(grads)[path][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", REACH_THE_HEAD)
def test_donating_the_trainable_leaves_the_base(name):
  r = ran(name)
  with jax.enable_x64(True):
    trainable = r.adapter.init(jax.random.key(1), r.params)
  pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(r.params)}
  for x in jax.tree.leaves(trainable):
    assert x.unsafe_buffer_pointer() not in pointers


# A program of eight devices takes longest: the rest follow these.
SHARDED = ("lora", "prompt_tuning", "last_layers")


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(n, marks=[] if n in SHARDED else [pytest.mark.slow])
    for n in NAMES
  ],
)
def test_sharded_is_one_device(name):
  r = ran(name)
  mesh = sharding.make_mesh({"clients": 2, "fsdp": 2, "tensor": 2})
  places = sharding.shardings(mesh, r.model.axes, r.model.shapes)
  lanes = jax.NamedSharding(mesh, jax.P("clients"))
  rows = jax.NamedSharding(mesh, jax.P("clients", "fsdp"))
  run = jax.jit(
    functools.partial(gradients, r.adapter), compiler_options=FAST_COMPILE
  )
  with jax.enable_x64(True), jax.set_mesh(mesh):
    losses, grads = run(
      jax.device_put(r.trainables, lanes),
      jax.device_put(r.params, places),
      jax.device_put(TOKENS, rows),
    )
  want_losses, want_grads = r.out["lanes"]
  close(losses, want_losses)
  for path, want in trees.by_path(want_grads).items():
    close(trees.by_path(grads)[path], want)
