"""Adapters one by one: what they train, what they leave, and their errors.

What holds for all of them is in `adapter_contract_test`.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from fedfm import adapters, errors, models, trees
from fedfm.models.decoder import KERNELS

SIZES = {"vocab_size": 13, "width": 8, "num_layers": 2, "num_heads": 2}
# These programs run once: what LLVM could save is less than what it costs.
FAST_COMPILE = {"xla_backend_optimization_level": "0"}
TOKENS = jnp.asarray([[1, 5, 2, 7], [3, 3, 0, 12]], jnp.int32)


def make_model(**options):
  config = models.DecoderConfig(**SIZES, mlp_width=12, **options)
  model = models.decoder(config)
  # Large enough that wrong kernels show.
  params = jax.tree.map(lambda x: 8 * x, model.init(jax.random.key(0)))
  return model, params


MODEL, PARAMS = make_model()
UNTIED, UNTIED_PARAMS = make_model(tie_embeddings=False)


def noisy(trainable, seed=3):
  """A trainable that did train: every leaf is changed."""
  leaves, treedef = jax.tree.flatten(trainable)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return treedef.unflatten(
    [x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "adapter",
  [
    adapters.lora(UNTIED, rank=3, alpha=5, targets=[*KERNELS, "lm_head"]),
    adapters.head(UNTIED),
  ],
  ids=["lora", "head"],
)
def test_on_a_head_of_its_own(adapter):
  model, params = UNTIED, UNTIED_PARAMS

  @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
  def logits(params, trainable):
    return (
      model.apply(params, TOKENS),
      adapter.apply(params, trainable, TOKENS),
      model.apply(adapter.bind(params, trainable), TOKENS),
      model.apply(adapter.merge(params, trainable), TOKENS),
    )

  trainable = adapter.init(jax.random.key(1), params)
  base, *adapted = logits(params, trainable)
  assert np.abs(base).max() > 1
  for got in adapted:
    np.testing.assert_allclose(got, base, rtol=1e-6, atol=1e-6)
  base, applied, bound, merged = logits(params, noisy(trainable))
  assert np.abs(applied - base).max() > 0.1
  np.testing.assert_array_equal(bound, applied)
  np.testing.assert_allclose(merged, applied, rtol=1e-4, atol=1e-4)


def test_lora_start_and_scale():
  adapter = adapters.lora(MODEL, rank=2, alpha=6, targets=["q_proj"])
  trainable = adapter.init(jax.random.key(1), PARAMS)
  assert list(trainable) == ["layers/q_proj"]
  ab = trainable["layers/q_proj"]
  assert ab["a"].shape == (2, 8, 2)
  assert ab["b"].shape == (2, 2, 8)
  assert not ab["b"].any()
  bound = 1 / np.sqrt(8)
  assert (np.abs(ab["a"]) <= bound).all()
  assert np.abs(ab["a"]).max() > 0.7 * bound
  assert not np.array_equal(ab["a"][0], ab["a"][1])
  changed = noisy(trainable)
  merged = adapter.merge(PARAMS, changed)
  ab = changed["layers/q_proj"]
  for layer in range(2):
    expected = (
      PARAMS["layers"]["q_proj"][layer] + 3 * ab["a"][layer] @ ab["b"][layer]
    )
    np.testing.assert_allclose(
      merged["layers"]["q_proj"][layer], expected, rtol=1e-5, atol=1e-5
    )
  untouched = [p for p in trees.paths(PARAMS) if p != "layers/q_proj"]
  old = dict(zip(trees.paths(PARAMS), jax.tree.leaves(PARAMS)))
  new = dict(zip(trees.paths(merged), jax.tree.leaves(merged)))
  assert all(new[p] is old[p] for p in untouched)


def test_lora_alpha_is_twice_the_rank_by_default():
  assert adapters.lora(MODEL, rank=3).config["alpha"] == 6


def test_lora_takes_numpys_numbers():
  numpys = adapters.lora(MODEL, rank=np.int64(3), alpha=np.float32(5))
  assert json.dumps(numpys.config) == json.dumps(
    adapters.lora(MODEL, rank=3, alpha=5).config
  )


def test_lora_draws_differ_between_kernels_and_keys():
  adapter = adapters.lora(MODEL, rank=2, targets=["q_proj", "o_proj"])
  one = adapter.init(jax.random.key(1), PARAMS)
  two = adapter.init(jax.random.key(2), PARAMS)
  a = [one[k]["a"] for k in one]
  assert not np.array_equal(*a)
  assert not np.array_equal(a[0], two["layers/o_proj"]["a"])


def test_lora_gradient_is_of_the_trainable_only():
  adapter = adapters.lora(MODEL, rank=2)
  loss = models.losses.language_model(adapters.loss_apply(adapter))
  trainable = noisy(adapter.init(jax.random.key(1), PARAMS))
  batch = {
    "tokens": TOKENS,
    "loss_mask": jnp.ones(TOKENS.shape),
    "mask": jnp.ones(2),
  }

  def gradient(trainable, base):
    return jax.grad(loss, has_aux=True)(trainable, base, batch, None)[0]

  compiled = jax.jit(gradient, compiler_options=FAST_COMPILE)
  grads = compiled(trainable, PARAMS)
  assert jax.tree.structure(grads) == jax.tree.structure(trainable)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
  # No product [width, ...] of the base's gradient is ever formed.
  shapes = set()

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == "dot_general":
        shapes.add(equation.outvars[0].aval.shape)
      for value in equation.params.values():
        for inner in jax.tree.leaves(
          value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
          if hasattr(inner, "jaxpr"):
            walk(inner.jaxpr)
          elif hasattr(inner, "eqns"):
            walk(inner)

  walk(jax.make_jaxpr(gradient)(trainable, PARAMS).jaxpr)
  assert (8, 2) in shapes or (2, 8) in shapes  # The adapter's own is formed.
  kernels = {x.shape[1:] for x in jax.tree.leaves(PARAMS["layers"])}
  kernels = {k for k in kernels if len(k) == 2}
  kernels |= {k[::-1] for k in kernels}
  assert not shapes & kernels


def test_full_does_not_read_the_base():
  adapter = adapters.full(MODEL)
  trainable = adapter.init(jax.random.key(0), PARAMS)
  poison = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), PARAMS)
  expected = MODEL.apply(PARAMS, TOKENS)
  for base in (None, poison):
    np.testing.assert_array_equal(
      adapter.apply(base, trainable, TOKENS), expected
    )
    merged = adapter.merge(base, trainable)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)


def test_head_unties_and_trains_only_the_end():
  adapter = adapters.head(MODEL)
  trainable = adapter.init(jax.random.key(0), PARAMS)
  assert set(trainable) == {"final_norm", "lm_head"}
  assert trainable["lm_head"].shape == (8, 13)
  changed = trainable | {"lm_head": jnp.zeros((8, 13))}
  assert not adapter.apply(PARAMS, changed, TOKENS).any()
  # The table stays what embeds the tokens.
  assert adapter.merge(PARAMS, changed)["embed"] is PARAMS["embed"]


@pytest.mark.parametrize("num_layers", [1, 2])
def test_last_layers_are_merged_as_they_were_trained(num_layers):
  """A base of fewer bits does not round what clients trained."""
  base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  adapter = adapters.last_layers(MODEL, num_layers=num_layers)
  trainable = noisy(adapter.init(jax.random.key(0), base))
  merged = adapter.merge(base, trainable)
  for name, x in merged["layers"].items():
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(x[-num_layers:], trainable[name])
    np.testing.assert_array_equal(
      x[:-num_layers], base["layers"][name][:-num_layers]
    )
  assert merged["embed"].dtype == jnp.bfloat16


def test_subset_trains_the_named_parameters_only():
  adapter = adapters.subset(MODEL, ("mlp_norm", "layers/o_proj"))
  trainable = adapter.init(jax.random.key(0), PARAMS)
  assert set(trainable) == {"layers/mlp_norm", "layers/o_proj"}
  merged = adapter.merge(PARAMS, noisy(trainable))
  old = dict(zip(trees.paths(PARAMS), jax.tree.leaves(PARAMS)))
  new = dict(zip(trees.paths(merged), jax.tree.leaves(merged)))
  for path, leaf in new.items():
    assert (leaf is old[path]) == (path not in trainable)


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (
      lambda: adapters.lora(MODEL, rank=2, targets=["q_pro"]),
      ["targets", "q_pro", "did you mean 'q_proj'"],
    ),
    (
      lambda: adapters.lora(MODEL, rank=2, targets=["embed"]),
      ["targets", "embed"],
    ),
    (
      lambda: adapters.lora(MODEL, rank=2, targets=["mlp_norm"]),
      ["targets", "mlp_norm"],
    ),
    (
      lambda: adapters.lora(MODEL, rank=2, targets="q_proj"),
      ["targets", "q_proj", "list"],
    ),
    (lambda: adapters.lora(MODEL, rank=2, targets=[]), ["targets"]),
    (lambda: adapters.lora(MODEL, rank=0), ["rank", "0", "8"]),
    (lambda: adapters.lora(MODEL, rank=9), ["rank", "9", "8"]),
    (lambda: adapters.lora(MODEL, rank=2.0), ["rank", "2.0"]),
    (lambda: adapters.lora(MODEL, rank=2, alpha=0), ["alpha", "0"]),
    (lambda: adapters.lora(MODEL, rank=2, alpha="x"), ["alpha", "'x'"]),
    (
      lambda: adapters.lora(MODEL, rank=2, alpha=float("nan")),
      ["alpha", "nan"],
    ),
    (
      lambda: adapters.subset(MODEL, ("q_pro_j",)),
      ["names", "q_pro_j", "layers/q_proj"],
    ),
    (lambda: adapters.subset(MODEL, "norm"), ["names", "norm"]),
    (lambda: adapters.subset(MODEL, ()), ["names"]),
    (
      lambda: adapters.head(
        MODEL._replace(shapes={"kernel": MODEL.shapes["embed"]})
      ),
      ["head", "final_norm", "kernel"],
    ),
  ],
)
def test_bad_arguments_are_named(make, words):
  with pytest.raises(errors.ConfigError) as raised:
    make()
  reference.check_message(raised.value, words)
