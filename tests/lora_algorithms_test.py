"""Every LoRA method: rounds by hand in NumPy, and what must never change."""

import dataclasses

import jax
import jax.numpy as jnp
import lora_by_hand as by_hand
from lora_methods import (
  FAST_COMPILE,
  OPTIONS,
  assert_same_clients,
  build,
  compiled,
)
import lora_problem as problem
from lora_problem import PATHS, ROUNDS
import numpy as np
import optax
import pytest
import reference

from fedfm import adapters, data, errors
from fedfm.algorithms import client_ranks

BY_DEFAULT = ("fedit", "rolora", "flora")


@pytest.mark.parametrize(
  "name",
  [
    name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow)
    for name in OPTIONS
  ],
)
def test_rounds_equal_the_paper_by_hand(name):
  with jax.enable_x64(True):
    algorithm, round_fn = compiled(name)
    state, hand = algorithm.init(problem.start()), by_hand.initial()
    for index, ids in enumerate(ROUNDS):
      state, metrics = round_fn(state, problem.base(), problem.pack(ids))
      hand = getattr(by_hand, name)(hand, ids, index)
      problem.assert_close(state.trainable, hand["trainable"])
      problem.assert_close(
        algorithm.effective_base(state, problem.base()),
        by_hand.changed_base(hand),
      )
      error = metrics["lora/aggregation_error"]
      np.testing.assert_allclose(error, hand["error"], rtol=1e-9, atol=1e-10)
    if algorithm.client_state is not None:
      assert_same_clients(name, state.clients, hand["clients"])
    if name == "hetlora":  # The example does prune, and not everyone.
      assert set(hand["clients"].values()) == {1, 2}


def test_flora_with_both_factors_weighted_is_something_else():
  with jax.enable_x64(True):
    algorithm, round_fn = compiled("flora")
    state = algorithm.init(problem.start())
    state, _ = round_fn(state, problem.base(), problem.pack(ROUNDS[0]))
    wrong = by_hand.flora(by_hand.initial(), ROUNDS[0], 0, both_weighted=True)
    got = state.extra["change"]
    assert problem.relative_error(got, wrong["change"]) > 0.3


def test_flora_takes_an_adapter_that_was_trained_before_into_the_base():
  with jax.enable_x64(True):
    algorithm, _ = compiled("flora")
    trained = problem.train(problem.start(), problem.base(), "client 0")
    state = algorithm.init(trained)
    problem.assert_close(
      state.extra["change"], problem.products(trained, problem.SCALE)
    )
    assert not any(state.trainable[path]["b"].any() for path in PATHS)


@pytest.mark.parametrize("name", OPTIONS)
def test_who_is_absent_and_in_which_order_changes_nothing(name):
  with jax.enable_x64(True):
    algorithm, round_fn = compiled(name)
    begin, ids = algorithm.init(problem.start()), ROUNDS[0]
    begin, _ = round_fn(begin, problem.base(), problem.pack(ids))
    state, metrics = round_fn(begin, problem.base(), problem.pack(ids))
    turned = problem.pack(ids[::-1])
    absent = problem.pack([*ids, "client 1"])
    absent = reference.with_weights(absent, {3: 0})
    for cohort in (turned, absent):
      other, other_metrics = round_fn(begin, problem.base(), cohort)
      problem.assert_close(other, state)
      problem.assert_close(other_metrics, metrics, rtol=1e-8)
    assert all(np.isfinite(x) and x.shape == () for x in metrics.values())

    # Nobody at all: only the count of rounds moves, and no turn is lost.
    nobody = reference.with_weights(turned, dict.fromkeys(range(3), 0.0))
    after, metrics = round_fn(begin, problem.base(), nobody)
    assert after.round == begin.round + 1
    assert reference.state_bytes(
      dataclasses.replace(after, round=begin.round)
    ) == reference.state_bytes(begin)
    assert metrics["lora/aggregation_error"] == 0


@pytest.mark.parametrize(
  ("name", "frozen"),
  [
    ("ffa_lora", "aaa"),
    ("rolora", "aba"),
    pytest.param("fedsa_lora", "bbb", marks=pytest.mark.slow),
  ],
)
def test_a_frozen_factor_keeps_its_bits(name, frozen):
  """Under Adam with weight decay at the clients, momentum at the server."""
  algorithm = build(
    name,
    client_optimizer=optax.adamw(0.05, weight_decay=0.1),
    server_optimizer=optax.sgd(0.8, momentum=0.9),
  )
  round_fn = jax.jit(algorithm.round, compiler_options=FAST_COMPILE)
  state = algorithm.init(problem.start(dtype=np.float32))
  for ids, factor in zip(ROUNDS, frozen):
    old = jax.device_get(state.trainable)
    base = problem.base(np.float32)
    state, metrics = round_fn(state, base, problem.pack(ids))
    for path in PATHS:
      for f in "ab":
        same = np.array_equal(old[path][f], state.trainable[path][f])
        assert same == (f == factor), (path, f)
    if name != "fedsa_lora":  # Exact, in float32 too.
      assert 0 < metrics["lora/aggregation_error"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_exact_in_float32_and_nothing_is_wider(name):
  algorithm = build(name)
  round_fn = jax.jit(algorithm.round, compiler_options=FAST_COMPILE)
  state = algorithm.init(problem.start(dtype=np.float32))
  like = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  for ids in ROUNDS[:2]:
    base = problem.base(np.float32)
    state, metrics = round_fn(state, base, problem.pack(ids))
    assert metrics["lora/aggregation_error"] < 1e-5
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == like


def test_rank_one_rolora_converges_where_ffa_stays_on_a_floor():
  """y = x a b^T on a zero base: FFA's A keeps its angle to a."""
  rng, width = np.random.default_rng(0), 5
  a, b = rng.normal(size=(2, width))
  x = np.linalg.qr(rng.normal(size=(20, width)))[0] * np.sqrt(20)
  source = data.from_arrays({
      f"client {i}": {"x": x[i::2], "y": x[i::2] @ np.outer(a, b)}
      for i in range(2)
  })  # fmt: skip
  trainable = {"w": {"a": rng.normal(size=(width, 1)) / np.sqrt(width),
                     "b": np.zeros((1, width))}}  # fmt: skip

  def loss(t, base, batch, key):
    error = batch["x"] @ t["w"]["a"] @ t["w"]["b"] - batch["y"]
    return jnp.mean(jnp.sum(error**2, axis=-1)), {}

  cohort = data.pack(source, source.ids, lanes=2, batch_size=10, epochs=8)
  final = {}
  for name in ("ffa_lora", "rolora"):
    with jax.enable_x64(True):
      algorithm = build(
        name, loss, client_optimizer=optax.sgd(0.05), report_error=False
      )

      def run(state, cohort, algorithm=algorithm):
        def one(state, _):
          return algorithm.round(state, None, cohort)[0], ()

        return jax.lax.scan(one, state, length=60)[0]

      state = jax.jit(run, compiler_options=FAST_COMPILE)(
        algorithm.init(trainable), cohort
      )
      pair = jax.device_get(state.trainable["w"])
    final[name] = np.sum((pair["a"] @ pair["b"] - np.outer(a, b)) ** 2)
  a_0 = trainable["w"]["a"][:, 0]
  sine_squared = 1 - (a @ a_0) ** 2 / (a @ a) / (a_0 @ a_0)
  floor = sine_squared * np.sum(np.outer(a, b) ** 2)
  np.testing.assert_allclose(final["ffa_lora"], floor, rtol=0.02)
  assert final["rolora"] < 1e-6 * floor


def test_bytes_are_those_of_the_papers():
  """Float64 here: A of both kernels 24 numbers, B 22, at rank 2; head 3."""
  with jax.enable_x64(True):
    states = {n: compiled(n)[0].init(problem.start()) for n in OPTIONS}

    def sent(name, state):
      return tuple(x / 8 for x in compiled(name)[0].bytes_per_client(state))

    of = {name: sent(name, state) for name, state in states.items()}
    assert of["fedit"] == of["feddpa_t"] == of["feddpa_f"] == (49, 49)
    assert of["ffa_lora"] == of["fedsvd"] == (25, 25)  # A is never sent.
    assert of["rolora"] == (25, 27)
    assert of["fedsa_lora"] == (24, 24)  # Neither B nor the head.
    # Ranks 2, 1, 2, 1, ..: three quarters of the factors.
    mean = 3 + 46 * 0.75
    for name in ("flexlora", "zero_padding", "hetlora"):
      np.testing.assert_allclose(of[name], (mean, mean), atol=1 / 16)
    np.testing.assert_allclose(of["flora"], (mean, 3), atol=1 / 16)
    assert of["fedex_lora"] == (49, 49)

    # Of shapes alone, the first round's.
    for name, state in states.items():
      assert sent(name, jax.eval_shape(lambda s=state: s)) == of[name]

    def after_one_round(name):
      state, _ = compiled(name)[1](
        states[name], problem.base(), problem.pack(ROUNDS[0])
      )
      return state

    assert sent("rolora", after_one_round("rolora")) == (27, 25)
    assert sent("fedsvd", after_one_round("fedsvd")) == (25, 49)
    # Clients 0, 3 and 2, of ranks 2, 1 and 2, stacked.
    assert sent("flora", after_one_round("flora"))[1] == 3 + 23 * 5
    assert sent("fedex_lora", after_one_round("fedex_lora")) == (
      49,
      49 + 3 * 46,
    )
    assert sent("feddpa_f", after_one_round("feddpa_f")) == (0, 49)


def test_personal_models():
  with jax.enable_x64(True):
    for name in ("fedsa_lora", "feddpa_t"):
      algorithm, round_fn = compiled(name)
      state = algorithm.init(problem.start())
      for ids in ROUNDS[:2]:
        state, _ = round_fn(state, problem.base(), problem.pack(ids))
      store = jax.tree.map(lambda x: x[0], state.clients)
      fresh = algorithm.client_state(problem.start())
      for own in (store, fresh):
        model = algorithm.personal(state, own)
        head = own["head"] if name == "fedsa_lora" else state.trainable["head"]
        problem.assert_close(model["head"], head)
        got = problem.products(model)
        for path in PATHS:
          shared, mine = state.trainable[path], own[path]
          if name == "fedsa_lora":
            expected = shared["a"] @ mine["b"]
          else:
            expected = (shared["a"] @ shared["b"] + mine["a"] @ mine["b"]) / 2
          np.testing.assert_allclose(got[path], expected, rtol=1e-12)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scales_of_clients_with_one_alpha(use_rslora):
  ranks, alpha = (1, 2, 3), 6
  adapter = adapters.lora(
    problem.MODEL,
    rank=3,
    alpha=alpha,
    targets=["w", "out"],
    use_rslora=use_rslora,
  )

  def scales(client_alpha):
    population = client_ranks.client_ranks(adapter, ranks, client_alpha)
    relative = population.relative_scale(jnp.asarray(ranks))
    return adapter.config["scale"] * relative

  power = 0.5 if use_rslora else 1
  expected = alpha / np.array(ranks) ** power
  np.testing.assert_allclose(scales("equal"), expected, rtol=1e-6)
  np.testing.assert_allclose(scales("proportional"), expected[-1], rtol=1e-6)


def _full():
  return problem.adapter()._replace(kind="full")


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    *((n, {"adapter": _full()}, ["adapter.kind", "full", n]) for n in OPTIONS),
    ("flora", {"ranks": (2, 3)}, ["ranks", "3", "adapter.rank", "2"]),
    ("flexlora", {"ranks": (0,)}, ["ranks", "0"]),
    ("hetlora", {"ranks": (1.0,)}, ["ranks", "1.0"]),
    ("zero_padding", {"client_alpha": "eqal"}, ["client_alpha", "equal"]),
    ("flexlora", {"split": "a"}, ["split", "'a'", "sqrt"]),
    ("fedsvd", {"split": "c"}, ["split", "'c'"]),
    ("fedsvd", {"period": 0}, ["period", "0"]),
    ("hetlora", {"strength": -0.1}, ["strength", "-0.1"]),
    ("hetlora", {"decay": 0.0}, ["decay", "0.0"]),
    ("feddpa_t", {"local_weight": 1.5}, ["local_weight", "1.5"]),
    ("feddpa_f", {"global_rounds": 0}, ["global_rounds", "0"]),
    ("flora", {"residual": "sparse"}, ["residual", "sparse"]),
    ("fedex_lora", {"residual": "low_rank"}, ["residual_rank", "0"]),
    ("fedit", {"seed": -1}, ["seed", "-1"]),
  ],
)  # fmt: skip
def test_bad_arguments_are_named(name, options, words):
  with pytest.raises(errors.ConfigError) as raised:
    build(name, **options)
  reference.check_message(raised.value, words)
