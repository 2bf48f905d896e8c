"""Microbatches: value, gradient and aux of the whole batch, and its update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from fedfm import algorithms, clients, data, errors
from fedfm.models import losses

ROWS, VOCAB = 12, 7


def bigram(trainable, base, tokens):
  return (trainable["w"] + base)[tokens]


def example(dtype):
  """Rows that count very different numbers of tokens, one of them none."""
  rng = np.random.default_rng(0)
  trainable = {"w": jnp.asarray(rng.normal(size=(VOCAB, VOCAB)), dtype)}
  share = np.linspace(0, 1, ROWS)[:, None]
  batch = {
    "tokens": rng.integers(0, VOCAB, (ROWS, 6)),
    "loss_mask": (rng.random((ROWS, 6)) < share).astype(dtype),
    "mask": np.array([1] * (ROWS - 1) + [0], dtype),
  }
  return trainable, jnp.zeros((), dtype), batch, jax.random.key(0)


@pytest.mark.parametrize("parts", [2, 4, ROWS])
@pytest.mark.parametrize(
  ("dtype", "limit"),
  [("float32", 1e-6), pytest.param("float64", 0, marks=pytest.mark.slow)],
)
def test_parts_are_the_whole(parts, dtype, limit):
  with jax.enable_x64(dtype == "float64"):
    loss = losses.language_model(bigram)
    inputs = example(dtype)
    expected = jax.value_and_grad(loss, has_aux=True)(*inputs)
    accumulated = clients.accumulated(loss, parts)
    run = jax.jit(jax.value_and_grad(accumulated, has_aux=True))
    for got in (run(*inputs), (accumulated(*inputs), expected[1])):
      for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
          a, b, rtol=limit or 1e-13, atol=limit or 1e-15
        )


def test_a_mean_over_examples_is_one_too():
  trainable = {"w": jnp.asarray([1.0, -2.0])}

  def loss(trainable, base, batch, key):
    squares = (batch["x"] @ trainable["w"] - batch["y"]) ** 2 * batch["mask"]
    return jnp.sum(squares) / jnp.maximum(jnp.sum(batch["mask"]), 1), {}

  rng = np.random.default_rng(1)
  batch = {
    "x": rng.normal(size=(6, 2)).astype(np.float32),
    "y": rng.normal(size=6).astype(np.float32),
    "mask": np.array([1, 1, 1, 1, 0, 0], np.float32),
  }
  run = jax.value_and_grad(clients.accumulated(loss, 3), has_aux=True)
  (value, _), gradient = run(trainable, None, batch, None)
  x, y = batch["x"][:4].astype(float), batch["y"][:4].astype(float)
  error = x @ np.array([1.0, -2.0]) - y
  np.testing.assert_allclose(value, np.mean(error**2), rtol=1e-6)
  np.testing.assert_allclose(
    gradient["w"], 2 * x.T @ error / 4, rtol=1e-5, atol=1e-6
  )


def plain_mean(trainable, base, batch, key):
  """The mean over examples as users write it: 0 / 0 without any."""
  squares = (batch["x"] - trainable) ** 2 * batch["mask"]
  return jnp.sum(squares) / jnp.sum(batch["mask"]), {}


def test_a_part_without_examples_is_left_out():
  run = jax.value_and_grad(clients.accumulated(plain_mean, 2), has_aux=True)
  batch = {"x": np.array([3.0, 0.0]), "mask": np.array([1.0, 0.0])}
  (value, _), gradient = run(1.0, None, batch, None)
  assert (value, gradient) == (4, -4)
  assert clients.accumulated(plain_mean, 2)(1.0, None, batch, None)[0] == 4
  batch = {"x": np.array([3.0, np.nan]), "mask": np.ones(2)}
  (value, _), gradient = run(1.0, None, batch, None)
  assert np.isnan(value) and np.isnan(gradient)


def test_counts_below_one_divide_too():
  """Token weights may be fractions: in the loss, and in `train/loss`."""

  def loss(trainable, base, batch, key):
    weights = batch["mask"] / 8
    squares = (batch["x"] - trainable) ** 2 * weights
    return jnp.sum(squares) / jnp.sum(weights), {"tokens": jnp.sum(weights)}

  source = data.from_arrays({"a": {"x": np.array([3.0, 5.0], np.float32)}})
  cohort = data.pack(source, source.ids, lanes=1, batch_size=2)
  for parts in (1, 2):
    algorithm = algorithms.fedavg(
      clients.accumulated(loss, parts), client_optimizer=optax.sgd(0.25)
    )
    state, metrics = algorithm.round(algorithm.init(jnp.ones(())), None, cohort)
    assert metrics["train/loss"] == (4 + 16) / 2
    assert metrics["train/count"] == 0.25
    assert state.trainable == 1 + 0.25 * (4 + 8) / 2


def test_a_round_of_a_plain_mean_keeps_part_filled_clients():
  source = data.from_arrays({"a": {"x": np.array([3.0], np.float32)}})
  cohort = data.pack(source, source.ids, lanes=1, batch_size=4)
  algorithm = algorithms.fedavg(
    clients.accumulated(plain_mean, 4), client_optimizer=optax.sgd(0.25)
  )
  state, metrics = algorithm.round(algorithm.init(jnp.ones(())), None, cohort)
  assert metrics["clients/nonfinite"] == 0 and metrics["train/loss"] == 4
  assert state.trainable == 2


def test_parts_have_keys_of_their_own():
  def loss(trainable, base, batch, key):
    return jax.random.normal(key) + 0 * trainable, {}

  batch = {"mask": np.ones(4, np.float32)}
  key = jax.random.key(3)
  value, _ = clients.accumulated(loss, 2)(jnp.zeros(()), None, batch, key)
  draws = [jax.random.normal(jax.random.fold_in(key, i)) for i in range(2)]
  np.testing.assert_allclose(value, np.mean(draws), rtol=1e-6)


def test_a_round_in_microbatches_is_the_same_round():
  source, base = reference.mlp_source(), reference.mlp_base()
  cohort = data.pack(source, source.ids, lanes=2, batch_size=4)
  old = reference.mlp_params()
  new = []
  for parts in (1, 2):
    loss = clients.accumulated(reference.mlp_loss, parts)
    algorithm = algorithms.fedavg(loss, client_optimizer=optax.sgd(0.05))
    state, metrics = jax.jit(algorithm.round)(algorithm.init(old), base, cohort)
    new.append((state.trainable, metrics["train/loss"]))
  error = reference.relative_error(new[1][0], new[0][0], old)
  assert 0 < error < 1e-6
  np.testing.assert_allclose(new[0][1], new[1][1], rtol=1e-6)


def test_a_cotangent_scales_the_gradient_and_others_are_refused():
  inputs = example("float32")
  loss = clients.accumulated(losses.language_model(bigram), 2)
  plain = jax.grad(lambda *a: loss(*a)[0])(*inputs)
  tripled = jax.grad(lambda *a: 3 * loss(*a)[0])(*inputs)
  np.testing.assert_allclose(tripled["w"], 3 * plain["w"], rtol=1e-6)
  with pytest.raises(NotImplementedError, match="trainable only"):
    jax.grad(lambda *a: loss(*a)[0], argnums=1)(*inputs)


def test_bad_numbers_of_parts_are_named():
  loss = losses.language_model(bigram)
  with pytest.raises(errors.ConfigError, match="accumulate: got 0"):
    clients.accumulated(loss, 0)
  with pytest.raises(
    errors.ConfigError, match="accumulate: 5 microbatches do not divide .* 12"
  ):
    clients.accumulated(loss, 5)(*example("float32"))
