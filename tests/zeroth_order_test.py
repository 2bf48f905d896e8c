"""Gradients without a backward pass: estimators, FedKSeed, FedMeZO."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from fedfm import algorithms, data, errors, sharding
from fedfm.algorithms.fedkseed import rebuild
from fedfm.clients import estimators

RATE, EPSILON, NUM_SEEDS, SEED = 0.02, 1e-2, 5, 3
IDS = reference.client_ids()
SOURCE = reference.mlp_source(dtype=np.float64)
# Unequal clients, of whom not all take part.
ROUNDS = [IDS[:3], [IDS[4], IDS[0], IDS[6]]]
FAST = {"xla_backend_optimization_level": "0"}


def pack(ids, lanes=2):
  return data.pack(
      SOURCE, ids, lanes=lanes, batch_size=reference.BATCH,
      step_buckets=[16], slot_buckets=[4],
  )  # fmt: skip


def kseed(**options):
  return algorithms.fedkseed(
    reference.mlp_loss,
    client_learning_rate=RATE,
    num_seeds=NUM_SEEDS,
    epsilon=EPSILON,
    seed=SEED,
    **options,
  )


def run(algorithm, lanes=2):
  """All states of two rounds, in float64."""
  states = [algorithm.init(reference.mlp_params(dtype=jnp.float64))]
  round_fn = jax.jit(algorithm.round, compiler_options=FAST)
  for ids in ROUNDS:
    state, metrics = round_fn(
      states[-1], reference.mlp_base(jnp.float64), pack(ids, lanes)
    )
    states.append(state)
  assert np.isfinite(metrics["train/loss"])
  return states


def numpy_loss(w, batch):
  """The MLP's loss on a flat vector of weights."""
  kernel, bias, out = w[:30].reshape(5, 6), w[30:36], w[36:]
  hidden = np.tanh(batch["x"] @ kernel + bias + 0.1)
  squares = (hidden @ out - batch["y"]) ** 2 * batch["mask"]
  return squares.sum() / batch["mask"].sum()


def numpy_direction(key):
  """z of a key: a draw for each of the three leaves."""
  shapes = jax.tree.leaves(reference.mlp_params(dtype=jnp.float64))
  draws = [
    jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
    for i, x in enumerate(shapes)
  ]
  return np.concatenate([np.asarray(x).ravel() for x in draws])


def replay(w, round_index, client_id, choose):
  """A client's steps one after the other: (weights, [(seed, slope)])."""
  key = reference.client_key(client_id, round_index, SEED)
  steps = []
  batches = reference.client_batches(SOURCE.read(client_id))
  for index, batch in enumerate(batches):
    step_key = jax.random.fold_in(key, index)
    seed, z = choose(jax.random.fold_in(step_key, 0xFFFFFFFF))
    above = numpy_loss(w + EPSILON * z, batch)
    below = numpy_loss(w - EPSILON * z, batch)
    slope = (above - below) / (2 * EPSILON)
    w = w - RATE * slope * z
    steps.append((seed, slope))
  return w, steps


def by_hand(choose):
  """FedAvg of the clients' replayed weights, and the sum of their slopes."""
  w = reference.flat(reference.mlp_params(dtype=jnp.float64))
  total, result = np.zeros(NUM_SEEDS), []
  for round_index, ids in enumerate(ROUNDS):
    sizes = np.array([SOURCE.size(i) for i in ids], np.float64)
    ends = []
    for i, share in zip(ids, sizes / sizes.sum()):
      end, steps = replay(w, round_index, i, choose)
      ends.append(share * end)
      for seed, slope in steps:
        total[seed] += share * slope
    w = sum(ends)
    result.append(w)
  return result, total


def test_fedkseed_equals_the_clients_steps_replayed():
  def choose(key):
    seeds = jax.random.fold_in(jax.random.key(SEED), 0x5EED)
    index = int(jax.random.randint(key, (), 0, NUM_SEEDS))
    return index, numpy_direction(jax.random.fold_in(seeds, index))

  with jax.enable_x64(True):
    states = run(kseed())
    weights, gradients = by_hand(choose)
    for state, expected in zip(states[1:], weights):
      got = reference.flat(state.trainable)
      np.testing.assert_allclose(got, expected, rtol=1e-9)
    np.testing.assert_allclose(states[-1].extra, gradients, rtol=1e-8)
    assert np.all(gradients != 0)
    # All rounds at once, from the first weights and K numbers.
    rebuilt = jax.jit(lambda w, g: rebuild(w, g, RATE, SEED))(
      states[0].trainable, states[-1].extra
    )
    np.testing.assert_allclose(
      reference.flat(rebuilt),
      reference.flat(states[-1].trainable),
      rtol=1e-12,
    )


def test_fedmezo_equals_numpy():
  def choose(key):
    return 0, numpy_direction(key)

  with jax.enable_x64(True):
    algorithm = algorithms.fedmezo(
      reference.mlp_loss,
      client_optimizer=optax.sgd(RATE),
      epsilon=EPSILON,
      seed=SEED,
    )
    states = run(algorithm)
    for state, expected in zip(states[1:], by_hand(choose)[0]):
      got = reference.flat(state.trainable)
      np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_a_round_is_a_few_kilobytes():
  algorithm = algorithms.fedkseed(reference.mlp_loss, client_learning_rate=0.1)
  state = jax.eval_shape(algorithm.init, reference.mlp_params())
  assert algorithm.bytes_per_client(state) == (4096, 4096)


def forward_fedavg():
  return algorithms.forward_gradients(
    reference.mlp_loss, client_optimizer=optax.sgd(RATE), seed=SEED
  )


def test_forward_gradients_equal_a_loop_of_projected_gradients():
  """Each step goes along z by the exact slope of the true gradient."""
  with jax.enable_x64(True):
    states = run(forward_fedavg())
    w = reference.flat(states[0].trainable)
    base = reference.mlp_base(jnp.float64)
    gradient_fn = jax.jit(jax.grad(reference.mlp_loss, has_aux=True))
    for round_index, ids in enumerate(ROUNDS):
      sizes = np.array([SOURCE.size(i) for i in ids], np.float64)
      mean = 0.0
      for i, share in zip(ids, sizes / sizes.sum()):
        own, key = w, reference.client_key(i, round_index, SEED)
        batches = reference.client_batches(SOURCE.read(i))
        for index, batch in enumerate(batches):
          step_key = jax.random.fold_in(key, index)
          z = numpy_direction(jax.random.fold_in(step_key, 0xFFFFFFFF))
          gradient = reference.flat(
            gradient_fn(unflat(own), base, batch, None)[0]
          )
          own = own - RATE * (gradient @ z) * z
        mean = mean + share * own
      w = mean
      np.testing.assert_allclose(
        reference.flat(states[round_index + 1].trainable), w, rtol=1e-10
      )


def unflat(vector):
  tree = reference.mlp_params(dtype=jnp.float64)
  leaves, treedef = jax.tree.flatten(tree)
  ends = np.cumsum([x.size for x in leaves])[:-1]
  parts = np.split(vector, ends)
  return treedef.unflatten(
    [jnp.asarray(p).reshape(x.shape) for p, x in zip(parts, leaves)]
  )


def batch_of(client_id):
  return next(iter(reference.client_batches(SOURCE.read(client_id))))


def estimates(loss, num_keys=3000):
  """Estimated gradients for many keys, and the true one."""
  arguments = (
    reference.mlp_params(), reference.mlp_base(), batch_of(IDS[0])
  )  # fmt: skip

  def one(key):
    gradient, aux = jax.grad(loss, has_aux=True)(*arguments, key)
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(gradient)])

  keys = jax.random.split(jax.random.key(1), num_keys)
  true = jax.grad(reference.mlp_loss, has_aux=True)(*arguments, None)[0]
  drawn = jax.jit(jax.vmap(one))(keys)
  return np.asarray(drawn, np.float64), reference.flat(true)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_mode", "zeroth_order"])
def test_estimates_are_unbiased(name):
  """To 5 standard errors; the finite difference is off by epsilon^2."""
  drawn, true = estimates(getattr(estimators, name)(reference.mlp_loss))
  standard = drawn.std(0) / np.sqrt(len(drawn))
  error = np.abs(drawn.mean(0) - true)
  assert np.all(error <= 5 * standard)
  # Half or twice the true gradient would be found out.
  assert np.any(np.abs(drawn.mean(0) - 0.5 * true) > 5 * standard)
  assert np.any(np.abs(drawn.mean(0) - 2 * true) > 5 * standard)


def count(jaxpr, name):
  """Equations of a primitive, in inner programs too."""
  total = 0
  for equation in jaxpr.eqns:
    total += equation.primitive.name == name
    for part in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
    ):
      inner = getattr(part, "jaxpr", part)
      if hasattr(inner, "eqns"):
        total += count(inner, name)
  return total


def test_nothing_goes_backward():
  arguments = (
    reference.mlp_params(), reference.mlp_base(), batch_of(IDS[0]),
    jax.random.key(0),
  )  # fmt: skip

  def products(loss):
    step = jax.value_and_grad(loss, has_aux=True)
    return count(jax.make_jaxpr(step)(*arguments).jaxpr, "dot_general")

  forward = count(
    jax.make_jaxpr(reference.mlp_loss)(*arguments).jaxpr, "dot_general"
  )
  assert forward == 2
  assert products(estimators.zeroth_order(reference.mlp_loss)) == 2 * forward
  # Tangents of both products, by their weights (and the hidden layer's).
  assert products(estimators.forward_mode(reference.mlp_loss)) == forward + 3
  # The usual step multiplies with what it kept of the forward pass.
  assert products(reference.mlp_loss) > forward


def test_noise_is_the_same_on_any_mesh():
  mesh = sharding.make_mesh({"clients": 2, "fsdp": 4})
  like = {"a": jnp.zeros((8, 12)), "b": jnp.zeros(16)}
  places = {
    "a": jax.NamedSharding(mesh, jax.P("fsdp", None)),
    "b": jax.NamedSharding(mesh, jax.P(("clients", "fsdp"))),
  }
  key = jax.random.key(9)
  plain = jax.jit(lambda: estimators.normal_like(key, like))()
  split = jax.jit(
    lambda: estimators.normal_like(key, like), out_shardings=places
  )()
  for name, x in plain.items():
    assert split[name].sharding == places[name]
    np.testing.assert_array_equal(x, split[name])
  assert not np.any(plain["a"].ravel()[:16] == plain["b"])


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: kseed(weighting="token"), "^weighting: .*did you mean 'tokens'"),
    (
      lambda: algorithms.fedkseed(
        reference.mlp_loss, client_learning_rate=0.1, num_seeds=0
      ),
      "^num_seeds: got 0",
    ),
    (
      lambda: algorithms.fedkseed(
        reference.mlp_loss, client_learning_rate=float("nan")
      ),
      "^client_learning_rate: got nan",
    ),
    (
      lambda: algorithms.fedmezo(
        reference.mlp_loss, client_optimizer=optax.sgd(0.1), epsilon=0.0
      ),
      "^epsilon: got 0.0, expected a number above 0",
    ),
  ],
)
def test_bad_options_are_named(make, message):
  with pytest.raises(errors.ConfigError, match=message):
    make()
