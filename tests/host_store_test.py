"""Client states on the host: rows, versions, damage, and rounds with them."""

import dataclasses
import os

import algorithm_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from store_states import (
  STATE,
  N,
  assert_equal,
  assert_is,
  initial,
  states_of,
)

from fedfm import adapters, clients, errors, models, sharding
from fedfm.blueprint import BUILTIN_MODEL
from fedfm.clients import hosted, store
from fedfm.clients.host_store import HostStore
from fedfm.models import families

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def test_rows_are_read_in_the_order_asked_for(opened_store):
  assert_is(opened_store.read, 3)
  got = opened_store.read(np.array([4, 5, 0]))
  expected = jax.tree.map(
    lambda *x: np.concatenate(x),
    states_of([4], 2),
    initial(1),
    states_of([0], 3),
  )
  assert_equal(got, expected)
  assert_equal(
    opened_store.read(np.zeros(0, int)),
    jax.tree.map(
      lambda x: np.zeros((0, *np.shape(x)), np.asarray(x).dtype), STATE
    ),
  )
  assert_equal(opened_store.initial, STATE)


@pytest.mark.parametrize("version", [3, 2, 1, 0])
def test_a_store_goes_back_to_any_version(opened_store, tmp_path, version):
  assert_is(lambda rows: opened_store.read(rows, version), version)
  assert_is(opened_store.read, 3)
  opened_store.roll_back(version)
  assert_is(opened_store.read, version)
  opened_store.roll_back(version)  # Nothing is left to undo.
  # Another process, and other rounds after.
  again = HostStore(tmp_path / "store", STATE, N)
  again.write([5], states_of([5], 9), 9)
  again.roll_back(version)
  assert_is(again.read, version)


def test_what_is_kept_bounds_how_far_back(tmp_path):
  oldest = {"version": 0}
  made = HostStore(
    tmp_path / "store", STATE, N, oldest=lambda: oldest["version"]
  )
  for version in (1, 2, 3):
    made.write([version], states_of([version], version), version)
  oldest["version"] = 2
  made.write([4], states_of([4], 4), 4)
  with pytest.raises(errors.CheckpointError) as error:
    made.roll_back(1)
  reference.check_message(error.value, ["version 1", "oldest", "is 2"])
  for copy in ("first", "second"):
    logs = (tmp_path / "store" / copy / "logs").iterdir()
    assert sorted(p.name for p in logs) == ["3", "4"]
  made.roll_back(2)
  assert_equal(
    made.read([1, 2]),
    jax.tree.map(
      lambda *x: np.concatenate(x), states_of([1], 1), states_of([2], 2)
    ),
  )
  assert_equal(made.read([3, 4]), initial(2))
  # Version 0 is a new store, whatever is known.
  made.roll_back(0)
  assert_equal(made.read(np.arange(N)), initial(N))
  made.write([1], states_of([1], 1), 1)
  assert_equal(made.read([1]), states_of([1], 1))


@pytest.mark.parametrize(
  ("state", "count"),
  [
    (STATE, N + 1),
    (STATE | {"a": np.zeros((3, 2), np.float32)}, N),
    (STATE | {"a": np.zeros((2, 3), np.float16)}, N),
    ({"a": STATE["a"]}, N),
  ],
)
def test_the_store_of_another_run_is_refused(
  opened_store, tmp_path, state, count
):
  with pytest.raises(errors.CheckpointError) as error:
    HostStore(tmp_path / "store", state, count)
  reference.check_message(error.value, ["store", "num_clients", "expected"])


def test_a_folder_that_is_no_store(tmp_path):
  (tmp_path / "store").write_text("a file")
  for read_only in (False, True):
    with pytest.raises(errors.CheckpointError) as error:
      HostStore(tmp_path / "store", STATE, N, read_only=read_only)
    reference.check_message(error.value, ["store"])
  with pytest.raises(errors.CheckpointError):
    HostStore(tmp_path / "nothing", STATE, N, read_only=True)
  assert not (tmp_path / "nothing").exists()


def pack(problem, ids):
  """A cohort in float32."""
  return jax.tree.map(
    lambda x: x.astype(np.float32) if x.dtype == np.float64 else x,
    problem.pack(ids, lanes=4),
  )


def hosted_rounds(name, folder):
  """Rounds of an algorithm with its clients on the host, on all devices."""
  algorithm, problem = cases.build(name), cases.problem_of(name)
  mesh = sharding.make_mesh({"clients": 4, "fsdp": 2, "tensor": 1})
  start = problem.start(jnp.float32)
  new = jax.device_get(algorithm.client_state(start))
  host = HostStore(folder, new, problem.num_clients)

  def init():
    everywhere = jax.NamedSharding(mesh, jax.P())
    state = jax.device_put(algorithm.init(start), everywhere)
    return dataclasses.replace(state, clients=np.zeros((), np.int32))

  run = hosted.hosted(jax.jit(algorithm.round), host, mesh)

  def run_round(state, ids):
    with jax.set_mesh(mesh):
      cohort = clients.put(pack(problem, ids), mesh)
      return run(state, problem.base, cohort)[0]

  return algorithm, host, init, run_round


@pytest.mark.slow
def test_rounds_equal_those_with_a_store_on_the_devices(tmp_path):
  name = "scaffold"
  algorithm, host, init, run_round = hosted_rounds(name, tmp_path / "store")
  problem = cases.problem_of(name)
  read = []
  real = host.read
  host.read = lambda rows, **options: (
    read.extend(rows),
    real(rows, **options),
  )[1]
  expected = algorithm.init(problem.start(jnp.float32))
  plain = jax.jit(algorithm.round)
  states = [init()]
  for ids in problem.rounds:
    expected, _ = plain(expected, problem.base, pack(problem, ids))
    states.append(run_round(states[-1], ids))
  rows = [cases.IDS.index(i) for ids in problem.rounds for i in ids]
  assert sorted(read) == sorted(rows)  # Those of the cohorts and no others.
  last = states[-1]
  assert last.clients == 2 and last.clients.dtype == np.int32
  for got, want in (
    (last.trainable, expected.trainable),
    (last.extra, expected.extra),
    (real(np.arange(problem.num_clients)), expected.clients),
  ):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)
  # A state of an earlier round takes the store along: the same bits again.
  stored = real(np.arange(problem.num_clients))
  again = run_round(states[1], problem.rounds[1])
  assert reference.state_bytes(again) == reference.state_bytes(last)
  restored = real(np.arange(problem.num_clients))
  assert reference.state_bytes(restored) == reference.state_bytes(stored)
  run_round(init(), problem.rounds[0])
  after_one = real(np.arange(problem.num_clients))
  untouched = cases.IDS.index(problem.rounds[1][0])
  assert not np.any(after_one["w"][untouched])


def test_slots_stand_in_for_a_store():
  cohort = cases.pack(cases.IDS[:3])
  slots = store.InSlots({"x": jnp.zeros((*cohort.row.shape, 2))})
  assert store.gather(slots, cohort) is slots.states
  new = {"x": np.ones((*cohort.row.shape, 2), np.float64)}
  after = store.scatter(slots, cohort, jax.tree.map(jnp.asarray, new))
  np.testing.assert_array_equal(after.states["x"], new["x"])
  assert after.states["x"].dtype == slots.states["x"].dtype


@pytest.mark.slow
def test_a_hundred_thousand_adapters_take_the_space_of_those_that_trained(
  tmp_path,
):
  """Of the model that ships, LoRA of rank 2: a few of 100,000 take part."""
  _, config = families.read_config(BUILTIN_MODEL / "config.json")
  model = models.decoder(config)
  adapter = adapters.lora(model, rank=2, targets=["q_proj", "v_proj"])
  trainable = adapter.init(jax.random.key(0), model.init(jax.random.key(1)))
  new = jax.device_get(trainable)
  count = 100_000
  oldest = {"version": 0}
  host = HostStore(
    tmp_path / "store", new, count, oldest=lambda: oldest["version"]
  )
  size = sum(x.nbytes for x in jax.tree.leaves(new))
  rng = np.random.default_rng(0)
  for version in range(1, 21):
    oldest["version"] = version
    rows = np.sort(rng.choice(count, 16, replace=False))
    states = host.read(rows)
    host.write(rows, jax.tree.map(lambda x: x + 1, states), version)
  for copy in ("first", "second"):
    file = os.stat(tmp_path / "store" / copy / "rows")
    assert file.st_size > count * size  # Nearly all of it a hole.
    assert file.st_blocks * 512 < 20 * 16 * (size + 2 * 4096) * 1.1
  moved = jax.tree.leaves(host.read(rows))[0] - jax.tree.leaves(new)[0]
  np.testing.assert_allclose(moved, 1, rtol=1e-6)
  host.roll_back(0)
  back = jax.tree.leaves(host.read(rows))[0]
  np.testing.assert_array_equal(back, np.stack([jax.tree.leaves(new)[0]] * 16))
