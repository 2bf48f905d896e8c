"""Deterministic rounds: the same bits on 1, 2, 4 or 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import tiny

from fedfm import (
  aggregators,
  algorithms,
  assembly,
  clients,
  data,
  errors,
  experiment,
  sharding,
)
from fedfm.clients import deterministic

SIZES = (*reference.SIZES, 5, 6)
RULES = {
  "mean": aggregators.weighted_mean(),
  # Its mean of two ranks is what XLA divides differently by mesh.
  "median": aggregators.median(),
}


def rounds(num_devices, rule, count=2):
  """Bytes of the state and of the metrics of each round, from a mesh."""
  source = reference.mlp_source(SIZES)
  algorithm = algorithms.fedadam(
    reference.mlp_loss,
    client_optimizer=optax.sgd(0.1),
    server_optimizer=optax.adam(0.01),
    aggregator=RULES[rule],
  )
  mesh = sharding.make_mesh(
    {"clients": num_devices}, jax.devices()[:num_devices]
  )
  everywhere = jax.sharding.NamedSharding(mesh, jax.P())
  base, params = jax.device_put(
    (reference.mlp_base(), reference.mlp_params()), everywhere
  )
  state = deterministic.on_one_device(algorithm.init, mesh)(params)
  run = deterministic.deterministic(algorithm.round, mesh)
  history = []
  for index in range(count):
    cohort = data.pack(
      source,
      source.ids,
      batch_size=reference.BATCH,
      epochs=2,
      lanes=8,
      shuffle=True,
      round=index,
    )
    state, metrics = run(state, base, clients.put(cohort, mesh))
    history.append(reference.state_bytes(metrics))
  assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
  return reference.state_bytes(state), history


SLOW = (pytest.mark.slow, pytest.mark.optimized)


@pytest.mark.parametrize(
  ("rule", "sizes"),
  [
    ("median", [2]),
    pytest.param("median", [4, 8], marks=SLOW),
    pytest.param("mean", [2, 4, 8], marks=SLOW),
  ],
)
def test_rounds_are_the_same_bits_on_any_mesh(rule, sizes):
  one = rounds(1, rule)
  for size in sizes:
    assert rounds(size, rule) == one


@pytest.mark.slow
def test_a_deterministic_round_is_the_round_to_rounding():
  source = reference.mlp_source()
  algorithm = algorithms.fedavg(
    reference.mlp_loss, client_optimizer=optax.sgd(0.1)
  )
  mesh = sharding.make_mesh({"clients": 1}, jax.devices()[:1])
  run = deterministic.deterministic(algorithm.round, mesh)
  cohort = data.pack(source, source.ids, batch_size=reference.BATCH, lanes=4)
  state, base = algorithm.init(reference.mlp_params()), reference.mlp_base()
  expected, expected_metrics = jax.jit(algorithm.round)(state, base, cohort)
  got, metrics = run(state, base, clients.put(cohort, mesh))
  error = reference.relative_error(
    got.trainable, expected.trainable, state.trainable
  )
  assert error < 1e-6
  assert metrics.keys() == expected_metrics.keys()
  for name, value in metrics.items():
    np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-4)


@pytest.mark.slow
def test_an_aligned_store_is_written_by_row():
  """Each client counts its rounds; those that are away keep their count."""

  def start(broadcast, client_state, info):
    return client_state

  def finish(broadcast, carry, info):
    zero = jnp.zeros(())
    metrics = {"loss_sum": zero, "count": zero, "delta_norm": zero}
    return broadcast, jnp.ones(()), carry + 1, metrics

  update = clients.local_update(reference.mlp_loss, optax.sgd(0.1))._replace(
    start=start, step=lambda carry, base, batch, key: carry, finish=finish
  )
  algorithm = algorithms.federated(
    update, client_state=lambda trainable: jnp.zeros(()), num_clients=8
  )
  source = reference.mlp_source()
  mesh = sharding.make_mesh({"clients": 2}, jax.devices()[:2])
  run = deterministic.deterministic(algorithm.round, mesh)
  state = deterministic.on_one_device(algorithm.init, mesh)(jnp.zeros(3))
  for index, ids in enumerate((source.ids, source.ids[2:5])):
    cohort = data.pack(
      source, ids, batch_size=4, lanes=4, aligned=True, round=index
    )
    state, _ = run(state, None, clients.put(cohort, mesh))
  assert state.clients.tolist() == [1, 1, 2, 2, 2, 1, 1, 1]


def test_two_cohorts_a_round_are_refused():
  algorithm = algorithms.fedavg(
    reference.mlp_loss, client_optimizer=optax.sgd(0.1)
  )

  def twice(state, base, cohort):
    return algorithm.round(
      algorithm.round(state, base, cohort)[0], base, cohort
    )

  mesh = sharding.make_mesh({"clients": 1}, jax.devices()[:1])
  source = reference.mlp_source()
  cohort = data.pack(source, source.ids, batch_size=4, lanes=1)
  state = algorithm.init(reference.mlp_params())
  with pytest.raises(errors.ConfigError, match="runs 2 cohorts a round"):
    deterministic.deterministic(twice, mesh)(
      state, reference.mlp_base(), clients.put(cohort, mesh)
    )


def on_devices(monkeypatch, count):
  """Makes experiments see only so many of the devices."""
  real = sharding.make_mesh

  def make_mesh(sizes=None, devices=None):
    return real(sizes, jax.devices()[:count] if devices is None else devices)

  monkeypatch.setattr(assembly.sharding, "make_mesh", make_mesh)


def config(folder, **changes):
  small = {
    "lanes": 8,
    "deterministic": True,
    "clients_per_round": 5,
    "adapter": {"rank": 2, "targets": ("q_proj",)},
    "client": {"optimizer": "adam", "learning_rate": 0.01},
    "eval": {"every": 1, "max_examples": 2},
  }
  return tiny.config(folder, **(small | changes))


@pytest.mark.slow
@pytest.mark.optimized
def test_an_elastic_run_is_the_same_bits(tmp_path, monkeypatch):
  """Stopped and resumed on other devices each round."""
  devices = (1, 2, 4, 8, 4, 2, 1)
  count = len(devices)
  with monkeypatch.context() as patch:
    on_devices(patch, 1)
    experiment.train(config(tmp_path, rounds=count), tmp_path / "whole")
  for rounds, num_devices in enumerate(devices, start=1):
    with monkeypatch.context() as patch:
      on_devices(patch, num_devices)
      experiment.train(config(tmp_path, rounds=rounds), tmp_path / "elastic")
  assert tiny.content(tmp_path / "elastic") == tiny.content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", ["ditto", "fedex_lora", "diloco"])
def test_algorithms_of_every_kind_are_the_same_bits(
  tmp_path, monkeypatch, name
):
  """With clients' own models, a base that changes, and aligned replicas."""
  changes = {"algorithm": name, "clients_per_round": 8, "rounds": 2}
  if name == "ditto":
    evals = {"every": 1, "max_examples": 2, "finetune_steps": 1}
    changes |= {"eval": evals, "client": {"optimizer": "sgd"}}
  contents = []
  for num_devices in (1, 4):
    with monkeypatch.context() as patch:
      on_devices(patch, num_devices)
      workdir = tmp_path / f"on {num_devices}"
      experiment.train(config(tmp_path, **changes), workdir)
    contents.append(tiny.content(workdir))
  assert contents[0] == contents[1]
  names = contents[0]["metrics"][-1]
  assert ("eval/seen/personal_loss" in names) == (name == "ditto")
  assert ("eval/seen/finetuned_loss" in names) == (name == "ditto")


def test_lanes_may_not_change(tmp_path, monkeypatch):
  on_devices(monkeypatch, 1)
  values = config(tmp_path, rounds=1)
  settings = experiment.as_settings(values)
  with experiment._claimed(settings, tmp_path / "run", None) as claim:
    claim.commit()
  with pytest.raises(errors.ConfigError, match="lanes: had 8, now 4"):
    experiment.train(values | {"lanes": 4}, tmp_path / "run")
