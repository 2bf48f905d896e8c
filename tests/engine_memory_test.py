"""Memory is set by the lanes, not by the cohort; packing keeps programs few."""

import jax
import numpy as np
import optax
import pytest

from fedfm import adapters, algorithms, clients, data, models, sharding
from fedfm.data import layout, packing

LANES = 8


@pytest.fixture(scope="module")
def lowered():
  """Compiles a LoRA round for a number of clients of one batch each."""
  model = models.decoder(
    models.DecoderConfig(
      vocab_size=64, width=64, num_layers=2, num_heads=2, mlp_width=128
    )
  )
  adapter = adapters.lora(model, rank=4)
  algorithm = algorithms.fedavg(
    models.losses.language_model(adapters.loss_apply(adapter)),
    client_optimizer=optax.adam(0.01),
  )
  mesh = sharding.make_mesh({"clients": LANES})
  shape = (2, 64)
  examples = {
    "tokens": np.zeros(shape, np.int32),
    "loss_mask": np.ones(shape, np.float32),
  }

  def compile_for(num_clients):
    source = data.from_arrays({f"c{i}": examples for i in range(num_clients)})
    cohort = packing.pack(source, source.ids, batch_size=2, lanes=LANES)
    with jax.set_mesh(mesh):
      key = jax.random.key(0)
      params = model.init(key)
      state = algorithm.init(adapter.init(key, params))
      compiled = (
        jax.jit(algorithm.round, donate_argnums=0)
        .lower(state, params, clients.put(cohort, mesh))
        .compile()
      )
    return compiled.memory_analysis()

  return compile_for


@pytest.mark.slow
def test_a_thousand_clients_need_the_memory_of_eight(lowered):
  few, many = lowered(8), lowered(1000)
  assert many.argument_size_in_bytes > few.argument_size_in_bytes

  def beyond_arguments(analysis):
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

  # An activation of the residual stream on a lane is a good part of 5%.
  assert beyond_arguments(few) > 20 * 2 * 64 * 64 * 4
  assert beyond_arguments(many) <= 1.05 * beyond_arguments(few)


@pytest.mark.parametrize("seed", range(3))
def test_heavy_tails_cost_little_and_compile_few_programs(seed):
  rng = np.random.default_rng(seed)
  sizes = np.ceil(20 * rng.lognormal(0, 1.5, 1000)).astype(int)
  ids = [str(i) for i in range(len(sizes))]
  sampler = data.sampling.uniform(ids, 64, seed)
  cohorts = [
    [packing.steps_per_client(sizes[int(i)], 4) for i in sampler.sample(r)]
    for r in range(100)
  ]
  step_buckets, slot_buckets = layout.plan_buckets(cohorts, LANES)
  shapes = set()
  for steps in cohorts:
    placed = packing.assign(steps, LANES)
    assert sorted(c for lane in placed for c in lane) == list(range(64))
    longest = max(sum(steps[c] for c in lane) for lane in placed)
    assert longest <= 1.1 * max(sum(steps) / LANES, max(steps))
    shapes.add(
      (
        packing.bucket(longest, step_buckets),
        packing.bucket(max(map(len, placed)), slot_buckets),
      )
    )
  assert len(shapes) <= 3
