"""What every algorithm by name must hold; see algorithm_cases for its options.

Of a new algorithm this checks the engine's side; that it is its paper's is for
a test of its own.
"""

import dataclasses
import functools

import algorithm_cases as cases
import algorithm_numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from fedfm import checkpoint, choices, clients, sharding
from fedfm.clients import engine

# Of LLVM, which takes most of the time of compiling.
_FAST = {"xla_backend_optimization_level": "0"}


@functools.cache
def compiled(name):
  """The algorithm, its round, and its state before and after each round."""
  algorithm = cases.build(name)
  round_fn = jax.jit(algorithm.round, compiler_options=_FAST)
  with jax.enable_x64(True):
    problem = cases.problem_of(name)
    states, metrics = [algorithm.init(problem.start(jnp.float64))], {}
    for ids in problem.rounds:
      state, metrics = round_fn(states[-1], problem.base, problem.pack(ids))
      states.append(state)
  return algorithm, round_fn, states, metrics


def run(name, cohort, state):
  _, round_fn, _, _ = compiled(name)
  with jax.enable_x64(True):
    return round_fn(state, cases.problem_of(name).base, cohort)[0]


def pack(name, change=lambda ids: ids, **layout):
  """The second round's cohort, its clients changed."""
  problem = cases.problem_of(name)
  return problem.pack(change(list(problem.rounds[1])), **layout)


def assert_same(state, expected, rtol=1e-9):
  """Compares whole states: weights, optimizers, clients, what else there is."""
  assert jax.tree.structure(state) == jax.tree.structure(expected)
  for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(expected)):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-12)


def spec(x):
  return x.shape, x.dtype


# Another's code with another default.
THIN = ("fedadagrad", "fedyogi", "fedbn", "reptile", "first_order_per_fedavg")


def by_names(names, slow=False):
  """Parametrizes a test; what takes long, or shows little more, is slow."""

  def row(name):
    is_slow = slow or name in THIN or cases.case_of(name).problem == "lora"
    return pytest.param(name, marks=pytest.mark.slow if is_slow else ())

  return pytest.mark.parametrize("name", [row(name) for name in names])


by_name = by_names(choices.ALGORITHMS)


@by_name
def test_rounds_are_finite_and_keep_shapes_and_dtypes(name):
  algorithm, round_fn, states, metrics = compiled(name)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(states))
  assert all(np.isfinite(x) and x.shape == () for x in metrics.values())
  specs = [jax.tree.map(spec, state) for state in states]
  assert specs[0] == specs[1] == specs[2]
  assert [state.round for state in states] == [0, 1, 2]
  assert round_fn._cache_size() == 1
  for before, after in zip(states, states[1:]):
    after = dataclasses.replace(after, round=before.round)
    assert (cases.flat(before) != cases.flat(after)).any()
  # Float32 stays float32, in everything that is remembered.
  problem = cases.problem_of(name)
  narrow = jax.eval_shape(lambda: algorithm.init(problem.start(jnp.float32)))
  base, cohort = jax.tree.map(
    lambda x: np.float32(x) if np.asarray(x).dtype == np.float64 else x,
    (problem.base, pack(name)),
  )
  after, _ = jax.eval_shape(algorithm.round, narrow, base, cohort)
  assert jax.tree.map(spec, narrow) == jax.tree.map(spec, after)
  up, down = algorithm.bytes_per_client(states[0])
  assert up > 0 and down > 0


@by_name
def test_a_client_alone_agrees_with_itself(name):
  """Its cosine with the mean is 1, whatever the server does or remembers."""
  _, round_fn, states, _ = compiled(name)
  problem = cases.problem_of(name)
  alone = pack(name, change=lambda ids: ids[:1])
  with jax.enable_x64(True):
    # Later rounds of FedDPA-F send nothing.
    state = states[0 if name == "feddpa_f" else -1]
    _, metrics = round_fn(state, problem.base, alone)
  np.testing.assert_allclose(metrics["drift/cosine"], 1, rtol=1e-6)
  np.testing.assert_allclose(metrics["drift/diversity"], 1, rtol=1e-6)
  assert metrics["drift/delta_norm"] == metrics["drift/delta_norm_max"] > 0


@by_names(algorithm_numpy.ROUNDS_OF)
def test_two_rounds_equal_the_paper_in_numpy(name):
  _, _, states, _ = compiled(name)
  for state, expected in zip(states[1:], algorithm_numpy.ROUNDS_OF[name]()):
    got = {"w": state.trainable, "clients": state.clients, "extra": state.extra}
    for part, value in expected.items():
      rows = len(value) if value.ndim == 2 else 1
      # Leaves come as b, w; by hand they are [w, b].
      leaves = [x.reshape(rows, -1) for x in jax.tree.leaves(got[part])[::-1]]
      np.testing.assert_allclose(
        np.concatenate(leaves, axis=1).reshape(value.shape),
        value,
        rtol=1e-10,
        atol=1e-12,
      )


@by_name
def test_init_copies_its_trainable(name):
  algorithm, _, _, _ = compiled(name)
  start = cases.problem_of(name).start(jnp.float32)
  state = algorithm.init(start)
  for leaf in jax.tree.leaves(state):
    leaf.delete()  # As donating the state does.
  assert np.isfinite(cases.flat(start)).all()


@by_name
def test_a_round_equals_a_python_loop_over_its_clients(name, monkeypatch):
  algorithm, _, states, _ = compiled(name)
  monkeypatch.setattr(engine, "run_cohort", reference.run_cohort_by_loop)
  base = cases.problem_of(name).base
  with jax.enable_x64(True):
    looped, _ = algorithm.round(states[1], base, pack(name))
  assert_same(looped, states[2])


@by_name
def test_the_order_of_clients_does_not_matter(name):
  _, _, states, _ = compiled(name)
  state = run(name, pack(name, lambda ids: ids[::-1]), states[1])
  assert_same(state, states[2])


@by_name
def test_a_client_of_weight_0_is_absent(name):
  _, _, states, _ = compiled(name)
  problem = cases.problem_of(name)
  more = pack(name, lambda ids: [*ids, problem.rest])
  count = len(problem.rounds[1])
  cohort = reference.with_weights(more, {count: 0})
  assert_same(run(name, cohort, states[1]), states[2])
  nobody = reference.with_weights(more, dict.fromkeys(range(count + 1), 0))
  after = run(name, nobody, states[1])
  after = dataclasses.replace(after, round=states[1].round)
  assert reference.state_bytes(after) == reference.state_bytes(states[1])


@by_name
def test_a_checkpoint_holds_the_whole_state(name, tmp_path):
  _, _, states, _ = compiled(name)
  # As NumPy's: Orbax's threads don't see that x64 is on here.
  first, second = jax.device_get(states[:2])
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, second)
    restored = checkpointer.restore(first)
  assert restored is not None
  again = run(name, pack(name), restored[1])
  assert reference.state_bytes(again) == reference.state_bytes(states[2])


by_name_slow = by_names(choices.ALGORITHMS, slow=True)


@by_name_slow
def test_one_lane_and_one_for_each_client_give_the_same_numbers(name):
  _, _, states, _ = compiled(name)
  for lanes in (1, 4):
    state = run(name, pack(name, lanes=lanes), states[1])
    assert_same(state, states[2])


@by_name_slow
def test_shards_give_the_same_numbers(name):
  algorithm, _, states, _ = compiled(name)
  mesh = sharding.make_mesh({"clients": 4, "fsdp": 2, "tensor": 1})
  with jax.enable_x64(True), jax.set_mesh(mesh):
    cohort = clients.put(pack(name, lanes=4), mesh)
    placed = jax.device_put(states[1], jax.NamedSharding(mesh, jax.P()))
    base = cases.problem_of(name).base
    round_fn = jax.jit(algorithm.round, compiler_options=_FAST)
    state, _ = round_fn(placed, base, cohort)
    assert_same(state, states[2])
