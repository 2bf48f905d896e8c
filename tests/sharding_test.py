"""The mesh and its rules; a round on every mesh equals one device's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from fedfm import adapters, algorithms, clients, data, errors, models, sharding

SHAPES = [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)]
OPTIMIZERS = {"sgd": optax.sgd(0.1), "adam": optax.adam(0.01)}
TOLERANCE = {"sgd": 1e-5, "adam": 1e-4}
# These programs run once: what LLVM could save is less than what it costs.
FAST_COMPILE = {"xla_backend_optimization_level": "0"}


def make_mesh(shape):
  return sharding.make_mesh(dict(zip(sharding.MESH_AXES, shape)))


def make_cohort():
  def client(size, seed):
    rng = np.random.default_rng(seed)
    return {
      "tokens": rng.integers(0, 24, (size, 6)).astype(np.int32),
      "loss_mask": (rng.random((size, 6)) < 0.8).astype(np.float32),
    }

  sizes = (13, 6, 4, 3, 2, 2, 1, 1, 1)
  source = data.from_arrays(
    {f"client {i}": client(size, i) for i, size in enumerate(sizes)}
  )
  return data.pack(source, source.ids, lanes=8, batch_size=4)


@functools.cache
def problem(kind, optimizer, dtype="float32"):
  """(model, params, algorithm, jitted round, first trainable)."""
  scan_layers = dtype == "float64"
  config = models.DecoderConfig(
      vocab_size=24, width=16, num_layers=1 + scan_layers, num_heads=8,
      num_kv_heads=4, head_dim=4, mlp_width=24, dtype=dtype, param_dtype=dtype,
      tie_embeddings=False, scan_layers=scan_layers,
  )  # fmt: skip
  model = models.decoder(config)
  params = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(0)))
  if kind == "lora":
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    adapter = adapters.lora(model, rank=2, targets=targets)
  else:
    adapter = adapters.full(model)
  loss = models.losses.language_model(adapters.loss_apply(adapter))
  algorithm = algorithms.fedavg(
    loss, client_optimizer=OPTIMIZERS[optimizer], weighting="tokens"
  )
  trainable = adapter.init(jax.random.key(1), params)
  if kind == "lora":  # As after some rounds: B is not 0.
    trainable = jax.tree.map(lambda x: x + 0.05, trainable)
  round_fn = jax.jit(algorithm.round, compiler_options=FAST_COMPILE)
  return model, params, algorithm, round_fn, trainable


@functools.cache
def on_one_device(*which):
  _, params, algorithm, round_fn, trainable = problem(*which)
  base = params if which[0] == "lora" else None
  return round_fn(algorithm.init(trainable), base, make_cohort())


def on_mesh(shape, *which):
  model, params, algorithm, round_fn, trainable = problem(*which)
  mesh = make_mesh(shape)
  placed = sharding.shardings(mesh, model.axes, model.shapes)
  with jax.set_mesh(mesh):
    if which[0] == "lora":
      base = jax.device_put(params, placed)
      trainable = jax.device_put(trainable, jax.NamedSharding(mesh, jax.P()))
    else:
      base, trainable = None, jax.device_put(trainable, placed)
    state = algorithm.init(trainable)
    result = round_fn(state, base, clients.put(make_cohort(), mesh))
    return jax.block_until_ready(result), trainable


def check_parity(shape, limit, *which):
  expected, expected_metrics = on_one_device(*which)
  (new, metrics), old = on_mesh(shape, *which)
  error = reference.relative_error(new.trainable, expected.trainable, old)
  assert error < limit
  for name, value in expected_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
  return new, old


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_round_on_a_mesh_equals_one_device(shape):
  check_parity(shape, TOLERANCE["sgd"], "lora", "sgd")


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_full_round_on_a_mesh_equals_one_device(shape):
  new, old = check_parity(shape, TOLERANCE["adam"], "full", "adam")
  kernel = new.trainable["layers"]["up_proj"]
  before = old["layers"]["up_proj"].sharding
  assert kernel.sharding.is_equivalent_to(before, kernel.ndim)


def test_lora_round_on_a_mesh_in_float64():
  with jax.enable_x64(True):
    check_parity((2, 2, 2), 1e-10, "lora", "adam", "float64")


@pytest.mark.parametrize(
  ("sizes", "expected"),
  [
    (None, (8, 1, 1)),
    ({"clients": -1, "fsdp": 2}, (4, 2, 1)),
    ({"clients": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
    ({"tensor": -1}, (1, 1, 8)),
  ],
)
def test_mesh_sizes(sizes, expected):
  mesh = sharding.make_mesh(sizes)
  assert tuple(mesh.shape.values()) == expected
  assert mesh.axis_names == sharding.MESH_AXES
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
  ("sizes", "words"),
  [
    ({"client": 8}, ["client", "did you mean 'clients'"]),
    ({"clients": 0}, ["mesh.clients", "0"]),
    ({"clients": -2}, ["mesh.clients", "-2"]),
    ({"clients": 2.0}, ["mesh.clients", "2.0"]),
    ({"clients": -1, "fsdp": -1}, ["-1"]),
    ({"clients": -1, "fsdp": 3}, ["8", "3"]),
    ({"clients": 2, "fsdp": 2}, ["4", "8"]),
  ],
)
def test_bad_mesh_sizes_are_named(sizes, words):
  with pytest.raises(errors.ConfigError) as raised:
    sharding.make_mesh(sizes)
  for word in words:
    assert word in str(raised.value)


def test_rules_raise_on_unknown_axes_and_collisions():
  rules = sharding.ShardingRules(embed="fsdp", mlp="tensor", heads="tensor")
  assert rules.spec(("embed", None, "mlp")) == jax.P("fsdp", None, "tensor")
  with pytest.raises(errors.ConfigError, match="collide"):
    rules.spec(("heads", "mlp"))
  with pytest.raises(errors.ConfigError, match="did you mean 'embed'"):
    rules.spec(("embd",))


def test_a_dimension_that_does_not_divide_is_named():
  mesh = make_mesh((1, 1, 8))
  shapes = {"up": jax.ShapeDtypeStruct((4, 12), jnp.float32)}
  with pytest.raises(errors.ConfigError) as raised:
    sharding.shardings(mesh, {"up": ("embed", "mlp")}, shapes)
  for word in ("mesh.tensor", "8", "12", "up"):
    assert word in str(raised.value)


def test_put_checks_lanes_and_batch():
  with pytest.raises(errors.ConfigError, match="lanes: mesh.clients = 8"):
    source = data.from_arrays({"a": {"x": np.ones((3, 2), np.float32)}})
    cohort = data.pack(source, ["a"], lanes=4, batch_size=2)
    clients.put(cohort, make_mesh((8, 1, 1)))
  with pytest.raises(errors.ConfigError, match="batch_size: mesh.fsdp = 4"):
    clients.put(cohort, make_mesh((1, 4, 2)))


def test_put_splits_lanes_and_batches():
  mesh = make_mesh((4, 2, 1))
  cohort = make_cohort()
  placed = clients.put(cohort, mesh)
  tokens = placed.batches["tokens"]
  assert tokens.sharding.spec == jax.P("clients", None, "fsdp")
  shard = tokens.addressable_shards[0].data.shape
  assert shard[0] == 2
  assert shard[2] == 2
  np.testing.assert_array_equal(tokens, cohort.batches["tokens"])
  assert placed.order.sharding.is_fully_replicated
