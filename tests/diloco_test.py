"""DiLoCo and Photon: by hand, in NumPy, and where replicas' states lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from fedfm import algorithms, clients, data, errors, sharding

RATE, DECAY, BETA1, BETA2, EPSILON = 0.05, 0.1, 0.9, 0.95, 1e-8
ADAMW = optax.adamw(RATE, b1=BETA1, b2=BETA2, weight_decay=DECAY)
SIZES = (6, 4, 2, 4)
SOURCE = data.from_arrays(
  {
    f"replica {c}": {
      "x": np.random.default_rng(c).normal(size=(n, 3)),
      "y": np.random.default_rng(c + 50).normal(size=n) + c,
    }
    for c, n in enumerate(SIZES)
  }
)
ALL = list(SOURCE.ids)
# Replicas leave and join between rounds; the last joins in the third.
ROUNDS = [ALL[:3], [ALL[0], ALL[2]], ALL[1:]]


def loss(w, base, batch, key):
  """Mean squared error of a linear model."""
  del base, key
  residual = (batch["x"] @ w - batch["y"]) * batch["mask"]
  return jnp.sum(residual**2) / jnp.maximum(jnp.sum(batch["mask"]), 1), {}


def start():
  return jnp.asarray([0.5, -0.2, 0.1])


def pack(ids, lanes=2, aligned=True, **options):
  return data.pack(
      SOURCE, ids, lanes=lanes, batch_size=2, local_steps=2, aligned=aligned,
      step_buckets=[8], slot_buckets=[4], **options,
  )  # fmt: skip


@functools.cache
def compiled(name="diloco", **options):
  algorithm = getattr(algorithms, name)(
    loss,
    client_optimizer=ADAMW,
    weighting="examples",
    num_clients=len(ALL),
    **options,
  )
  fast = {"xla_backend_optimization_level": "0"}
  return algorithm, jax.jit(algorithm.round, compiler_options=fast)


def run(name="diloco", rounds=ROUNDS, **layout):
  """All states, from the first, in float64."""
  algorithm, round_fn = compiled(name)
  states = [algorithm.init(start())]
  for ids in rounds:
    states.append(round_fn(states[-1], None, pack(ids, **layout))[0])
  return states


def adamw(w, moments, gradient):
  """One step of AdamW, as its paper has it."""
  count, m, v = moments
  count, m = count + 1, BETA1 * m + (1 - BETA1) * gradient
  v = BETA2 * v + (1 - BETA2) * gradient**2
  m_hat, v_hat = m / (1 - BETA1**count), v / (1 - BETA2**count)
  step = m_hat / (np.sqrt(v_hat) + EPSILON) + DECAY * w
  return w - RATE * step, (count, m, v)


def inner_run(w, moments, client_id, steps=2):
  """H inner steps of one replica, and how many examples they saw."""
  examples, used = SOURCE.read(client_id), 0
  for step in range(min(steps, -(-SOURCE.size(client_id) // 2))):
    x = examples["x"][2 * step : 2 * step + 2]
    y = examples["y"][2 * step : 2 * step + 2]
    used += len(y)
    w, moments = adamw(w, moments, 2 * x.T @ (x @ w - y) / len(y))
  return w, moments, used


def by_hand(eta, mu):
  """The weights after each of the rounds, as the paper's algorithm says."""
  w, buf = np.array([0.5, -0.2, 0.1]), np.zeros(3)
  moments = {i: (0, np.zeros(3), np.zeros(3)) for i in ALL}
  result = []
  for ids in ROUNDS:
    outer, total = np.zeros(3), 0
    for i in ids:
      end, moments[i], used = inner_run(w, moments[i], i)
      outer, total = outer + used * (w - end), total + used
    outer = outer / total
    buf = mu * buf + outer
    w = w - eta * (outer + mu * buf)
    result.append(w)
  return result


@pytest.mark.parametrize(
  ("name", "eta", "mu"), [("diloco", 0.7, 0.9), ("photon", 1.0, 0.0)]
)
def test_three_rounds_of_an_elastic_run_equal_the_paper(name, eta, mu):
  with jax.enable_x64(True):
    states = run(name)
    for state, expected in zip(states[1:], by_hand(eta, mu)):
      np.testing.assert_allclose(state.trainable, expected, rtol=1e-11)
    # Every replica has counted its own inner steps, over rounds.
    np.testing.assert_array_equal(states[-1].clients[0].count, [4, 4, 3, 2])


def test_a_scalar_worked_by_hand():
  """Two replicas pull to 0 and 4 by SGD of rate 0.5, two steps a round.

  From w: the first ends at w / 4, the second at 4 + (w - 4) / 4. So D = w - (w
  + 6) / 4 = (3 w - 6) / 4.
    w = 1:       D = -0.75,      buf = -0.75,
      w <- 1 + 0.7 (0.75 + 0.9 * 0.75) = 1.9975
    w = 1.9975:  D = -0.001875,  buf = 0.9 * -0.75 - 0.001875 = -0.676875,
      w <- 1.9975 + 0.7 (0.001875 + 0.9 * 0.676875) = 2.42524375
  A pseudo-gradient of the wrong sign would go to 0.0025 first.
  """
  source = data.from_arrays(
    {"to 0": {"x": np.zeros((2, 1))}, "to 4": {"x": np.full((2, 1), 4.0)}}
  )

  def pull(w, base, batch, key):
    del base, key
    return jnp.sum(0.5 * (w - batch["x"][:, 0]) ** 2 * batch["mask"]), {}

  with jax.enable_x64(True):
    algorithm = algorithms.diloco(
      pull, client_optimizer=optax.sgd(0.5), num_clients=2
    )
    state = algorithm.init(jnp.asarray(1.0))
    round_fn = jax.jit(algorithm.round)
    cohort = data.pack(source, source.ids, batch_size=1, lanes=2, aligned=True)
    for expected in (1.9975, 2.42524375):
      state, metrics = round_fn(state, None, cohort)
      np.testing.assert_allclose(state.trainable, expected, rtol=1e-14)
    # The first step is eta (1 + mu) = 1.33 times the mean of the deltas.
    np.testing.assert_allclose((1.9975 - 1) / 0.75, 0.7 * 1.9, rtol=1e-14)


def test_one_replica_with_plain_averaging_is_the_plain_inner_run():
  with jax.enable_x64(True):
    states = run("photon", [ALL[:1]] * 3)
    w, moments = start(), ADAMW.init(start())
    batch = {"mask": np.ones(2)}
    for _ in range(3):
      for step in range(2):
        rows = slice(2 * step, 2 * step + 2)
        for name, x in SOURCE.read(ALL[0]).items():
          batch[name] = x[rows]
        gradient = jax.grad(loss, has_aux=True)(w, None, batch, None)[0]
        updates, moments = ADAMW.update(gradient, moments, w)
        w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(states[-1].trainable, w, rtol=1e-13)
    kept = jax.tree.map(lambda x: x[0], states[-1].clients)
    for got, expected in zip(jax.tree.leaves(kept), jax.tree.leaves(moments)):
      np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_layouts_agree_and_absent_replicas_keep_their_state():
  with jax.enable_x64(True):
    expected = run()
    for layout in (
      {"lanes": 4},
      {"lanes": 1},
      {"lanes": 3, "aligned": False},
    ):
      for state, other in zip(run(**layout), expected):
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(other)):
          np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-15)
    for before, after, ids in zip(expected, expected[1:], ROUNDS):
      for row, client_id in enumerate(ALL):
        rows = [
          reference.state_bytes(jax.tree.map(lambda x, r=row: x[r], s.clients))
          for s in (before, after)
        ]
        assert (rows[0] == rows[1]) == (client_id not in ids)


def test_a_replica_of_weight_zero_changes_nothing():
  with jax.enable_x64(True):
    states = run()
    round_fn = compiled()[1]
    cohort = reference.with_weights(pack(ALL), {3: 0})
    state, _ = round_fn(states[0], None, cohort)
    np.testing.assert_allclose(state.trainable, states[1].trainable, rtol=1e-13)
    rows = jax.tree.map(lambda x: x[3], (state.clients, states[0].clients))
    assert reference.state_bytes(rows[0]) == reference.state_bytes(rows[1])


def compiled_on_mesh(aligned):
  """The round on eight devices, a replica on each: (HLO, state, cohort)."""
  source = reference.mlp_source((4,) * 8, features=16)
  algorithm = algorithms.diloco(
    reference.mlp_loss, client_optimizer=ADAMW, num_clients=8
  )
  mesh = sharding.make_mesh({"clients": 8})
  replicated = jax.NamedSharding(mesh, jax.P())
  with jax.set_mesh(mesh):
    state = algorithm.init(reference.mlp_params(features=16, hidden=12))
    places = jax.tree.map(lambda x: replicated, state)
    row = jax.tree.map(lambda x: replicated, state.clients)
    rows = clients.store.shardings(mesh, row, 8)
    object.__setattr__(places, "clients", rows)
    state = jax.device_put(state, places)
    fast = {"xla_backend_optimization_level": "0"}
    round_fn = jax.jit(
      algorithm.round,
      out_shardings=(places, replicated),
      compiler_options=fast,
    )
    cohort = data.pack(
      source, source.ids, batch_size=2, lanes=8, aligned=aligned
    )
    arguments = (state, reference.mlp_base(), clients.put(cohort, mesh))
    program = round_fn.lower(*arguments).compile()
    if not aligned:
      return program.as_text(), None, None
    new, _ = program(*arguments)
  alone, _ = jax.jit(algorithm.round, compiler_options=fast)(
    jax.device_get(state), reference.mlp_base(), cohort
  )
  return program.as_text(), new, alone


@pytest.mark.slow
def test_kept_states_stay_on_their_devices():
  text, new, alone = compiled_on_mesh(aligned=True)
  moved = reference.sizes_of_collectives(text, reference.COLLECTIVES[1:])
  assert not moved
  error = reference.relative_error(
    new.trainable, alone.trainable, reference.mlp_params(16, 12)
  )
  assert error < 1e-5
  for x, y in zip(jax.tree.leaves(new.clients), jax.tree.leaves(alone.clients)):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7)
  # Any other layout moves the moments: the test above can fail.
  text, _, _ = compiled_on_mesh(aligned=False)
  moved = reference.sizes_of_collectives(text, reference.COLLECTIVES[1:])
  assert max(moved) == 8 * 16 * 12


def test_places_of_an_aligned_cohort():
  cohort = pack([ALL[3], ALL[0]], lanes=2)
  assert cohort.aligned and cohort.row.shape == (2, 2)
  np.testing.assert_array_equal(cohort.order[:2], [3, 0])
  np.testing.assert_array_equal(cohort.weight, [[1, 0], [0, 1]])
  np.testing.assert_array_equal(cohort.row, [[0, 0], [0, 3]])
  with pytest.raises(errors.ConfigError, match="lanes: got 3, .* 4 clients"):
    pack(ALL, lanes=3)
  algorithm = algorithms.diloco(loss, client_optimizer=ADAMW, num_clients=5)
  state = algorithm.init(jnp.zeros(3))
  with pytest.raises(errors.ConfigError, match="2 lanes and 2 slots .* 5 rows"):
    jax.eval_shape(algorithm.round, state, None, pack(ALL))


def test_states_need_a_population():
  with pytest.raises(errors.ConfigError, match="num_clients: got None"):
    algorithms.diloco(loss, client_optimizer=ADAMW)
