"""The mesh and its rules; a round on every mesh equals one device's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from fedfm import (
  adapters,
  algorithms,
  blueprint,
  clients,
  data,
  errors,
  models,
  sharding,
)

SHAPES = [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)]
# One of them also has its logits in chunks and its steps in microbatches.
IN_PARTS = (2, 2, 2)
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
def problem(kind, optimizer, dtype="float32", in_parts=False):
  """(model, adapter, params, algorithm, jitted round, first trainable)."""
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
  loss = models.losses.language_model(
    adapters.loss_apply(adapter),
    unembed=adapters.loss_unembed(adapter, model),
    chunk=4 if in_parts else 0,
  )
  algorithm = algorithms.fedavg(
    clients.accumulated(loss, 2 if in_parts else 1),
    client_optimizer=OPTIMIZERS[optimizer],
    weighting="tokens",
  )
  trainable = adapter.init(jax.random.key(1), params)
  if kind == "lora":  # As after some rounds: B is not 0.
    trainable = jax.tree.map(lambda x: x + 0.05, trainable)
  round_fn = jax.jit(algorithm.round, compiler_options=FAST_COMPILE)
  return model, adapter, params, algorithm, round_fn, trainable


@functools.cache
def on_one_device(*which):
  _, _, params, algorithm, round_fn, trainable = problem(*which)
  base = params if which[0] == "lora" else None
  return round_fn(algorithm.init(trainable), base, make_cohort())


def on_mesh(shape, *which):
  model, adapter, params, algorithm, round_fn, trainable = problem(
    *which, in_parts=shape == IN_PARTS
  )
  mesh = make_mesh(shape)
  placed = sharding.shardings(mesh, model.axes, model.shapes)
  with jax.set_mesh(mesh):
    base = jax.device_put(params, placed) if which[0] == "lora" else None
    trainable = jax.device_put(
      trainable, blueprint.trainable_shardings(mesh, model, adapter)
    )
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


def by_default(shapes, *few):
  """Marks as slow all but a few."""
  slow = pytest.mark.slow
  return [s if s in few else pytest.param(s, marks=slow) for s in shapes]


@pytest.mark.parametrize("shape", by_default(SHAPES, IN_PARTS), ids=str)
def test_lora_round_on_a_mesh_equals_one_device(shape):
  check_parity(shape, TOLERANCE["sgd"], "lora", "sgd")


@pytest.mark.slow
@pytest.mark.parametrize("shape", by_default(SHAPES[:-1], (2, 2, 2)), ids=str)
def test_full_round_on_a_mesh_equals_one_device(shape):
  new, old = check_parity(shape, TOLERANCE["adam"], "full", "adam")
  kernel = new.trainable["layers"]["up_proj"]
  before = old["layers"]["up_proj"].sharding
  assert kernel.sharding.is_equivalent_to(before, kernel.ndim)


@pytest.mark.slow
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


def test_a_dimension_over_several_axes_takes_those_that_divide():
  rules = sharding.ShardingRules(long=("tensor", "fsdp"), short="fsdp")
  sizes = {"clients": 1, "fsdp": 4, "tensor": 2}
  expected = {16: ("tensor", "fsdp"), 6: ("tensor",), 12: ("tensor",), 5: None}
  for dim, axes in expected.items():
    assert rules.spec(("long",), (dim,), sizes) == jax.P(axes)
  assert rules.spec(("long",)) == jax.P(("tensor", "fsdp"))
  with pytest.raises(errors.ConfigError, match="collide"):
    rules.spec(("long", "short"), (16, 16), sizes)


def test_factors_are_split_over_all_devices_of_a_client():
  model, adapter, *_ = problem("lora", "sgd")
  for shape in ((2, 2, 2), (2, 4, 1)):
    placed = blueprint.trainable_shardings(make_mesh(shape), model, adapter)
    q = placed["layers/q_proj"]
    assert q["a"].spec == jax.P(None, "fsdp", None)
    assert q["b"].spec == jax.P(None, None, ("tensor", "fsdp"))
    # Of a kernel [mlp, embed] it is the other way round.
    down = placed["layers/down_proj"]
    assert down["a"].spec == jax.P(None, ("tensor", "fsdp"), None)
    assert down["b"].spec == jax.P(None, None, "fsdp")


def test_copies_are_sharded_like_what_they_copy():
  mesh = make_mesh((2, 2, 2))
  weights = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32)}
  places = {"w": jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))}
  tree = {
    "mu": weights,
    "history": {"w": jax.ShapeDtypeStruct((10, 8, 6), jnp.float32)},
    "other": {"w": jax.ShapeDtypeStruct((6, 8), jnp.float32)},
    "count": jax.ShapeDtypeStruct((), jnp.int32),
  }
  got = sharding.shardings_like(mesh, tree, weights, places)
  assert got["mu"]["w"].spec == jax.P("fsdp", "tensor")
  assert got["history"]["w"].spec == jax.P(None, "fsdp", "tensor")
  assert got["other"]["w"].spec == jax.P()
  assert got["count"].spec == jax.P()


class Chip:
  """What a mesh asks of a chip, of slices of 2 x 2 that are not here."""

  platform, device_kind = "tpu", "TPU v5 lite"
  process_index = core_on_chip = 0

  def __init__(self, number):
    self.id, self.slice_index = number, number // 4
    self.coords = (number % 2, number // 2 % 2, 0)


@pytest.mark.parametrize("order", ["by slice", "mixed"])
def test_slices_are_joined_over_clients_only(order):
  devices = [Chip(i) for i in range(8)]
  if order == "mixed":
    devices = devices[::2] + devices[1::2]
  mesh = sharding.make_mesh({"clients": 4, "fsdp": 2}, devices)
  for i, clients_devices in enumerate(mesh.devices):
    assert {d.slice_index for d in clients_devices.flat} == {i // 2}
  with pytest.raises(errors.ConfigError, match="mesh.clients: 2 slices .* 1;"):
    sharding.make_mesh({"clients": 1, "fsdp": 8}, devices)


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


def test_a_history_is_sharded_like_what_it_is_of():
  mesh = sharding.make_mesh({"clients": 2, "fsdp": 4, "tensor": 1})
  like = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
  w = jax.ShapeDtypeStruct((3, 8), jnp.float32)
  past = jax.ShapeDtypeStruct((5, 3, 8), jnp.float32)
  other = jax.ShapeDtypeStruct((5, 3, 4), jnp.float32)
  tree = {"a": {"w": w}, "b": {"w": past}, "c": {"w": other}, "d": past}
  got = sharding.shardings_like(mesh, tree, {"w": w}, {"w": like})
  assert got["a"]["w"] == like
  assert got["b"]["w"].spec == jax.P(None, None, "fsdp")
  assert got["c"]["w"].spec == got["d"].spec == jax.P()
