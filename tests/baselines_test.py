"""The baselines against loops written by hand, and against each other."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import tiny

from fedfm import baselines, data, errors, experiment

STEPS = 5


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """Four training clients, the first with fewer rows than the second."""
  folder = tmp_path_factory.mktemp("tiny")
  tiny.write_data(folder / "data.jsonl", 5)
  config = tiny.config(
    folder,
    clients_per_round=2,
    client={
      "optimizer": "adam",
      "learning_rate": 0.02,
      "schedule": "linear",
      "batch_size": 3,
      "clip_norm": 1.0,
    },
  )
  with tiny.one_device():
    return experiment.build(config)


def by_hand(built, batches):
  """Trains on batches one by one, in the plainest way."""
  rate = optax.schedules.linear_schedule(0.02, 0.0, STEPS)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
  trainable = jax.device_get(built.trainable)
  base, state = jax.device_get(built.base), tx.init(trainable)

  @jax.jit
  def step(trainable, state, base, batch):
    grads = jax.grad(lambda t: built.loss(t, base, batch, None)[0])(trainable)
    updates, state = tx.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state

  for batch in batches:
    trainable, state = step(trainable, state, base, batch)
  return trainable


def test_each_client_trains_alone(built):
  ids = built.data.train.ids
  stacked = jax.device_get(baselines.local_only(built, ids, STEPS))
  sizes = [built.data.train.size(i) for i in ids]
  assert min(sizes) < max(sizes)
  for index, client_id in enumerate(ids):
    packed = data.pack(
      built.data.train,
      [client_id],
      batch_size=3,
      epochs=STEPS,
      local_steps=STEPS,
      shuffle=True,
      lanes=1,
    )
    batches = [
      {name: x[0, t] for name, x in packed.batches.items()}
      for t in range(STEPS)
    ]
    alone = by_hand(built, batches)
    assert all(np.any(x["b"]) for x in alone.values())
    jax.tree.map(
      lambda x, y, i=index: np.testing.assert_allclose(
        x, y[i], rtol=1e-4, atol=1e-6
      ),
      alone,
      stacked,
    )


def test_centralized_goes_through_all_rows(built):
  source = built.data.train
  rows = [source.read(i) for i in source.ids]
  pool = {k: np.concatenate([x[k] for x in rows]) for k in rows[0]}
  num_rows = len(pool["tokens"])
  epoch = -(-num_rows // 3)
  shuffled = list(baselines._shuffled(num_rows, 3, 2 * epoch, seed=0))
  order = np.concatenate(shuffled)
  assert sorted(order[:num_rows]) == list(range(num_rows))
  second = order[num_rows : 2 * num_rows]
  assert len(set(second)) == len(second) and list(second) != list(order)
  batches = [
    {k: x[i] for k, x in pool.items()} | {"mask": np.ones(3, np.float32)}
    for i in shuffled[:STEPS]
  ]
  expected = by_hand(built, batches)
  got = baselines.centralized(built, STEPS)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
    expected,
    got,
  )


@pytest.mark.slow
def test_each_is_evaluated_on_its_own_text(built):
  ids = [built.data.train.ids[i] for i in (2, 0, 3, 1)]
  stacked = baselines.local_only(built, ids, STEPS)
  ids, stacked = ids[:3], jax.tree.map(lambda x: x[:3], stacked)
  got = baselines.evaluate_each(built, ids, stacked)
  own, unseen = [], []
  for index, client_id in enumerate(ids):
    trainable = jax.tree.map(lambda x, i=index: x[i], stacked)
    sums = built.evaluate_clients(trainable)
    row = sums["seen"]["ids"].index(client_id)
    own.append(sums["seen"]["loss_sum"][row] / sums["seen"]["tokens"][row])
    unseen.append(sums["unseen"]["loss_sum"] / sums["unseen"]["tokens"])
  assert got["eval/seen/loss"] == pytest.approx(np.mean(own), rel=1e-5)
  assert got["eval/unseen/loss"] == pytest.approx(np.mean(unseen), rel=1e-5)
  assert set(got) == set(built.evaluate(built.trainable))


def test_eight_devices_give_the_same(built):
  ids = built.data.train.ids
  expected = baselines.local_only(built, ids, STEPS)
  got = baselines.local_only(experiment.build(built.settings), ids, STEPS)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
    got,
    expected,
  )


def test_a_client_that_diverges_keeps_the_initial_weights(built, caplog):
  broken = jax.tree.map(lambda x: x * np.nan, built.base)
  ids = built.data.train.ids
  spoiled = dataclasses.replace(built, base=broken)
  stacked = baselines.local_only(spoiled, ids, STEPS)
  assert "4 clients were not finite" in caplog.text
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x, np.stack([y] * 4)),
    stacked,
    built.trainable,
  )


@pytest.mark.parametrize("steps", [0, -3])
def test_bad_steps_are_named(built, steps):
  with pytest.raises(errors.ConfigError, match=f"local_steps: got {steps}"):
    baselines.local_only(built, built.data.train.ids, steps)
  with pytest.raises(errors.ConfigError, match=f"num_steps: got {steps}"):
    baselines.centralized(built, steps)


def test_unknown_client_is_named(built):
  with pytest.raises(errors.DataError, match="nobody"):
    baselines.local_only(built, ["nobody"], 1)
