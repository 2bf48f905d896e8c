"""Compressors: what is received, what it takes, and whole rounds with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from fedfm import algorithms, clients, compression, data, errors, sharding
from fedfm.clients.transforms import MessageTransform
from fedfm.types import ClientInfo

ALL = {
  "bfloat16": compression.bfloat16(),
  "int8": compression.int8(),
  "int4": compression.int4(),
  "e3m0": compression.e3m0(),
  "top_k": compression.top_k(0.1),
  "random_k": compression.random_k(0.1),
  "sign": compression.sign(),
  "rotation": compression.rotation(bits=4),
  "power_sgd": compression.power_sgd(rank=2),
}
WITH_FEEDBACK = ("power_sgd", "random_k", "sign", "top_k")
X = np.random.default_rng(0).normal(size=(3, 10, 20)).astype(np.float32)
MESSAGE = {
  "matrices": jnp.asarray(X),
  "vector": jnp.asarray(X[0, 0, :7]),
  "count": jnp.arange(3),
  "number": jnp.float32(0.3),  # Such as FedNova's length.
}


def info(key=None):
  zero = jnp.zeros((), jnp.int32)
  return ClientInfo(
      key=jax.random.key(0) if key is None else key, round=zero, row=zero,
      num_examples=zero, num_steps=zero, weight=jnp.ones(()),
      rate=jnp.ones(()),
  )  # fmt: skip


@functools.cache
def many(transform, num_keys=2000):
  """What is received of one vector, for many keys: [keys, 60]."""
  x = jnp.asarray(X.reshape(-1)[:60])

  def one(key):
    return transform.apply({"x": x}, transform.init({"x": x}), info(key))[0]

  keys = jax.random.split(jax.random.key(3), num_keys)
  return np.asarray(jax.jit(jax.vmap(one))(keys)["x"], np.float64)


def looks_unbiased(transform):
  """Whether the mean over keys is within 5 standard errors, everywhere."""
  received = many(transform)
  errors_ = received.mean(0) - X.reshape(-1)[:60]
  standard = received.std(0) / np.sqrt(len(received))
  return np.all(np.abs(errors_) <= 5 * standard + 1e-6)


@pytest.mark.parametrize("name", ["int8", "int4", "rotation"])
def test_unbiased_where_it_is_claimed(name):
  assert looks_unbiased(ALL[name])


def test_the_statistical_test_finds_a_bias():
  int4 = ALL["int4"]
  for name in WITH_FEEDBACK[1:]:
    assert not looks_unbiased(ALL[name])

  def rounded_down(message, state, info):
    sent, state = int4.apply(message, state, info)
    return jax.tree.map(lambda x: 0.98 * x, sent), state

  assert not looks_unbiased(MessageTransform(rounded_down))


def test_what_is_received_by_hand():
  x = jnp.asarray([3.0, -1.4, 1.5, 0.3, -0.01, 0.0, 0.06, 6.1])
  by_hand = {
    # Nearest powers of two, ties up; 8 / 64 is the least, so 0.06 is zero.
    "e3m0": [4, -1, 2, 0.25, 0, 0, 0, 8],
    "bfloat16": [3, -1.3984375, 1.5, 0.30078125, -0.010009765625, 0]
    + [0.06005859375, 6.09375],
    "sign": np.mean(np.abs(x)) * np.array([1, -1, 1, 1, -1, 1, 1, 1]),
  }
  for name, expected in by_hand.items():
    got = ALL[name].apply(x, ALL[name].init(x), info())[0]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
  for name, kept in (("top_k", [0, 7]), ("random_k", None)):
    transform = getattr(compression, name)(0.2)  # Of 8: two.
    got = np.asarray(transform.apply(x, (), info())[0])
    if kept:
      np.testing.assert_array_equal(np.flatnonzero(got), kept)
    sent = got[got != 0]
    assert len(sent) <= 2 and set(sent) <= set(np.asarray(x))
  levels = many(ALL["int8"]) / (np.abs(X.reshape(-1)[:60]).max() / 127)
  np.testing.assert_allclose(levels, np.round(levels), atol=1e-3)
  assert np.abs(levels).max() <= 127.01


@pytest.mark.slow
def test_low_rank_matrices_pass_power_sgd_and_rotation_helps():
  rng = np.random.default_rng(1)
  low = rng.normal(size=(3, 12, 2)) @ rng.normal(size=(3, 2, 9))
  low = jnp.asarray(low, jnp.float32)
  transform = ALL["power_sgd"]
  got, state = transform.apply(low, transform.init(low), info())
  np.testing.assert_allclose(got, low, atol=1e-5)
  assert state.shape == (3, 9, 2)
  # With a warm start, power iterations find the best rank 2.
  x, state = MESSAGE["matrices"], transform.init(MESSAGE["matrices"])
  u, s, v = np.linalg.svd(X, full_matrices=False)
  best = np.linalg.norm(X - (u[..., :2] * s[:, None, :2]) @ v[:, :2])
  apply = jax.jit(transform.apply)
  for _ in range(30):
    got, state = apply(x, state, info())
  assert np.linalg.norm(got - X) < 1.01 * best
  spiky = jnp.zeros(1000).at[3].set(100.0) + jnp.sin(jnp.arange(1000.0))
  lost = {
    name: np.linalg.norm(ALL[name].apply(spiky, (), info())[0] - spiky)
    for name in ("int4", "rotation")
  }
  assert lost["rotation"] < 0.5 * lost["int4"]


def test_bytes_by_hand():
  # 3 matrices of 10 x 20, a vector of 7; 3 integers and a number of 4 bytes.
  as_they_are = 12 + 4
  expected = {
    "bfloat16": 2 * 600 + 2 * 7,
    "int8": (600 + 4) + (7 + 4),
    "int4": (300 + 4) + (4 + 4),
    "e3m0": (300 + 4) + (4 + 4),
    "top_k": 8 * 60 + 8 * 1,
    "random_k": (4 * 60 + 4) + (4 * 1 + 4),
    "sign": (75 + 4) + (1 + 4),
    # Padded to 1024 and 8 values; a scale and a seed.
    "rotation": (512 + 8) + (4 + 8),
    "power_sgd": 4 * 3 * 2 * (10 + 20) + 4 * 7,
  }
  assert expected.keys() == ALL.keys()
  for name, count in expected.items():
    assert ALL[name].num_bytes(MESSAGE) == count + as_they_are, name
    shapes = jax.eval_shape(lambda: MESSAGE)
    assert ALL[name].num_bytes(shapes) == count + as_they_are, name
    fed_back = compression.uplink(ALL[name])
    assert fed_back.num_bytes(MESSAGE) == count + as_they_are, name


@pytest.mark.parametrize("name", ALL)
def test_shapes_stay_and_error_feedback_sums_to_the_truth(name):
  transform = compression.uplink(ALL[name])
  assert (transform is not ALL[name]) == (name in WITH_FEEDBACK)
  state = transform.init(jax.tree.map(jnp.zeros_like, MESSAGE))
  apply = jax.jit(transform.apply)
  total, sent = np.zeros(X.shape), np.zeros(X.shape)
  for step in range(8):
    message = jax.tree.map(lambda x, s=step: x * (1 + s % 3), MESSAGE)
    key = jax.random.fold_in(jax.random.key(1), step)
    received, state = apply(message, state, info(key))
    assert jax.tree.map(spec, received) == jax.tree.map(spec, message)
    for leaf in ("count", "number"):
      np.testing.assert_array_equal(received[leaf], message[leaf])
    total += message["matrices"]
    sent += received["matrices"]
  if name in WITH_FEEDBACK:
    assert state[0]["count"] == state[0]["number"] == ()
    residual = np.asarray(state[0]["matrices"])
    np.testing.assert_allclose(sent + residual, total, rtol=1e-4, atol=1e-4)
    assert np.abs(residual).max() > 0.1  # Something was lost on the way.
  else:
    assert not jax.tree.leaves(state)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(value):
  """The engine masks such a client by its message or its state."""
  bad = {"x": jnp.asarray(X).at[1, 2, 3].set(value)}
  for name, compressor in ALL.items():
    transform = compression.uplink(compressor)
    state = transform.init({"x": jnp.zeros(X.shape)})
    result = jax.jit(transform.apply)(bad, state, info())
    finite = [np.isfinite(leaf).all() for leaf in jax.tree.leaves(result)]
    assert not all(finite), name


def spec(x):
  return x.shape, x.dtype


# Whole rounds: FedAvg of the MLP of `reference`, whose clients take part
# partially, with unequal weights.

IDS = reference.client_ids()
ROUNDS = [IDS[:5], [IDS[6], IDS[0], IDS[2]], IDS[1:]]


UP = (compression.uplink(ALL["top_k"]), ALL["int8"])


def fedavg(up=(), down=None):
  return algorithms.fedavg(
    reference.mlp_loss,
    client_optimizer=optax.sgd(0.1),
    num_clients=len(IDS),
    transforms=up,
    downlink=down,
  )


@functools.cache
def compiled(up, down):
  algorithm = fedavg(up, ALL[down])
  fast = {"xla_backend_optimization_level": "0"}
  return algorithm, jax.jit(algorithm.round, compiler_options=fast)


def pack(ids, lanes=3):
  return data.pack(
      reference.mlp_source(dtype=np.float64), ids, lanes=lanes,
      batch_size=reference.BATCH, step_buckets=[16], slot_buckets=[8],
  )  # fmt: skip


def run(up, down, lanes=3, rounds=ROUNDS):
  algorithm, round_fn = compiled(up, down)
  state = algorithm.init(reference.mlp_params(dtype=jnp.float64))
  base = reference.mlp_base(jnp.float64)
  for ids in rounds:
    state, metrics = round_fn(state, base, pack(ids, lanes))
  assert metrics["clients/participating"] == len(rounds[-1])
  return state


def numpy_top_k(tree):
  """The largest tenth of each tensor, at least one value."""

  def one(x):
    flat = np.array(x, np.float64).reshape(-1)
    count = int(np.ceil(0.1 * flat.size))
    kept = np.argsort(-np.abs(flat), kind="stable")[:count]
    result = np.zeros_like(flat)
    result[kept] = flat[kept]
    return result.reshape(np.shape(x))

  return jax.tree.map(one, tree)


def plus(a, b, factor=1.0):
  return jax.tree.map(lambda x, y: x + factor * y, a, b)


def by_hand():
  """FedAvg with top-k both ways: (weights, what clients know, residuals)."""
  source = reference.mlp_source(dtype=np.float64)
  w = known = reference.mlp_params(dtype=jnp.float64)
  residuals = dict.fromkeys(IDS, jax.tree.map(lambda x: np.zeros(x.shape), w))
  for ids in ROUNDS:
    known = plus(known, numpy_top_k(plus(w, known, -1)))
    sizes = np.array([source.size(i) for i in ids], np.float64)
    for i, share in zip(ids, sizes / sizes.sum()):
      delta = reference.client_delta(
          reference.mlp_loss, optax.sgd(0.1), known,
          reference.mlp_base(jnp.float64), source, i,
      )  # fmt: skip
      late = plus(delta, residuals[i])
      sent = numpy_top_k(late)
      residuals[i] = plus(late, sent, -1)
      w = plus(w, sent, share)
  return w, known, residuals


def test_rounds_with_top_k_both_ways_equal_numpy():
  with jax.enable_x64(True):
    state = run(UP[:1], "top_k")
    w, known, residuals = by_hand()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9)
    close(reference.flat(state.trainable), reference.flat(w))
    close(reference.flat(state.sent[0]), reference.flat(known))
    kept = state.clients[1][0][0]  # The residual of the first transform.
    for row, i in enumerate(IDS):
      got = jax.tree.map(lambda x, r=row: x[r], kept)
      expected = reference.flat(residuals[i])
      close(reference.flat(got), expected, atol=1e-12)


def assert_same(state, other):
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(other)):
    np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-13)


@pytest.mark.slow
def test_rounds_do_not_depend_on_lanes_order_or_absent_clients():
  with jax.enable_x64(True):
    algorithm, round_fn = compiled(UP, "int4")
    base = reference.mlp_base(jnp.float64)
    expected = run(UP, "int4", rounds=ROUNDS[:2])
    turned = [ids[::-1] for ids in ROUNDS[:2]]
    assert_same(run(UP, "int4", lanes=8, rounds=turned), expected)

    begin = algorithm.init(reference.mlp_params(dtype=jnp.float64))
    state = begin
    for ids in ROUNDS[:2]:
      absent = next(i for i in IDS if i not in ids)
      cohort = reference.with_weights(pack([*ids, absent]), {len(ids): 0})
      state, _ = round_fn(state, base, cohort)
    assert_same(state, expected)


@pytest.mark.slow
def test_rounds_on_eight_devices_give_the_same_numbers():
  with jax.enable_x64(True):
    algorithm, _ = compiled(UP, "int4")
    base = reference.mlp_base(jnp.float64)
    begin = algorithm.init(reference.mlp_params(dtype=jnp.float64))
    expected = run(UP, "int4", rounds=ROUNDS[:2])
    mesh = sharding.make_mesh({"clients": 8})
    with jax.set_mesh(mesh):
      replicated = jax.NamedSharding(mesh, jax.P())
      state, base = jax.device_put((begin, base), replicated)
      placed = jax.jit(
        algorithm.round,
        out_shardings=replicated,
        compiler_options={"xla_backend_optimization_level": "0"},
      )
      for ids in ROUNDS[:2]:
        state, _ = placed(state, base, clients.put(pack(ids, 8), mesh))
        jax.block_until_ready(state)
    assert_same(state, expected)


def test_compression_runs_at_the_end_of_a_client_only():
  with jax.enable_x64(True):
    algorithm = fedavg(UP)
    state = jax.eval_shape(
      algorithm.init, reference.mlp_params(dtype=jnp.float64)
    )
    jaxpr = jax.make_jaxpr(algorithm.round)(
      state, reference.mlp_base(jnp.float64), pack(IDS)
    )
  # The loop over segments is one; the loop over steps is inside of it.
  assert set(depths(jaxpr.jaxpr, "top_k")) == {1}
  assert max(depths(jaxpr.jaxpr, "tanh")) == 2


def depths(jaxpr, name, depth=0):
  """In how many loops each equation of a primitive is."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == name:
      yield depth
    inner = depth + (equation.primitive.name == "while")
    for parameter in equation.params.values():
      parts = parameter if isinstance(parameter, tuple | list) else [parameter]
      for part in parts:
        part = getattr(part, "jaxpr", part)
        if hasattr(part, "eqns"):
          yield from depths(part, name, inner)


def test_bytes_of_an_algorithm_are_those_on_the_wire():
  size = 5 * 6 + 6 + 6  # Of the MLP's three tensors.
  for (up, down), expected in {
    (None, None): (4 * size, 4 * size),
    ("int8", None): (size + 12, 4 * size),
    (None, "top_k"): (4 * size, 8 * (3 + 1 + 1)),
    ("top_k", "int4"): (8 * (3 + 1 + 1), 15 + 3 + 3 + 12),
  }.items():
    algorithm = fedavg(
      (compression.uplink(ALL[up]),) if up else (), down and ALL[down]
    )
    state = jax.eval_shape(algorithm.init, reference.mlp_params())
    assert algorithm.bytes_per_client(state) == expected


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: compression.top_k(0), r"^fraction: got 0, expected in \(0, 1\]"),
    (lambda: compression.random_k(1.5), r"^fraction: got 1.5"),
    (lambda: compression.top_k(float("nan")), r"^fraction: got nan"),
    (lambda: compression.rotation(9), r"^bits: got 9, expected 2 to 8"),
    (lambda: compression.power_sgd(0), r"^rank: got 0"),
  ],
)
def test_bad_options_are_named(make, message):
  with pytest.raises(errors.ConfigError, match=message):
    make()
