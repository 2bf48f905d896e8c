"""Arithmetic on LoRA pairs, held to dense NumPy in float64."""

import jax
import jax.numpy as jnp
from lora_problem import Halved
import numpy as np
import optax
import pytest
import reference

from fedfm import adapters, errors, models
from fedfm.algorithms import base_change, lora_metrics, low_rank
from fedfm.models import layers

CLIENTS, STACK, ROWS, COLS, RANK = 5, 2, 7, 6, 2
truncate = jax.jit(low_rank.truncate, static_argnums=(1, 2))
squared_norm = jax.jit(low_rank.squared_norm)
aggregation_error = jax.jit(lora_metrics.aggregation_error)
P = np.array([0.4, 0.25, 0.2, 0.1, 0.05])


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def draw(*lead, rank=RANK, seed=0, rows=ROWS, cols=COLS):
  rng = np.random.default_rng(seed)
  return {
    "a": rng.normal(size=(*lead, rows, rank)),
    "b": rng.normal(size=(*lead, rank, cols)),
  }


def dense(pair):
  return np.asarray(pair["a"]) @ np.asarray(pair["b"])


def weighted(matrices, weights):
  return np.einsum("k,k...->...", weights, matrices)


def test_stacked_factors_are_the_mean_of_products():
  scales, ranks = np.array([1.5, 0.5, 2.0, 1.0, 3.0]), [2, 1, 2, 1, 1]
  clients = draw(CLIENTS, STACK)
  for i, rank in enumerate(ranks):
    clients["a"][i, ..., rank:] = 0
    clients["b"][i, :, rank:] = 0
  ideal = weighted(dense(clients), P * scales)
  stacked = low_rank.weighted_sum(clients, jnp.asarray(P * scales))
  assert stacked["a"].shape == (STACK, ROWS, CLIENTS * RANK)
  np.testing.assert_allclose(dense(stacked), ideal, atol=1e-13)
  # The weights on both factors, as public code has had it, is another sum.
  both = np.einsum(
    "kior,kirc->ioc",
    P[:, None, None, None] * clients["a"],
    (P * scales)[:, None, None, None] * clients["b"],
  )
  assert np.linalg.norm(both - ideal) > 0.3 * np.linalg.norm(ideal)


def test_what_fedit_misses_is_the_covariance_of_the_factors():
  clients = draw(CLIENTS, STACK)
  mean = {f: weighted(x, P) for f, x in clients.items()}
  ideal = low_rank.weighted_sum(clients, jnp.asarray(P))
  missed = low_rank.product(low_rank.concat(ideal, low_rank.scaled(mean, -1)))
  apart = {f: clients[f] - mean[f] for f in "ab"}
  np.testing.assert_allclose(
    missed, weighted(dense(apart), P), rtol=1e-12, atol=1e-12
  )
  # Nothing is missed where all A, or all B, are equal.
  for factor in "ab":
    equal = np.broadcast_to(mean[factor], clients[factor].shape)
    same = clients | {factor: equal}
    mean_of_same = {f: weighted(x, P) for f, x in same.items()}
    error = aggregation_error({"w": same}, jnp.asarray(P), {"w": mean_of_same})
    assert error < 1e-14


def test_error_is_that_of_dense_matrices():
  trained = {
    "w": draw(CLIENTS, STACK),
    "v": draw(CLIENTS, seed=1, rows=3),
    "head": np.zeros((CLIENTS, 4)),
  }
  got = {"w": draw(STACK, seed=2), "v": dense(draw(seed=3, rows=3))}
  ideal = {k: weighted(dense(trained[k]), P) for k in got}
  missed = sum(
    np.sum((ideal[k] - (got[k] if k == "v" else dense(got[k]))) ** 2)
    for k in got
  )
  expected = np.sqrt(missed / sum(np.sum(x**2) for x in ideal.values()))
  error = aggregation_error(trained, jnp.asarray(P), got)
  np.testing.assert_allclose(error, expected, rtol=1e-13)
  norms, total = jax.jit(lora_metrics.product_norms)(trained, P)
  squares = [np.sum(dense(trained[k]) ** 2, axis=(-2, -1)) for k in got]
  squares[0] = squares[0].sum(axis=1)
  np.testing.assert_allclose(norms, np.sqrt(sum(squares)), rtol=1e-13)
  np.testing.assert_allclose(
    total, np.sqrt(sum(np.sum(x**2) for x in ideal.values())), rtol=1e-13
  )
  none = aggregation_error(trained, jnp.zeros(CLIENTS), got)
  assert none == 0


def test_norms_keep_their_digits_where_factors_cancel():
  pair = draw(STACK)
  exact = squared_norm(pair)
  np.testing.assert_allclose(exact, np.sum(dense(pair) ** 2), rtol=1e-13)
  same = truncate(pair, RANK)  # The product again, by other factors.
  rest = jax.jit(low_rank.squared_distance)(pair, same)
  assert np.sqrt(rest / exact) < 1e-14
  # By Gram matrices the same is only good to half of the digits.
  both = low_rank.concat(pair, low_rank.scaled(same, -1))
  a, b = both["a"], both["b"]
  gram = np.sum((a.mT @ a) * (b @ b.mT))
  assert np.sqrt(np.abs(gram) / exact) > 1e-10


def dense_best(matrix, rank):
  u, s, v = np.linalg.svd(matrix, full_matrices=False)
  return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


@pytest.mark.parametrize("split", low_rank.SPLITS)
@pytest.mark.parametrize("inner", [3, 5, 20])  # 20: more than either side.
def test_svd_by_qr_is_the_dense_svd(inner, split):
  pair = draw(STACK, rank=inner)
  cut = truncate(pair, 3, split)
  assert cut["a"].shape == (STACK, ROWS, 3)
  best = dense_best(dense(pair), 3)
  np.testing.assert_allclose(dense(cut), best, atol=1e-13 * inner)
  of_a = np.swapaxes(cut["a"], -1, -2) @ np.asarray(cut["a"])
  of_b = np.asarray(cut["b"]) @ np.swapaxes(cut["b"], -1, -2)
  sigma = np.linalg.svd(dense(pair), compute_uv=False)[..., :3]
  sigma = np.eye(3) * sigma[..., None]
  expected = (np.eye(3) + 0 * sigma, sigma**2)
  if split == "sqrt":
    expected = (sigma, sigma)
  np.testing.assert_allclose(of_a, expected[0], atol=1e-12)
  np.testing.assert_allclose(of_b, expected[1], atol=1e-11)
  rows = np.argmax(np.abs(cut["a"]), axis=-2)[..., None, :]
  assert (np.take_along_axis(np.asarray(cut["a"]), rows, axis=-2) > 0).all()


def test_svd_of_what_has_no_unique_one():
  q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(ROWS, ROWS)))
  equal = {"a": q[:, :4], "b": np.eye(4, COLS)}  # All singular values are 1.
  cut = truncate(equal, 2)
  np.testing.assert_allclose(np.sum((dense(equal) - dense(cut)) ** 2), 2)
  np.testing.assert_allclose(dense(truncate(equal, 4)), dense(equal),
                             atol=1e-14)  # fmt: skip
  # Of rank 1, and of rank 0: all of it is there, and A can still train B.
  for pair in (
    draw(rank=1),
    {"a": np.ones((ROWS, 3)), "b": np.zeros((3, COLS))},
  ):
    padded = low_rank.concat(pair, low_rank.scaled(draw(seed=4), 0))
    cut = truncate(padded, 2)
    np.testing.assert_allclose(dense(cut), dense(pair), atol=1e-13)
    np.testing.assert_allclose(cut["a"].T @ cut["a"], np.eye(2), atol=1e-13)
  one = truncate(draw(rank=1), 3)  # Rank 3 of a product of rank 1.
  assert one["a"].shape == (ROWS, 3) and not one["a"][:, 1:].any()


def test_parts_of_a_trainable():
  pair = draw()
  tree = {"w": pair, "more": [np.ones(3), (draw(seed=1),)]}
  assert list(low_rank.pairs_of(tree)) == ["more/1/0", "w"]
  shared = low_rank.select(tree, "a", rest=False)
  assert len(jax.tree.leaves(shared)) == 2
  own = low_rank.select(tree, "b")
  assert len(jax.tree.leaves(own)) == 3
  whole = low_rank.merge(shared, own)
  assert jax.tree.structure(whole) == jax.tree.structure(tree)
  zeros = jax.tree.map(np.zeros_like, tree)
  joined = low_rank.join(zeros, shared)
  np.testing.assert_array_equal(joined["w"]["a"], pair["a"])
  assert not joined["w"]["b"].any() and not joined["more"][0].any()
  with pytest.raises(errors.ConfigError) as raised:
    low_rank.pairs_of({"head": np.ones(3)})
  reference.check_message(raised.value, ["trainable", "LoRA"])


def test_an_optimizer_that_sees_one_factor():
  tree = {"w": draw(), "head": np.ones(3)}
  tx = low_rank.only(optax.adamw(0.1, weight_decay=0.5), "b", rest=False)
  updates, state = tx.update(
    jax.tree.map(np.zeros_like, tree), tx.init(tree), tree
  )
  assert not updates["w"]["a"].any() and not updates["head"].any()
  assert updates["w"]["b"].any()  # Weight decay alone moves it.
  moments = [x for x in jax.tree.leaves(state) if x.ndim]
  assert {x.shape for x in moments} == {tree["w"]["b"].shape}


def test_low_rank_change_of_a_kernel_that_is_no_array():
  base = {"layers": {"w": Halved(np.ones((STACK, ROWS, COLS)))}}
  trainable = {"layers/w": draw(STACK, rank=1)}
  products = {"layers/w": draw(STACK, rank=2, seed=3)}
  change = base_change.base_change("low_rank", 3)
  state = change.init(trainable)
  add = jax.jit(change.add)
  first = add(state, products)
  second = add(first, {"layers/w": draw(STACK, rank=3, seed=4)})
  # The first fits into rank 3; the sum of both is cut to it.
  np.testing.assert_allclose(
    dense(first["layers/w"]), dense(products["layers/w"]), atol=1e-12
  )
  total = dense(products["layers/w"]) + dense(draw(STACK, rank=3, seed=4))
  np.testing.assert_allclose(
    dense(second["layers/w"]), dense_best(total, 3), atol=1e-12
  )
  np.testing.assert_allclose(
    dense(change.added(second, first)["layers/w"]),
    dense(second["layers/w"]) - dense(first["layers/w"]),
    atol=1e-12,
  )
  kernel = change.apply(base, second)["layers"]["w"]
  x = np.random.default_rng(1).normal(size=(3, ROWS))
  for layer in range(STACK):
    y = layers.dense(x, jax.tree.map(lambda k, i=layer: k[i], kernel))
    weight = 2 * np.ones((ROWS, COLS)) + dense(second["layers/w"])[layer]
    np.testing.assert_allclose(y, x @ weight, rtol=1e-12)

  with pytest.raises(errors.ConfigError) as raised:
    dense_change = base_change.base_change("dense", 0)
    dense_change.apply(base, dense_change.init(trainable))
  reference.check_message(
    raised.value, ["residual", "dense", "layers/w", "Halved", "low_rank"]
  )


def test_adapter_goes_on_top_of_a_changed_kernel():
  shapes = {"w": jax.ShapeDtypeStruct((ROWS, COLS), np.float64)}
  model = adapters_model(shapes)
  adapter = adapters.lora(model, rank=1, alpha=2.0, targets=["w"])
  base, pairs = {"w": np.ones((ROWS, COLS))}, {"w": draw(rank=1)}
  changed = base_change.base_change("low_rank", 2)
  state = changed.add(changed.init(pairs), {"w": draw(rank=2, seed=5)})
  weight = 1 + dense(draw(rank=2, seed=5)) + 2 * dense(pairs["w"])
  new_base, x = changed.apply(base, state), np.eye(ROWS)
  np.testing.assert_allclose(adapter.apply(new_base, pairs, x), weight)
  np.testing.assert_allclose(adapter.merge(new_base, pairs)["w"], weight)


def adapters_model(shapes):
  return models.Model(
    init=None,
    apply=lambda params, x: layers.dense(x, params["w"]),
    axes=None,
    shapes=shapes,
  )


def test_small_changes_of_a_bfloat16_base_add_up():
  change = base_change.base_change("dense", 0)
  base = {"w": jnp.ones((4, 4), jnp.bfloat16)}
  trainable = {"w": {"a": jnp.zeros((4, 1)), "b": jnp.zeros((1, 4))}}
  state = change.init(trainable)
  step = {"w": {"a": jnp.ones((4, 1)), "b": jnp.full((1, 4), 2.0**-12)}}
  for _ in range(64):  # Each alone is lost in bfloat16; together 2^-6.
    state = change.add(state, step)
  assert change.apply(base, state)["w"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    change.apply(base, state)["w"].astype(np.float32), 1 + 2.0**-6
  )


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (
      lambda: base_change.base_change("lowrank", 2),
      ["residual", "lowrank", "low_rank"],
    ),
    (lambda: base_change.base_change("low_rank", 0), ["residual_rank", "0"]),
    (
      lambda: base_change.base_change("low_rank", 7).init({"w": draw(STACK)}),
      ["residual_rank", "7", "6", "w"],
    ),
    (
      lambda: base_change.base_change("dense", 0).apply(
        {"q_proj": np.ones((2, 2))}, {"q_pro": np.ones((2, 2))}
      ),
      ["q_pro", "did you mean 'q_proj'"],
    ),
  ],
)
def test_bad_arguments_are_named(make, words):
  with pytest.raises(errors.ConfigError) as raised:
    make()
  reference.check_message(raised.value, words)
