"""The round against a plain loop; padding, bad clients, and compilations."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from fedfm import (
  adapters,
  aggregators,
  algorithms,
  clients,
  data,
  models,
  trees,
)
from fedfm.clients import engine
from fedfm.types import ClientUpdate

IDS = reference.client_ids()
SOURCE = reference.mlp_source()
OPTIMIZERS = {"sgd": optax.sgd(0.1), "adam": optax.adam(0.02)}
TOLERANCE = {"sgd": 1e-5, "adam": 1e-4}
STACKING = {
  "median": aggregators.median(),
  "krum": aggregators.krum(1),
  "trimmed_mean": aggregators.trimmed_mean(1),
}
RULES = STACKING | {"mean": aggregators.weighted_mean()}


def pack(ids=IDS, source=SOURCE, lanes=3, **options):
  """Packs two epochs; buffers are always of the same size."""
  options = {
    "batch_size": reference.BATCH,
    "epochs": 2,
    "step_buckets": [32],
    "slot_buckets": [len(IDS)],
  } | options
  return data.pack(source, ids, lanes=lanes, **options)


@functools.cache
def compiled(optimizer, rule):
  """FedAvgM on the MLP; the first round is FedAvg's."""
  algorithm = algorithms.fedavgm(
    reference.mlp_loss,
    client_optimizer=OPTIMIZERS[optimizer],
    aggregator=RULES[rule],
  )
  return algorithm.init, jax.jit(algorithm.round)


def mlp_round(cohort, optimizer="sgd", rule="mean", dtype=jnp.float32):
  """One round on the MLP: (old state, new state, metrics)."""
  init, round_fn = compiled(optimizer, rule)
  old = init(reference.mlp_params(dtype=dtype))
  new, metrics = round_fn(old, reference.mlp_base(dtype), cohort)
  return old, new, metrics


def loop_deltas(optimizer, dtype=jnp.float32, source=SOURCE):
  """All clients' deltas, one client after the other, stacked."""
  deltas = [
    reference.client_delta(
      reference.mlp_loss,
      OPTIMIZERS[optimizer],
      reference.mlp_params(dtype=dtype),
      reference.mlp_base(dtype),
      source,
      client_id,
      epochs=2,
    )
    for client_id in IDS
  ]
  return jax.tree.map(lambda *x: np.stack(x), *deltas)


def loop_mean(optimizer, dtype=jnp.float32, source=SOURCE):
  """The mean of the deltas, weighted by examples, in float64."""
  sizes = np.array([source.size(i) for i in IDS], np.float64)
  return jax.tree.map(
    lambda x: np.tensordot(sizes / sizes.sum(), x.astype(np.float64), 1),
    loop_deltas(optimizer, dtype, source),
  )


def update_of(old, new):
  return jax.tree.map(lambda a, b: b - a, old.trainable, new.trainable)


def error_of(update, expected):
  """Relative error of an update."""
  zero = jax.tree.map(np.zeros_like, expected)
  return reference.relative_error(update, expected, zero)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_round_equals_python_loop_for_any_lanes(optimizer):
  expected = loop_mean(optimizer)
  for lanes in (1, 2, len(IDS)) if optimizer == "sgd" else (3,):
    old, new, _ = mlp_round(pack(lanes=lanes), optimizer)
    assert error_of(update_of(old, new), expected) < TOLERANCE[optimizer], lanes


def test_round_equals_python_loop_in_float64():
  with jax.enable_x64(True):
    source = reference.mlp_source(dtype=np.float64)
    expected = loop_mean("adam", jnp.float64, source)
    cohort = pack(source=source)
    old, new, _ = mlp_round(cohort, "adam", dtype=jnp.float64)
    assert new.trainable["in"][0].dtype == jnp.float64
    assert error_of(update_of(old, new), expected) < 1e-10


def stacked_messages(cohort, dtype=jnp.float32):
  """What a stacking aggregator gets: (messages, weights)."""
  update = clients.local_update(reference.mlp_loss, OPTIMIZERS["sgd"])

  @jax.jit
  def run(broadcast, base, cohort):
    return engine.run_cohort(
        update, aggregators.median(), (), broadcast, base, cohort, (),
        jax.random.key(0), jnp.zeros((), jnp.int32),
    ).collected  # fmt: skip

  return run(
    reference.mlp_params(dtype=dtype), reference.mlp_base(dtype), cohort
  )


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, pytest.param(64, marks=pytest.mark.slow)])
def test_stacked_messages_equal_python_loop(bits):
  with jax.enable_x64(bits == 64):
    dtype = jnp.dtype(f"float{bits}")
    source = reference.mlp_source(dtype=dtype)
    expected = loop_deltas("sgd", dtype, source)
    sizes = np.array([source.size(i) for i in IDS], dtype)
    for lanes in (1, len(IDS)) if bits == 32 else (3,):
      messages, weights = stacked_messages(
        pack(source=source, lanes=lanes), dtype
      )
      np.testing.assert_array_equal(weights, sizes)
      limit = 1e-5 if bits == 32 else 1e-10
      assert error_of(messages, expected) < limit, lanes
      for name, rule in STACKING.items():
        got = rule.aggregate(messages, weights)
        want = rule.aggregate(expected, jnp.asarray(sizes))
        assert error_of(got, want) < limit, (lanes, name)


@pytest.mark.parametrize("rule", STACKING)
def test_round_with_stacking_aggregator_adds_its_aggregate(rule):
  expected = RULES[rule].aggregate(loop_deltas("sgd"), jnp.ones(len(IDS)))
  old, new, _ = mlp_round(pack(), "sgd", rule)
  assert error_of(update_of(old, new), expected) < 1e-5


def decoder(**options):
  sizes = {"vocab_size": 19, "width": 12, "num_layers": 2, "num_heads": 2}
  return models.decoder(models.DecoderConfig(**sizes, mlp_width=20, **options))


def text_source(sizes=(7, 3, 2, 1), length=6):
  arrays = {}
  for index, size in enumerate(sizes):
    rng = np.random.default_rng(index)
    arrays[f"client {index}"] = {
      "tokens": rng.integers(0, 19, (size, length)).astype(np.int32),
      "loss_mask": (rng.random((size, length)) < 0.8).astype(np.float32),
    }
  return data.from_arrays(arrays)


@pytest.mark.slow
def test_lora_round_equals_python_loop_scanned_and_unrolled():
  source = text_source()
  updates = []
  for scan_layers in (True, False):
    model = decoder(scan_layers=scan_layers)
    # Well conditioned: a larger start makes rounding grow from step to step.
    params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))
    adapter = adapters.lora(model, rank=2, targets=["q_proj", "up_proj"])
    loss = models.losses.language_model(adapters.loss_apply(adapter))
    algorithm = algorithms.fedavg(
      loss, client_optimizer=OPTIMIZERS["sgd"], weighting="tokens"
    )
    old = algorithm.init(adapter.init(jax.random.key(1), params))
    cohort = pack(source.ids, source, 2, batch_size=2)
    round_fn = jax.jit(
      algorithm.round, compiler_options={"xla_backend_optimization_level": "0"}
    )
    new, metrics = round_fn(old, params, cohort)
    updates.append(update_of(old, new))
  assert error_of(*updates) < 1e-5
  deltas = [
      reference.client_delta(
          loss, OPTIMIZERS["sgd"], old.trainable, params, source, i,
          epochs=2, batch_size=2,
      )
      for i in source.ids
  ]  # fmt: skip
  tokens = np.array(
    [source.read(i)["loss_mask"][:, 1:].sum() for i in source.ids]
  )
  assert metrics["train/count"] == 2 * tokens.sum()
  expected = jax.tree.map(
    lambda *x: np.tensordot(tokens / tokens.sum(), np.stack(x), 1), *deltas
  )
  assert error_of(updates[0], expected) < 1e-5


@pytest.mark.slow
def test_one_client_one_step_is_a_plain_optax_step():
  client_id = "client 3"  # One full batch.
  optimizer = OPTIMIZERS["sgd"]
  old, new, metrics = mlp_round(pack([client_id], epochs=1, lanes=1))
  params, base = old.trainable, reference.mlp_base()
  batch = SOURCE.read(client_id) | {"mask": jnp.ones(reference.BATCH)}
  (loss, _), grads = jax.value_and_grad(reference.mlp_loss, has_aux=True)(
    params, base, batch, None
  )
  updates, _ = optimizer.update(grads, optimizer.init(params))
  expected = optax.apply_updates(params, updates)
  chex.assert_trees_all_close(new.trainable, expected, rtol=3e-6, atol=1e-7)
  np.testing.assert_allclose(metrics["train/loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(
    metrics["update/norm"], trees.norm(updates), rtol=1e-5
  )


def poison(cohort, value, absent=()):
  """Fills padding, and everything of absent clients, with a value."""
  batches = {k: np.array(x) for k, x in cohort.batches.items()}
  owned = np.zeros(cohort.slot.shape, bool)
  for position in range(int(np.sum(cohort.order >= 0))):
    lane, steps = reference.rows_of(cohort, position)
    owned[lane, steps] = position not in absent
  padded = (batches["mask"] == 0) | ~owned[:, :, None]
  for name in set(batches) - {"mask"}:
    batches[name][padded] = value
  here = cohort.weight > 0
  fields = {
    name: np.where(here, getattr(cohort, name), 77)
    for name in ("row", "num_examples", "num_steps")
  }
  id_hash = np.where(here[..., None], cohort.id_hash, np.uint32(99))
  return dataclasses.replace(cohort, batches=batches, id_hash=id_hash, **fields)


@pytest.mark.parametrize("rule", ["mean", "krum"])
def test_padding_and_absent_clients_change_no_bit(rule):
  absent = (2, 5)
  cohort = reference.with_weights(pack(), dict.fromkeys(absent, 0))
  assert cohort.slot.shape[1] > cohort.boundaries[-1]  # There is padding.
  _, clean, clean_metrics = mlp_round(cohort, "sgd", rule)
  for value in (1e6, np.nan, np.inf):
    dirty = poison(cohort, value, absent)
    _, state, metrics = mlp_round(dirty, "sgd", rule)
    assert reference.state_bytes(state) == reference.state_bytes(clean)
    assert reference.state_bytes(metrics) == reference.state_bytes(
      clean_metrics
    )
  assert clean_metrics["clients/nonfinite"] == 0
  assert clean_metrics["clients/participating"] == len(IDS) - len(absent)


def make_bad(cohort, positions):
  """Puts a NaN into a feature of every example of some clients."""
  batches = {k: np.array(x) for k, x in cohort.batches.items()}
  for position in positions:
    lane, steps = reference.rows_of(cohort, position)
    batches["x"][lane, steps, :, 0] = np.nan
  return dataclasses.replace(cohort, batches=batches)


@pytest.mark.parametrize("rule", RULES)
def test_nan_client_is_masked_and_counted(rule):
  bad = (0, 4)  # The largest, which runs first, and one in between.
  rest = [i for p, i in enumerate(IDS) if p not in bad]
  old, expected, _ = mlp_round(pack(rest), "sgd", rule)
  _, new, metrics = mlp_round(make_bad(pack(), bad), "sgd", rule)
  assert metrics["clients/nonfinite"] == 2
  assert metrics["clients/participating"] == len(rest)
  assert all(np.isfinite(x) for x in metrics.values())
  assert error_of(update_of(old, new), update_of(old, expected)) < 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_round_without_a_good_client_changes_only_the_count(rule):
  _, state, _ = mlp_round(pack(), "sgd", rule)  # Leaves momentum behind.
  _, round_fn = compiled("sgd", rule)
  before = reference.state_bytes(dataclasses.replace(state, round=0))
  all_bad = make_bad(pack(), range(len(IDS)))
  all_absent = reference.with_weights(pack(), dict.fromkeys(range(8), 0))
  cohorts = [(8, all_bad), (0, all_absent), (0, pack([]))]
  if RULES[rule].min_clients > 2:  # Too few for what the rule promises.
    few = reference.with_weights(pack(), dict.fromkeys(range(6), 0))
    cohorts.append((0, few))
  for bad, cohort in cohorts:
    after, metrics = round_fn(state, reference.mlp_base(), cohort)
    assert after.round == state.round + 1
    after_bytes = reference.state_bytes(dataclasses.replace(after, round=0))
    assert after_bytes == before
    assert metrics["clients/nonfinite"] == bad
    assert metrics["clients/participating"] <= 2
    assert metrics["update/norm"] == 0
    assert all(np.isfinite(x) for x in metrics.values())


def test_compiles_once_for_a_bucket():
  algorithm = algorithms.fedavg(
    reference.mlp_loss, client_optimizer=optax.sgd(0.1)
  )
  chex.clear_trace_counter()
  round_fn = jax.jit(chex.assert_max_traces(algorithm.round, n=1))
  state = algorithm.init(reference.mlp_params())
  cohorts = [IDS[:5], IDS[3:], [*IDS[4:], IDS[0]], IDS[::-1], IDS[:6]]
  for index, ids in enumerate(cohorts):
    cohort = pack(ids, shuffle=True, round=index)
    state, _ = round_fn(state, reference.mlp_base(), cohort)
  assert round_fn._cache_size() == 1
  assert state.round == len(cohorts)


def test_results_and_keys_of_clients_do_not_depend_on_lanes():
  def start(broadcast, client_state, info):
    zero = jnp.zeros(())
    draws = {"of_steps": zero, "key": info.key}
    return draws | {"seen": zero, "state": client_state}

  def step(carry, base, batch, key):
    return carry | {
      "seen": carry["seen"] + jnp.sum(batch["mask"]),
      "of_steps": 0.5 * carry["of_steps"] + jax.random.uniform(key),
    }

  def finish(broadcast, carry, info):
    metrics = {"examples": info.num_examples, "of_steps": carry["of_steps"]}
    metrics["of_client"] = jax.random.uniform(carry["key"])
    return {"w": carry["seen"]}, jnp.ones(()), carry["state"] + 1, metrics

  update = ClientUpdate(start, step, finish)
  for lanes in (1, 3):
    cohort = reference.with_weights(pack(lanes=lanes), {6: 0})
    result = jax.jit(
        lambda c, s: engine.run_cohort(
            update, aggregators.median(), (), {"w": jnp.zeros(())}, None, c, s,
            jax.random.key(5), jnp.asarray(9),
        )
    )(cohort, jnp.zeros(cohort.row.shape))  # fmt: skip
    sizes = np.array([SOURCE.size(i) for i in IDS])
    # A client of weight 0 is absent: no message, and its state stays.
    here = np.arange(8) != 6
    np.testing.assert_array_equal(result.metrics["examples"], sizes)
    np.testing.assert_array_equal(result.present, here)
    np.testing.assert_array_equal(result.weights, here)
    np.testing.assert_array_equal(result.collected[0]["w"], 2 * sizes * here)
    np.testing.assert_array_equal(result.client_states, cohort.weight > 0)
    for position, client_id in enumerate(IDS):
      key, expected = reference.client_key(client_id, 9, 5), 0.0
      np.testing.assert_array_equal(
        result.metrics["of_client"][position], jax.random.uniform(key)
      )
      for index in range(2 * -(-sizes[position] // reference.BATCH)):
        draw = jax.random.uniform(jax.random.fold_in(key, index))
        expected = 0.5 * expected + draw
      np.testing.assert_allclose(
        result.metrics["of_steps"][position], expected, rtol=1e-5
      )


@pytest.mark.slow
def test_bfloat16_messages_are_averaged_in_float32():
  """A bfloat16 stops counting at 256; neither lanes nor clients are lost."""
  source = data.from_arrays(
    {f"c{i}": {"x": np.ones((1, 1), np.float32)} for i in range(600)}
  )

  def loss(w, base, batch, key):
    return jnp.sum(w.astype(jnp.float32)) * jnp.sum(batch["x"]), {}

  algorithm = algorithms.fedavg(loss, client_optimizer=optax.sgd(0.5))
  start = algorithm.init(jnp.zeros(3, jnp.bfloat16))
  for lanes in (1, 8):
    cohort = data.pack(source, source.ids, batch_size=1, lanes=lanes)
    state, _ = jax.jit(algorithm.round)(start, None, cohort)
    assert state.trainable.dtype == jnp.bfloat16
    np.testing.assert_array_equal(state.trainable, -0.5)
