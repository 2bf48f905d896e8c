"""The arguments that all algorithms share: taken by every one, or refused."""

import dataclasses

import algorithm_cases as cases
import jax
import jax.numpy as jnp
from lora_methods import FAST_COMPILE, build, compiled
import lora_problem as problem
from lora_problem import PATHS, ROUNDS
import numpy as np
import optax
import pytest

from fedfm import aggregators, choices, compression, errors, trees
from fedfm.clients.transforms import MessageTransform

BFLOAT16 = compression.bfloat16()
SOME = compression.top_k(0.3)
ALL = compression.top_k(1.0)
# Clients never hear of what the server does.
SILENT = MessageTransform(lambda m, state, info: (trees.zeros_like(m), state))


def both_ways(compressor):
  up = (compression.uplink(compressor),)
  return {"transforms": up, "downlink": compressor}


@pytest.mark.parametrize("name", choices.ALGORITHMS)
def test_every_algorithm_takes_the_common_arguments(name):
  algorithm = cases.build(
    name,
    client_optimizer=cases.case_of(name).client_optimizer,
    server_optimizer=None,
    aggregator=None,
    weighting="examples",
    seed=3,
    num_clients=cases.problem_of(name).num_clients,
    transforms=(),
    downlink=None,
  )
  start = cases.problem_of(name).start(jnp.float32)
  assert jax.eval_shape(algorithm.init, start).seed.dtype == jnp.uint32


GIVEN = {
  "client_optimizer": optax.sgd(0.1),
  "server_optimizer": optax.sgd(0.5),
  "aggregator": aggregators.median(),
  "transforms": (BFLOAT16,),
  "downlink": BFLOAT16,
}
REFUSED = {
  "flora": ("server_optimizer", "aggregator", "transforms", "downlink"),
  "flexlora": ("server_optimizer", "aggregator", "transforms", "downlink"),
  "hetlora": ("aggregator", "transforms", "downlink"),
  "zero_padding": ("aggregator", "transforms", "downlink"),
  "fedex_lora": ("server_optimizer", "aggregator"),
  "fedsvd": ("server_optimizer",),
  "feddpa_f": ("transforms", "downlink"),
  "ifca": ("aggregator",),
  "afl": ("downlink",),
  "fedbuff": ("downlink",),
  "fedkseed": ("client_optimizer", "server_optimizer", "downlink"),
  "streaming_diloco": ("downlink",),
}


@pytest.mark.parametrize("name", choices.ALGORITHMS)
def test_what_an_algorithm_has_no_place_for_is_refused_with_the_reason(name):
  for argument, value in GIVEN.items():
    if argument in REFUSED.get(name, ()):
      message = rf"^{argument}: got one, but .*: expected (None|\(\))$"
      with pytest.raises(errors.ConfigError, match=message) as error:
        cases.build(name, **{argument: value})
      assert "\n" not in str(error.value)
    elif argument != "client_optimizer":
      cases.build(name, **{argument: value})


def plus(tree, other, factor=1.0):
  return jax.tree.map(lambda x, y: x + factor * y, tree, other)


def largest(x):
  """The largest 3 of 10 values of a tensor."""
  order = np.argsort(-np.abs(x), axis=None, kind="stable")
  kept = np.zeros(x.size)
  kept[order[: int(np.ceil(0.3 * x.size))]] = 1
  return x * kept.reshape(x.shape)


def by_hand(factors_of):
  """FedAvg of factors, top-k with error feedback: (weights, what is known)."""
  w = known = jax.tree.map(np.asarray, problem.start())
  none = jax.tree.map(np.zeros_like, w)
  residuals = {}
  for index, ids in enumerate(ROUNDS):
    factors, begin = factors_of(index), w
    known = plus(known, jax.tree.map(largest, plus(w, known, -1)))
    moves = {p: {f: float(f in factors) for f in "ab"} for p in PATHS}
    moves["head"] = 1.0
    for i, share in zip(ids, problem.shares(ids)):
      trained = problem.train(known, problem.base(), i, train=factors)
      owed = residuals.get(i, none)
      late = plus(plus(trained, known, -1), owed)
      # The factor that waits is not sent, nor what is owed of it.
      sent = jax.tree.map(lambda x, m: m * largest(x), late, moves)
      residuals[i] = plus(late, sent, -1)
      w = plus(w, sent, share)
    assert trees.norm(plus(w, begin, -1)) > 0
  return w, known


def run(algorithm, begin=None, rounds=ROUNDS):
  round_fn = jax.jit(algorithm.round, compiler_options=FAST_COMPILE)
  state = algorithm.init(problem.start() if begin is None else begin)
  for ids in rounds:
    state, _ = round_fn(state, problem.base(), problem.pack(ids))
  return state


@pytest.mark.parametrize(
  ("name", "factors_of"),
  [
    ("fedit", lambda index: "ab"),
    pytest.param("ffa_lora", lambda index: "b", marks=pytest.mark.slow),
    pytest.param(
      "rolora", lambda index: "ba"[index % 2], marks=pytest.mark.slow
    ),
  ],
)
def test_top_k_both_ways_equals_numpy(name, factors_of):
  with jax.enable_x64(True):
    options = both_ways(SOME) | {"num_clients": len(problem.SIZES)}
    state = run(build(name, **options))
    w, known = by_hand(factors_of)
    problem.assert_close(state.trainable, w)
    heard = state.sent[0]
    heard = heard["trainable"] if name == "rolora" else heard
    if name == "ffa_lora":  # A is never sent.
      heard = {p: heard[p] | {"a": w[p]["a"]} for p in PATHS} | {
        "head": heard["head"]
      }
    problem.assert_close(heard, known)


def slow(name):
  return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name", ["fedsvd", slow("fedsa_lora"), slow("feddpa_t"), slow("fedex_lora")]
)
def test_all_values_both_ways_are_no_compression(name):
  with jax.enable_x64(True):
    algorithm, round_fn = compiled(name)
    plain = algorithm.init(problem.start())
    for ids in ROUNDS:
      plain, _ = round_fn(plain, problem.base(), problem.pack(ids))
    options = both_ways(ALL) | {"num_clients": len(problem.SIZES)}
    state = run(build(name, **options))
    problem.assert_close(state.trainable, plain.trainable, rtol=1e-9)
    assert trees.norm(plus(state.trainable, problem.start(), -1)) > 0.01


@pytest.mark.slow
def test_what_clients_of_fedsvd_know_keeps_its_product_under_a_new_a():
  with jax.enable_x64(True):
    begin = problem.train(problem.start(), problem.base(), "client 0")
    state = run(build("fedsvd", downlink=SILENT), begin, ROUNDS[:2])
    known = {p: {**state.trainable[p], **state.sent[0][p]} for p in PATHS}
    assert np.abs(known["out"]["a"] - begin["out"]["a"]).max() > 0.1
    problem.assert_close(problem.products(known), problem.products(begin))


def test_clients_of_ifca_choose_among_the_models_that_they_heard():
  with jax.enable_x64(True):
    algorithm = cases.build("ifca", downlink=SILENT)
    round_fn = jax.jit(algorithm.round, compiler_options=FAST_COMPILE)
    state, losses = algorithm.init(cases.linear_start()), []
    for _ in range(2):
      cohort = cases.pack(cases.ROUNDS[0])
      state, metrics = round_fn(state, 0.0, cohort)
      losses.append(metrics["train/loss"])
    assert losses[0] == losses[1] > 0


@pytest.mark.slow
def test_clients_of_feddpa_train_their_own_on_top_of_what_they_heard():
  with jax.enable_x64(True):
    algorithm = build("feddpa_t", downlink=SILENT)
    later = run(algorithm, rounds=[ROUNDS[0], ["client 4", "client 1"]])
    alone = run(algorithm, rounds=[["client 4", "client 1"]])
    for row in (1, 4):
      got, expected = (
        jax.tree.map(lambda x, r=row: x[r], s.clients) for s in (later, alone)
      )
      problem.assert_close(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero_padding", slow("hetlora")])
def test_half_a_server_step_goes_half_the_way(name):
  with jax.enable_x64(True):
    algorithm, round_fn = compiled(name)
    whole = algorithm.init(problem.start())
    whole, _ = round_fn(whole, problem.base(), problem.pack(ROUNDS[0]))
    half = run(build(name, server_optimizer=optax.sgd(0.5)), None, ROUNDS[:1])
    middle = plus(whole.trainable, problem.start())
    problem.assert_close(half.trainable, jax.tree.map(lambda x: x / 2, middle))


@pytest.mark.slow
def test_momentum_moves_no_global_adapter_after_its_rounds():
  momentum = optax.sgd(1.0, momentum=0.9)
  with jax.enable_x64(True):
    algorithm = build("feddpa_f", server_optimizer=momentum)
    first = run(algorithm, rounds=ROUNDS[:1])
    last = run(algorithm, rounds=ROUNDS)
    assert trees.norm(plus(first.trainable, problem.start(), -1)) > 0
    for x, y in zip(*map(jax.tree.leaves, (first.trainable, last.trainable))):
      np.testing.assert_array_equal(x, y)
    assert trees.norm(plus(first.clients, last.clients, -1)) > 0


def test_bytes_with_bfloat16_both_ways():
  """Float64: A of both kernels 24 numbers, B 22, at rank 2; head 3."""
  both = both_ways(BFLOAT16)
  with jax.enable_x64(True):
    sizes, states, built = {}, {}, {}
    for name in ("fedit", "ffa_lora", "rolora", "fedsa_lora", "fedsvd",
                 "fedex_lora", "feddpa_t"):  # fmt: skip
      built[name] = build(name, **both)
      states[name] = jax.eval_shape(built[name].init, problem.start())
      sizes[name] = built[name].bytes_per_client(states[name])
    assert sizes["fedit"] == sizes["feddpa_t"] == (2 * 49, 2 * 49)
    assert sizes["ffa_lora"] == sizes["fedsvd"] == (2 * 25, 2 * 25)
    assert sizes["rolora"] == (2 * 25, 2 * 49)  # Of A, too, what is lacking.
    assert sizes["fedsa_lora"] == (2 * 24, 2 * 24)
    assert sizes["fedex_lora"] == (2 * 49, 2 * 49)
    # What goes down beside is as it is: a new A, the factors of a residual.
    for name, extra, beside in (
      ("fedsvd", {"rounds": np.int32(1)}, 8 * 24),
      ("fedex_lora", {"stacked_rank": np.float64(6)}, 8 * 46 * 3),
    ):
      state = states[name]
      state = dataclasses.replace(state, extra=state.extra | extra)
      up, down = built[name].bytes_per_client(state)
      assert (up, down) == (sizes[name][0], sizes[name][1] + beside)
    rolora = build("rolora", transforms=both["transforms"])
    assert rolora.bytes_per_client(states["rolora"]) == (2 * 25, 8 * 27)

    def linear(name, **options):
      algorithm = cases.build(name, **options)
      state = jax.eval_shape(algorithm.init, cases.linear_start())
      return algorithm.bytes_per_client(state)

    up = {"transforms": both["transforms"]}
    assert linear("fedbuff") == (32, 32)
    assert linear("fedbuff", **up) == (2 * 3 + 8, 32)  # A scalar as it is.
    assert linear("afl") == (32 + 2 * 8, 32 + 8)  # Share and loss; share.
    assert linear("afl", **up) == (2 * 3 + 8 + 2 * 8, 32 + 8)
    # One delta and its cluster up; two models down.
    assert linear("ifca", **both) == (2 * 3 + 8 + 4, 2 * 8)
