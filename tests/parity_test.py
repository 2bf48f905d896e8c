"""Packing, buckets, microbatches, tiles and chunks together change no number.

What must hold of a round holds with them on: any lanes and any mesh are a plain
Python loop of plain steps, padding is never read, a run resumes to its bits,
and two processes are one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import tiny

from fedfm import (
  adapters,
  algorithms,
  blueprint,
  clients,
  data,
  experiment,
  models,
  sharding,
)
from fedfm.models import attention
from fedfm.models.flash_attention import flash_attention

LENGTH, BATCH = 10, 4
SIZES = (13, 4, 9, 3, 2, 2, 1, 6)
CASES = {
  "tiles": {"tiles": True},
  "microbatches": {"parts": 2},
  "chunks": {"chunk": 3},
  "all": {"tiles": True, "parts": 2, "chunk": 3},
}
OPTIMIZERS = {"sgd": optax.sgd(0.1), "adam": optax.adam(0.01)}
FAST_COMPILE = {"xla_backend_optimization_level": "0"}
slow = pytest.mark.slow


def make_source():
  def client(size, seed):
    rng = np.random.default_rng(seed)
    return {
      "tokens": rng.integers(0, 24, (size, LENGTH)).astype(np.int32),
      "loss_mask": (rng.random((size, LENGTH)) < 0.8).astype(np.float32),
    }

  return data.from_arrays(
    {f"client {i}": client(size, i) for i, size in enumerate(SIZES)}
  )


SOURCE = make_source()


@functools.cache
def pack(lanes, ids=SOURCE.ids):
  """In buckets larger than what is needed."""
  return data.pack(
    SOURCE,
    ids,
    lanes=lanes,
    batch_size=BATCH,
    step_buckets=[16],
    slot_buckets=[8],
    client_buckets=[8],
  )


@pytest.fixture(autouse=True)
def tiles_of_four(monkeypatch):
  """Sequences above 8 tokens are attended to in tiles of 4, where wanted."""
  monkeypatch.setattr(
    attention, "flash_attention", functools.partial(flash_attention, block=4)
  )


@functools.cache
def problem(
  optimizer="sgd", dtype="float32", scan=True, parts=1, chunk=0, tiles=False
):
  """(model, adapter, params, algorithm, jitted round, trainable, loss)."""
  del tiles  # Tells traces apart.
  config = models.DecoderConfig(
      vocab_size=24, width=16, num_layers=2, num_heads=8, num_kv_heads=4,
      head_dim=4, mlp_width=24, dtype=dtype, param_dtype=dtype,
      tie_embeddings=False, scan_layers=scan,
  )  # fmt: skip
  model = models.decoder(config)
  params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))
  adapter = adapters.lora(model, rank=2, targets=["q_proj", "up_proj"])
  loss = models.losses.language_model(
    adapters.loss_apply(adapter),
    unembed=adapters.loss_unembed(adapter, model),
    chunk=chunk,
  )
  algorithm = algorithms.fedavg(
    clients.accumulated(loss, parts),
    client_optimizer=OPTIMIZERS[optimizer],
    weighting="tokens",
  )
  trainable = jax.tree.map(
    lambda x: x + 0.05, adapter.init(jax.random.key(1), params)
  )
  round_fn = jax.jit(algorithm.round, compiler_options=FAST_COMPILE)
  return model, adapter, params, algorithm, round_fn, trainable, loss


@functools.cache
def by_loop(optimizer="sgd", dtype="float32"):
  """The round as plain steps, client by client: no option is on."""
  _, _, params, _, _, trainable, loss = problem(optimizer, dtype)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(attention, "MAX_UNROLLED", 1024)
    deltas = [
      reference.client_delta(
        loss,
        OPTIMIZERS[optimizer],
        trainable,
        params,
        SOURCE,
        client_id,
        batch_size=BATCH,
      )
      for client_id in SOURCE.ids
    ]
  weights = [SOURCE.read(i)["loss_mask"][:, 1:].sum() for i in SOURCE.ids]
  shares = np.array(weights, np.float64) / np.sum(weights)
  return jax.tree.map(
    lambda old, *d: old + np.tensordot(shares, np.stack(d), 1),
    trainable,
    *deltas,
  )


def run(case, cohort, monkeypatch, **which):
  """(new state, metrics, old trainable) of a round with a case's options."""
  options = CASES[case]
  if options.get("tiles"):
    monkeypatch.setattr(attention, "MAX_UNROLLED", 8)
  _, _, params, algorithm, round_fn, trainable, _ = problem(**which, **options)
  state, metrics = round_fn(algorithm.init(trainable), params, cohort)
  return state, metrics, trainable


@pytest.mark.parametrize(
  ("case", "scan"),
  [("all", True)]
  + [pytest.param(c, s, marks=slow) for c in CASES for s in (True, False)],
)
def test_any_lanes_are_a_plain_loop(case, scan, monkeypatch):
  expected = by_loop()
  for lanes in (1, 2, len(SIZES)) if case != "all" or not scan else (2,):
    new, _, old = run(case, pack(lanes), monkeypatch, scan=scan)
    error = reference.relative_error(new.trainable, expected, old)
    assert error < 1e-5, lanes


@slow
def test_other_cohorts_of_a_bucket_compile_nothing(monkeypatch):
  round_fn = problem(**CASES["all"])[4]
  run("all", pack(2), monkeypatch)
  count = round_fn._cache_size()
  run("all", pack(2, SOURCE.ids[2:5]), monkeypatch)
  assert round_fn._cache_size() == count


@slow
@pytest.mark.parametrize("case", CASES)
def test_one_client_one_step_is_a_plain_step(case, monkeypatch):
  _, _, params, _, _, trainable, loss = problem()
  batch = SOURCE.read("client 1") | {"mask": np.ones(BATCH, np.float32)}
  grads, _ = jax.grad(loss, has_aux=True)(trainable, params, batch, None)
  expected = jax.tree.map(lambda x, g: x - 0.1 * g, trainable, grads)
  new, _, old = run(case, pack(1, ("client 1",)), monkeypatch)
  assert reference.relative_error(new.trainable, expected, old) < 1e-5


@slow
@pytest.mark.parametrize("case", CASES)
def test_padding_and_absent_clients_change_no_bit(case, monkeypatch):
  absent = (2, 5)
  cohort = reference.with_weights(pack(2), dict.fromkeys(absent, 0))
  owned = np.zeros(cohort.slot.shape, bool)
  for position in set(range(len(SIZES))) - set(absent):
    lane, steps = reference.rows_of(cohort, position)
    owned[lane, steps] = True
  unread = (cohort.batches["mask"] == 0) | ~owned[:, :, None]
  assert (cohort.batches["mask"] == 0)[owned].any() and (~owned).any()
  batches = {k: np.array(x) for k, x in cohort.batches.items()}
  batches["tokens"][unread] = 23
  batches["loss_mask"][unread] = np.nan
  clean, metrics, _ = run(case, cohort, monkeypatch)
  dirty, others, _ = run(
    case, dataclasses.replace(cohort, batches=batches), monkeypatch
  )
  assert reference.state_bytes(clean) == reference.state_bytes(dirty)
  assert reference.state_bytes(metrics) == reference.state_bytes(others)
  assert metrics["clients/participating"] == len(SIZES) - len(absent)


def on_mesh(shape, case, monkeypatch, **which):
  monkeypatch.setattr(attention, "MAX_UNROLLED", 8)
  model, adapter, params, algorithm, round_fn, trainable, _ = problem(
    **which, **CASES[case]
  )
  mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, shape)))
  with jax.set_mesh(mesh):
    base = jax.device_put(
      params, sharding.shardings(mesh, model.axes, model.shapes)
    )
    trainable = jax.device_put(
      trainable, blueprint.trainable_shardings(mesh, model, adapter)
    )
    cohort = clients.put(pack(8), mesh)
    result = round_fn(algorithm.init(trainable), base, cohort)
    return jax.block_until_ready(result)[0], trainable


@slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(8, 1, 1), (4, 2, 1), (2, 2, 2)], ids=str)
def test_any_mesh_is_a_plain_loop(shape, optimizer, monkeypatch):
  new, old = on_mesh(shape, "all", monkeypatch, optimizer=optimizer)
  error = reference.relative_error(new.trainable, by_loop(optimizer), old)
  assert error < {"sgd": 1e-5, "adam": 1e-4}[optimizer]


@slow
def test_a_mesh_is_a_plain_loop_in_float64(monkeypatch):
  with jax.enable_x64(True):
    which = {"optimizer": "adam", "dtype": "float64"}
    new, old = on_mesh((2, 2, 2), "all", monkeypatch, **which)
    assert new.trainable["layers/q_proj"]["a"].dtype == jnp.float64
    error = reference.relative_error(new.trainable, by_loop(**which), old)
  assert error < 1e-10


@slow
@pytest.mark.optimized
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path):
  def train(workdir, rounds):
    config = tiny.config_in_parts(tmp_path, rounds=rounds, lanes=1)
    with tiny.one_device():
      experiment.train(config, workdir)

  train(tmp_path / "whole", 4)
  train(tmp_path / "resumed", 2)
  train(tmp_path / "resumed", 4)
  assert tiny.content(tmp_path / "resumed") == tiny.content(tmp_path / "whole")
