"""Every algorithm by name: a contract, and two rounds by hand in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from fedfm import algorithms, data, errors

SIZES = (7, 4, 3, 2, 1)
BATCH, EPOCHS, RATE, MU = 2, 2, 0.05, 0.3
SOURCE = data.from_arrays(
  {
    f"client {c}": {
      "x": np.random.default_rng(c).normal(size=(n, 3)),
      "y": np.random.default_rng(c + 50).normal(size=n) + c,
    }
    for c, n in enumerate(SIZES)
  }
)
# Two rounds of unequal clients, of whom not all take part.
ROUNDS = [
  ["client 0", "client 3", "client 2"],
  ["client 4", "client 0", "client 1"],
]


def loss(params, base, batch, key):
  """Mean squared error of a linear model."""
  del base, key
  residual = batch["x"] @ params["w"] + params["b"] - batch["y"]
  count = jnp.sum(batch["mask"])
  aux = {"tokens": 10 * count}
  return jnp.sum(residual**2 * batch["mask"]) / jnp.maximum(count, 1), aux


SGD = optax.sgd(RATE)
NAMED = {
  "fedavg": algorithms.fedavg,
  "fedprox": functools.partial(algorithms.fedprox, mu=MU),
  "fedavgm": algorithms.fedavgm,
  "fedadagrad": algorithms.fedadagrad,
  "fedadam": algorithms.fedadam,
  "fedyogi": algorithms.fedyogi,
  "fedopt": functools.partial(
    algorithms.fedopt, server_optimizer=optax.adam(0.1)
  ),
}


@functools.cache
def compiled(name):
  algorithm = NAMED[name](loss, client_optimizer=SGD)
  return algorithm, jax.jit(algorithm.round)


def start(dtype=jnp.float64):
  return {"w": jnp.asarray([0.5, -0.2, 0.1], dtype), "b": jnp.zeros((), dtype)}


def pack(ids, lanes=2):
  return data.pack(
      SOURCE, ids, lanes=lanes, batch_size=BATCH, epochs=EPOCHS,
      step_buckets=[20], slot_buckets=[4],
  )  # fmt: skip


def numpy_delta(w, client_id, mu):
  """A client's local SGD on [w, b], float64."""
  sent, examples = w.copy(), SOURCE.read(client_id)
  x = np.concatenate([examples["x"], np.ones((len(examples["y"]), 1))], axis=1)
  for _ in range(EPOCHS):
    for at in range(0, len(x), BATCH):
      rows, y = x[at : at + BATCH], examples["y"][at : at + BATCH]
      gradient = 2 * rows.T @ (rows @ w - y) / len(y)
      w = w - RATE * (gradient + mu * (w - sent))
  return w - sent


def numpy_server(name, delta, m, v, t):
  """One server step of the papers: (what is added to w, m, v)."""
  beta1, beta2, tau, rate = 0.9, 0.99, 1e-3, 0.1
  if name in ("fedavg", "fedprox"):
    return delta, m, v
  if name == "fedavgm":
    m = 0.9 * m + delta
    return m, m, v
  if name == "fedopt":  # Adam, with bias correction and v from 0.
    m = beta1 * m + (1 - beta1) * delta
    v = 0.999 * v + 0.001 * delta**2
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - 0.999**t)
    return rate * m_hat / (np.sqrt(v_hat) + 1e-8), m, v
  m = delta if name == "fedadagrad" else beta1 * m + (1 - beta1) * delta
  if name == "fedadagrad":
    v = v + delta**2
  elif name == "fedadam":
    v = beta2 * v + (1 - beta2) * delta**2
  else:
    v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
  return rate * m / (np.sqrt(v) + tau), m, v


def by_hand(name):
  """[w, b] after each of the two rounds."""
  w, m = np.array([0.5, -0.2, 0.1, 0.0]), np.zeros(4)
  v = np.zeros(4) if name == "fedopt" else np.full(4, 1e-6)
  result = []
  for t, ids in enumerate(ROUNDS, start=1):
    sizes = np.array([SOURCE.size(i) for i in ids])
    mu = MU if name == "fedprox" else 0
    deltas = np.stack([numpy_delta(w, i, mu) for i in ids])
    step, m, v = numpy_server(name, sizes @ deltas / sizes.sum(), m, v, t)
    w = w + step
    result.append(w)
  return result


def flat(state):
  return np.append(state.trainable["w"], state.trainable["b"])


@pytest.mark.parametrize("name", NAMED)
def test_two_rounds_equal_the_paper_by_hand(name):
  with jax.enable_x64(True):
    algorithm, round_fn = compiled(name)
    state = algorithm.init(start())
    for ids, expected in zip(ROUNDS, by_hand(name)):
      state, metrics = round_fn(state, None, pack(ids))
      np.testing.assert_allclose(flat(state), expected, rtol=1e-10, atol=1e-12)
      total = sum(SOURCE.size(i) for i in ids)
      assert metrics["train/count"] == 10 * EPOCHS * total
      assert metrics["clients/participating"] == len(ids)


@pytest.mark.parametrize("name", NAMED)
def test_contract(name):
  with jax.enable_x64(True):
    algorithm, round_fn = compiled(name)
    first = start()
    begin = algorithm.init(first)
    assert begin.round == 0
    assert begin.trainable["w"] is not first["w"]  # Its own copy: donatable.
    state = begin
    for index, ids in enumerate(ROUNDS):
      state, metrics = round_fn(state, None, pack(ids))
      assert state.round == index + 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert all(np.isfinite(x) and x.shape == () for x in metrics.values())
    assert jax.tree.map(spec, begin) == jax.tree.map(spec, state)

    # Float32 stays float32, in the optimizer's state too.
    narrow = algorithm.init(start(jnp.float32))
    after = jax.eval_shape(algorithm.round, narrow, None, pack(ROUNDS[0]))[0]
    assert jax.tree.map(spec, narrow) == jax.tree.map(spec, after)

    # Without jit; with clients in another order; with an absent client.
    one, _ = round_fn(begin, None, pack(ROUNDS[0]))
    plain, _ = algorithm.round(begin, None, pack(ROUNDS[0]))
    turned, _ = round_fn(begin, None, pack(ROUNDS[0][::-1]))
    cohort = reference.with_weights(pack([*ROUNDS[0], "client 1"]), {3: 0})
    absent, _ = round_fn(begin, None, cohort)
    for other in (plain, turned, absent):
      np.testing.assert_allclose(flat(other), flat(one), rtol=1e-11, atol=1e-14)

    assert algorithm.effective_base(state, "base") == "base"
    assert algorithm.bytes_per_client(state) == (32, 32)


def spec(x):
  return x.shape, x.dtype


@pytest.mark.parametrize(
  "server_optimizer",
  [
    None,
    optax.yogi(0.1),
    optax.chain(
      optax.clip_by_global_norm(0.1),
      optax.sgd(optax.linear_schedule(1.0, 0.0, 2), momentum=0.5),
    ),
  ],
)
def test_any_optax_server_sees_the_negative_mean_delta(server_optimizer):
  with jax.enable_x64(True):
    algorithm = algorithms.fedopt(
      loss, client_optimizer=SGD, server_optimizer=server_optimizer
    )
    round_fn = jax.jit(algorithm.round)
    optimizer = server_optimizer or optax.sgd(1.0)
    state = algorithm.init(start())
    w, opt = flat(state), optimizer.init(jnp.asarray(flat(state)))
    for ids in ROUNDS:
      state, _ = round_fn(state, None, pack(ids))
      sizes = np.array([SOURCE.size(i) for i in ids])
      deltas = np.stack([numpy_delta(w, i, 0) for i in ids])
      updates, opt = optimizer.update(
        jnp.asarray(-(sizes @ deltas) / sizes.sum()), opt, jnp.asarray(w)
      )
      w = np.asarray(w + updates)
      np.testing.assert_allclose(flat(state), w, rtol=1e-10)


@pytest.mark.parametrize("weighting", ["tokens", "uniform"])
def test_weighting(weighting):
  with jax.enable_x64(True):
    algorithm = algorithms.fedavg(
      loss, client_optimizer=SGD, weighting=weighting
    )
    ids = ROUNDS[0]
    state = algorithm.init(start())
    w = flat(state)
    state, _ = jax.jit(algorithm.round)(state, None, pack(ids))
    sizes = np.array([SOURCE.size(i) for i in ids])
    weights = np.ones(3) if weighting == "uniform" else 10 * sizes
    deltas = np.stack([numpy_delta(w, i, 0) for i in ids])
    expected = w + weights @ deltas / weights.sum()
    np.testing.assert_allclose(flat(state), expected, rtol=1e-10)


def test_cohort_weights_multiply_the_clients_own():
  with jax.enable_x64(True):
    algorithm, round_fn = compiled("fedavg")
    ids = ROUNDS[0]
    cohort = reference.with_weights(pack(ids), {0: 0.5, 1: 3.0})
    state = algorithm.init(start())
    w = flat(state)
    state, _ = round_fn(state, None, cohort)
    weights = np.array([SOURCE.size(i) for i in ids]) * [0.5, 3, 1]
    deltas = np.stack([numpy_delta(w, i, 0) for i in ids])
    expected = w + weights @ deltas / weights.sum()
    np.testing.assert_allclose(flat(state), expected, rtol=1e-7)


def test_client_optimizer_may_depend_on_the_round():
  with jax.enable_x64(True):
    scheduled = algorithms.fedavg(
      loss, client_optimizer=lambda r: optax.sgd(RATE * (1.0 - r))
    )
    state = scheduled.init(start())
    round_fn = jax.jit(scheduled.round)
    state, _ = round_fn(state, None, pack(ROUNDS[0]))
    np.testing.assert_allclose(flat(state), by_hand("fedavg")[0], rtol=1e-10)
    after, _ = round_fn(state, None, pack(ROUNDS[1]))  # A rate of 0.
    np.testing.assert_array_equal(flat(after), flat(state))


def test_server_step_trains_on_the_servers_own_batch():
  with jax.enable_x64(True):
    algorithm = algorithms.fedavg(
      loss,
      client_optimizer=SGD,
      server_step=lambda trainable, base, batch, key: jax.tree.map(
        lambda x: x + batch, trainable
      ),
    )
    state = algorithm.init(start())
    new, _ = jax.jit(algorithm.round)(state, None, pack(ROUNDS[0]), 2.0)
    expected = by_hand("fedavg")[0] + 2
    np.testing.assert_allclose(flat(new), expected, rtol=1e-10)


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (
      lambda: algorithms.fedavg(loss, client_optimizer=SGD, weighting="token"),
      ["weighting", "token", "tokens"],
    ),
    (
      lambda: algorithms.fedavg(loss, client_optimizer=SGD, seed=-1),
      ["seed", "-1"],
    ),
    (
      lambda: algorithms.fedadam(loss, client_optimizer=SGD, seed=2**32),
      ["seed", str(2**32)],
    ),
    (
      lambda: algorithms.fedavg(loss, client_optimizer=SGD, seed=0.5),
      ["seed", "0.5"],
    ),
    (
      lambda: algorithms.fedprox(loss, client_optimizer=SGD, mu=-0.1),
      ["mu", "-0.1"],
    ),
    (
      lambda: algorithms.fedprox(loss, client_optimizer=SGD, mu=float("nan")),
      ["mu", "nan"],
    ),
  ],
)
def test_bad_arguments_are_named(make, words):
  with pytest.raises(errors.ConfigError) as raised:
    make()
  reference.check_message(raised.value, words)
