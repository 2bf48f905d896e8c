"""LoRA methods with other ranks, bases, messages and weights than usual."""

import jax
import jax.numpy as jnp
import lora_by_hand as by_hand
from lora_methods import FAST_COMPILE, POPULATION, assert_same_clients, build
import lora_problem as problem
from lora_problem import PATHS, ROUNDS, SOURCE, Halved
import numpy as np
import optax
import pytest
import reference

from fedfm import compression, trees
from fedfm.algorithms import dual_adapter


@pytest.mark.slow
def test_clients_of_a_smaller_rank_train_the_smaller_adapter():
  """With Adam and clipping too, whose states the zeros must not disturb."""
  optimizer = optax.chain(
    optax.clip_by_global_norm(0.5), optax.adamw(0.05, weight_decay=0.1)
  )
  with jax.enable_x64(True):
    algorithm = build("zero_padding", client_optimizer=optimizer)
    round_fn = jax.jit(algorithm.round, compiler_options=FAST_COMPILE)
    begin = problem.train(problem.start(), problem.base(), "client 4")
    ids = ROUNDS[1]
    state, _ = round_fn(
      algorithm.init(begin), problem.base(), problem.pack(ids)
    )
    trained = []
    for client_id in ids:
      small = by_hand.cut(begin, by_hand.rank_of(client_id))
      small = jax.tree.map(jnp.asarray, small)
      delta = reference.client_delta(
          problem.loss, optimizer, small, problem.base(), SOURCE, client_id,
          epochs=2, batch_size=problem.BATCH,
      )  # fmt: skip
      trained.append(by_hand.pad(trees.add(small, delta)))
    expected = problem.mean(trained, problem.shares(ids))
    problem.assert_close(state.trainable, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_a_base_that_cannot_be_changed_gets_low_rank_terms(name):
  with jax.enable_x64(True):
    algorithm = build(name, residual="low_rank", residual_rank=3)
    round_fn = jax.jit(algorithm.round, compiler_options=FAST_COMPILE)
    results = []
    for wrap in (lambda w: w, lambda w: Halved(w / 2)):
      base = jax.tree.map(wrap, problem.base())
      state = algorithm.init(problem.start())
      for ids in ROUNDS:
        state, metrics = round_fn(state, base, problem.pack(ids))
      kernels = algorithm.effective_base(state, base)
      pairs = {path: state.trainable[path] for path in PATHS}
      y = problem.adapter().apply(kernels, pairs, np.eye(problem.WIDTH))
      results.append((y, state.trainable, metrics))
    problem.assert_close(results[1], results[0])
    # Rank 3 holds all of the one kernel, and cuts the other.
    assert 1e-6 < metrics["lora/aggregation_error"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedit", "fedsa_lora", "fedex_lora"])
def test_messages_may_be_compressed(name):
  """Here so that nothing is lost, with the state that error feedback keeps."""
  whole = compression.uplink(compression.top_k(fraction=1.0))
  options = {"num_clients": POPULATION, "transforms": (whole,)}
  with jax.enable_x64(True):
    algorithm = build(name, **options)
    round_fn = jax.jit(algorithm.round, compiler_options=FAST_COMPILE)
    state, hand = algorithm.init(problem.start()), by_hand.initial()
    for index, ids in enumerate(ROUNDS[:2]):
      state, metrics = round_fn(state, problem.base(), problem.pack(ids))
      hand = getattr(by_hand, name)(hand, ids, index)
      problem.assert_close(state.trainable, hand["trainable"], 1e-6)
      error = metrics["lora/aggregation_error"]
      np.testing.assert_allclose(error, hand["error"], rtol=1e-5, atol=1e-6)
    if name == "fedsa_lora":
      assert_same_clients(name, state.clients[0], hand["clients"])
      own = jax.tree.map(lambda x: x[0], state.clients)
      personal = algorithm.personal(state, own)
      np.testing.assert_array_equal(personal["head"], own[0]["head"])


def test_instance_weights_mix_row_by_row():
  rng = np.random.default_rng(0)
  shared = problem.start()
  own = {path: problem.train(shared, problem.base(), "client 3")[path]
         for path in PATHS}  # fmt: skip
  shared = problem.train(shared, problem.base(), "client 4")
  x = rng.normal(size=(3, 1, problem.WIDTH))
  weights = jnp.array([0.0, 0.3, 1.0])
  with jax.enable_x64(True):

    def run(weight, rows):
      model = dual_adapter.mixed(shared, own | {"head": None}, weight)
      pairs = {path: model[path] for path in PATHS}
      return problem.adapter().apply(problem.base(), pairs, rows)

    together = run(weights, x)
    for i, weight in enumerate(weights):
      np.testing.assert_allclose(together[i], run(weight, x[i]), rtol=1e-12)
    kernels = problem.kernels(problem.base())
    only = problem.products(own, problem.SCALE)  # Weight 1: the own adapter.
    first, second = kernels["layers/w"] + only["layers/w"]
    expected = x[2] @ first @ second @ (kernels["out"] + only["out"])
    np.testing.assert_allclose(together[2], expected, rtol=1e-12)
