"""The round against a plain loop; padding, bad clients, and compilations."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from fedfm import adapters
from fedfm import aggregators
from fedfm import algorithms
from fedfm import data
from fedfm import models
from fedfm.clients import engine
from fedfm.types import ClientUpdate

IDS = reference.client_ids()
SOURCE = reference.mlp_source()
OPTIMIZERS = {"sgd": optax.sgd(0.1), "adam": optax.adam(0.02)}
TOLERANCE = {"sgd": 1e-5, "adam": 1e-4}
RULES = {
    "mean": aggregators.weighted_mean(),
    "median": aggregators.median(),
    "krum": aggregators.krum(2),
    "trimmed_mean": aggregators.trimmed_mean(1),
}


def pack(ids=IDS, source=SOURCE, lanes=2, **options):
  options = {"batch_size": reference.BATCH, "epochs": 2} | options
  return data.pack(source, ids, lanes=lanes, **options)


def mlp_round(cohort, optimizer="sgd", rule="mean", dtype=jnp.float32):
  """One jitted round of FedAvg on the MLP: (old state, new state, metrics)."""
  algorithm = algorithms.fedavg(
      reference.mlp_loss,
      client_optimizer=OPTIMIZERS[optimizer],
      aggregator=RULES[rule],
  )
  old = algorithm.init(reference.mlp_params(dtype=dtype))
  new, metrics = jax.jit(algorithm.round)(old, reference.mlp_base(dtype), cohort)
  return old, new, metrics


def mlp_loop(optimizer, rule, dtype=jnp.float32, source=SOURCE):
  """The same round, one client after the other, by hand."""
  params = reference.mlp_params(dtype=dtype)
  deltas = [
      reference.client_delta(
          reference.mlp_loss,
          OPTIMIZERS[optimizer],
          params,
          reference.mlp_base(dtype),
          source,
          client_id,
          epochs=2,
      )
      for client_id in IDS
  ]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *deltas)
  weights = jnp.asarray([source.size(i) for i in IDS], dtype)
  update = RULES[rule].aggregate(stacked, weights)
  return jax.tree.map(jnp.add, params, update)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES)
def test_round_equals_python_loop_for_any_lanes(rule, optimizer):
  expected = mlp_loop(optimizer, rule)
  for lanes in (1, 2, len(IDS)):
    old, new, _ = mlp_round(pack(lanes=lanes), optimizer, rule)
    error = reference.relative_error(
        new.trainable, expected, old.trainable
    )
    assert error < TOLERANCE[optimizer], lanes


@pytest.mark.parametrize("rule", RULES)
def test_round_equals_python_loop_in_float64(rule):
  with jax.enable_x64(True):
    source = reference.mlp_source(dtype=np.float64)
    expected = mlp_loop("adam", rule, jnp.float64, source)
    for lanes in (1, 3):
      cohort = pack(source=source, lanes=lanes)
      old, new, _ = mlp_round(cohort, "adam", rule, jnp.float64)
      assert new.trainable["in"][0].dtype == jnp.float64
      error = reference.relative_error(new.trainable, expected, old.trainable)
      assert error < 1e-10, lanes


def decoder(**options):
  sizes = dict(
      vocab_size=19, width=12, num_layers=2, num_heads=2, mlp_width=20
  )
  return models.decoder(models.DecoderConfig(**sizes, **options))


def text_source(sizes=(7, 3, 2, 1), length=6):
  clients = {}
  for index, size in enumerate(sizes):
    rng = np.random.default_rng(index)
    clients[f"client {index}"] = {
        "tokens": rng.integers(0, 19, (size, length)).astype(np.int32),
        "loss_mask": (rng.random((size, length)) < 0.8).astype(np.float32),
    }
  return data.from_arrays(clients)


def lora_round(model, params, lanes, source, trainable=None):
  adapter = adapters.lora(model, rank=2, targets=["q_proj", "up_proj"])
  loss = models.losses.language_model(adapters.loss_apply(adapter))
  algorithm = algorithms.fedavg(
      loss, client_optimizer=optax.sgd(0.5), weighting="tokens"
  )
  if trainable is None:
    trainable = adapter.init(jax.random.key(1), params)
  old = algorithm.init(trainable)
  cohort = pack(source.ids, source, lanes, batch_size=2)
  new, metrics = jax.jit(algorithm.round)(old, params, cohort)
  return loss, old, new, metrics


def test_lora_round_equals_python_loop():
  model, source = decoder(), text_source()
  params = jax.tree.map(lambda x: 5 * x, model.init(jax.random.key(0)))
  loss, old, new, metrics = lora_round(model, params, 2, source)
  deltas = [
      reference.client_delta(
          loss, optax.sgd(0.5), old.trainable, params, source, i,
          epochs=2, batch_size=2,
      )
      for i in source.ids
  ]  # fmt: skip
  tokens = np.asarray(
      [source.read(i)["loss_mask"][:, 1:].sum() for i in source.ids]
  )
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *deltas)
  mean = aggregators.weighted_mean().aggregate(stacked, jnp.asarray(tokens))
  expected = jax.tree.map(jnp.add, old.trainable, mean)
  error = reference.relative_error(new.trainable, expected, old.trainable)
  assert error < 1e-5
  assert metrics["train/count"] == 2 * tokens.sum()


def test_scanned_layers_equal_unrolled_in_a_round():
  source, scanned = text_source(), decoder()
  params = scanned.init(jax.random.key(0))
  _, old, one, _ = lora_round(scanned, params, 2, source)
  _, _, two, _ = lora_round(decoder(scan_layers=False), params, 2, source)
  error = reference.relative_error(
      one.trainable, two.trainable, old.trainable
  )
  assert error < 1e-5


def test_one_client_one_step_is_a_plain_optax_step():
  client = "client 3"  # One full batch.
  optimizer = optax.sgd(0.1)
  cohort = pack([client], lanes=1, epochs=1)
  old, new, _ = mlp_round(cohort)
  params, base = old.trainable, reference.mlp_base()
  key = jax.random.fold_in(jax.random.key(0), 0)
  for word in data.packing.id_hash(client):
    key = jax.random.fold_in(key, word)
  batch = SOURCE.read(client) | {"mask": jnp.ones(reference.BATCH)}
  grads, _ = jax.jit(jax.grad(reference.mlp_loss, has_aux=True))(
      params, base, batch, jax.random.fold_in(key, 0)
  )
  updates, _ = optimizer.update(grads, optimizer.init(params))
  expected = optax.apply_updates(params, updates)
  chex.assert_trees_all_close(new.trainable, expected, rtol=3e-6, atol=1e-7)


def poison(cohort, value, zero_weight=()):
  """Fills padding, and everything of some clients, with a value."""
  batches = {k: np.array(x) for k, x in cohort.batches.items()}
  owned = np.zeros(cohort.slot.shape, bool)
  for position in range(int(np.sum(cohort.order >= 0))):
    lane, steps = reference.rows_of(cohort, position)
    owned[lane, steps] = position not in zero_weight
  padded = (batches["mask"] == 0) | ~owned[:, :, None]
  for name in set(batches) - {"mask"}:
    batches[name][padded] = value
  fields = {}
  for name in ("row", "num_examples", "num_steps"):
    fields[name] = np.where(cohort.weight > 0, getattr(cohort, name), 77)
  fields["id_hash"] = np.where(
      cohort.weight[..., None] > 0, cohort.id_hash, np.uint32(99)
  )
  return dataclasses.replace(cohort, batches=batches, **fields)


@pytest.mark.parametrize("rule", ["mean", "median", "krum"])
def test_padding_and_absent_clients_change_no_bit(rule):
  cohort = pack(lanes=3)
  assert cohort.slot.shape[1] > cohort.boundaries[-1]  # There is padding.
  cohort = reference.with_weights(cohort, {2: 0, 5: 0})
  _, clean, _ = mlp_round(cohort, "adam", rule)
  for value in (1e6, np.nan, np.inf):
    dirty = poison(cohort, value, zero_weight=(2, 5))
    _, state, metrics = mlp_round(dirty, "adam", rule)
    assert reference.state_bytes(state) == reference.state_bytes(clean)
    assert metrics["clients/nonfinite"] == 0
    assert np.isfinite(metrics["train/loss"])
    assert metrics["clients/participating"] == len(IDS) - 2


def make_bad(cohort, positions):
  batches = {k: np.array(x) for k, x in cohort.batches.items()}
  for position in positions:
    lane, steps = reference.rows_of(cohort, position)
    batches["x"][lane, steps, 0] = np.nan
  return dataclasses.replace(cohort, batches=batches)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lanes", [1, 3])
def test_nan_client_is_masked_and_counted(rule, lanes):
  bad = (0, 4)  # The largest, which runs first, and one in between.
  rest = [i for p, i in enumerate(IDS) if p not in bad]
  # Krum and its like see the same clients, absent ones as empty rows.
  old, expected, _ = mlp_round(pack(rest, lanes=lanes), "sgd", rule)
  _, new, metrics = mlp_round(make_bad(pack(lanes=lanes), bad), "sgd", rule)
  assert metrics["clients/nonfinite"] == 2
  assert metrics["clients/participating"] == len(rest)
  assert np.isfinite(metrics["train/loss"])
  error = reference.relative_error(
      new.trainable, expected.trainable, old.trainable
  )
  assert error < 1e-5


def momentum_state(rule):
  """FedAvgM after one good round: its optimizer state is not zero."""
  algorithm = algorithms.fedavgm(
      reference.mlp_loss,
      client_optimizer=optax.sgd(0.1),
      aggregator=RULES[rule],
  )
  round_fn = jax.jit(algorithm.round)
  state = algorithm.init(reference.mlp_params())
  state, _ = round_fn(state, reference.mlp_base(), pack())
  return round_fn, state


@pytest.mark.parametrize("rule", RULES)
def test_round_without_a_good_client_changes_only_the_count(rule):
  round_fn, state = momentum_state(rule)
  before = reference.state_bytes(dataclasses.replace(state, round=0))
  all_bad = make_bad(pack(), range(len(IDS)))
  all_absent = reference.with_weights(pack(), dict.fromkeys(range(8), 0))
  for bad, cohort in ((8, all_bad), (0, all_absent), (0, pack([]))):
    after, metrics = round_fn(state, reference.mlp_base(), cohort)
    assert after.round == state.round + 1
    after_bytes = reference.state_bytes(dataclasses.replace(after, round=0))
    assert after_bytes == before
    assert metrics["clients/nonfinite"] == bad
    assert metrics["clients/participating"] == 0
    assert all(np.isfinite(x) for x in metrics.values())


def test_compiles_once_for_a_bucket():
  algorithm = algorithms.fedavg(
      reference.mlp_loss, client_optimizer=optax.sgd(0.1)
  )
  chex.clear_trace_counter()
  round_fn = jax.jit(chex.assert_max_traces(algorithm.round, n=1))
  state = algorithm.init(reference.mlp_params())
  cohorts = [IDS[:5], IDS[3:], [*IDS[5:], IDS[0]], IDS[::-1], IDS[:6]]
  for index, ids in enumerate(cohorts):
    cohort = pack(
        ids, step_buckets=[32], slot_buckets=[8], shuffle=True, round=index
    )
    if len(ids) < 5:  # Pads `order` to the size of the others.
      order = np.full(8, -1, np.int32)
      order[: len(ids)] = cohort.order[: len(ids)]
      cohort = dataclasses.replace(cohort, order=order)
    state, _ = round_fn(state, reference.mlp_base(), cohort)
  assert round_fn._cache_size() == 1
  assert state.round == len(cohorts)


def test_per_client_results_come_back_in_the_order_of_ids():
  def start(broadcast, client_state, info):
    return {"seen": jnp.zeros(()), "key": info.key, "state": client_state}

  def step(carry, base, batch, key):
    return carry | {"seen": carry["seen"] + jnp.sum(batch["mask"])}

  def finish(broadcast, carry, info):
    metrics = {"examples": info.num_examples, "seen": carry["seen"]}
    metrics["draw"] = jax.random.uniform(carry["key"])
    return {"w": carry["seen"]}, jnp.ones(()), carry["state"] + 1, metrics

  update = ClientUpdate(start, step, finish)
  results = []
  for lanes in (1, 3):
    cohort = reference.with_weights(pack(lanes=lanes), {6: 0})
    states = jnp.zeros(cohort.row.shape)
    result = jax.jit(
        lambda c, s: engine.run_cohort(
            update, aggregators.median(), (), {"w": jnp.zeros(())}, None, c, s,
            jax.random.key(0), jnp.zeros((), jnp.int32),
        )
    )(cohort, states)  # fmt: skip
    expected = [SOURCE.size(i) for i in IDS]
    np.testing.assert_array_equal(result.metrics["examples"], expected)
    np.testing.assert_array_equal(
        result.metrics["seen"], 2 * np.array(expected)
    )
    # A client of weight 0 is absent: its message and state stay as they were.
    here = np.arange(8) != 6
    np.testing.assert_array_equal(result.present, here)
    np.testing.assert_array_equal(
        result.collected[0]["w"], 2 * np.array(expected) * here
    )
    np.testing.assert_array_equal(result.client_states, cohort.weight > 0)
    results.append(np.asarray(result.metrics["draw"]))
  np.testing.assert_array_equal(*results)
  assert len(np.unique(results[0])) == len(IDS)
