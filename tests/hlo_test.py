"""What the compiled round does with the base and the lanes, read in its HLO."""

import collections
import functools
import re

import jax
import numpy as np
import optax
import pytest

from fedfm import (
  adapters,
  algorithms,
  blueprint,
  clients,
  data,
  models,
  sharding,
)
from fedfm.scaling import hlo

LANES, BATCH, LENGTH, NUM_CLIENTS = 4, 2, 11, 8
TARGETS = ["q_proj", "up_proj"]
# All sizes differ, so that a shape in the HLO says what it belongs to.
CONFIG = models.DecoderConfig(
    vocab_size=52, width=16, num_layers=2, num_heads=4, head_dim=6,
    num_kv_heads=2, mlp_width=40,
)  # fmt: skip


def text_source():
  def client(size, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, (size, LENGTH))
    return {
      "tokens": tokens.astype(np.int32),
      "loss_mask": np.ones((size, LENGTH), np.float32),
    }

  sizes = (9, 4, 3, 3, 2, 2, 1, 1)
  return data.from_arrays(
    {f"client {i}": client(size, i) for i, size in enumerate(sizes)}
  )


def make_round(kind, mesh, chunk=0):
  """(algorithm, base, trainable) of a round of LoRA or of full training."""
  model = models.decoder(CONFIG)
  if kind == "lora":
    adapter = adapters.lora(model, rank=3, targets=TARGETS)
  else:
    adapter = adapters.full(model)
  loss = models.losses.language_model(
    adapters.loss_apply(adapter),
    unembed=adapters.loss_unembed(adapter, model),
    chunk=chunk,
  )
  algorithm = algorithms.fedavg(loss, client_optimizer=optax.adam(0.01))
  base, place = model.init(jax.random.key(0)), None
  if mesh is not None:
    places = sharding.shardings(mesh, model.axes, model.shapes)
    base = jax.device_put(base, places)
    place = blueprint.trainable_shardings(mesh, model, adapter)
  init = jax.jit(adapter.init, out_shardings=place)
  trainable = init(jax.random.key(1), base)
  return algorithm, None if kind == "full" else base, trainable


# Of LLVM, which comes after HLO and takes most of the time.
FAST_COMPILE = {"xla_backend_optimization_level": "0"}


@functools.cache
def on_one_device():
  """The module of a LoRA round."""
  algorithm, base, trainable = make_round("lora", None)
  source = text_source()
  cohort = data.pack(source, source.ids, lanes=LANES, batch_size=BATCH)
  lowered = jax.jit(algorithm.round, donate_argnums=0).lower(
    algorithm.init(trainable), base, cohort
  )
  return hlo.parse(lowered.compile(FAST_COMPILE).as_text())


@functools.cache
def lowered_on_mesh(kind, mesh_shape):
  """A round lowered for a mesh, and its trainable as it is placed there."""
  mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, mesh_shape)))
  algorithm, base, trainable = make_round(kind, mesh, chunk=2 * BATCH)
  source = text_source()
  cohort = data.pack(source, source.ids, lanes=LANES, batch_size=BATCH)
  with jax.set_mesh(mesh):
    places = blueprint.state_shardings(
      mesh, algorithm, base, trainable, NUM_CLIENTS
    )
    state = jax.jit(algorithm.init, out_shardings=places)(trainable)
    lowered = blueprint.jit_round(mesh, algorithm.round, places).lower(
      state, base, clients.put(cohort, mesh)
    )
  return mesh, lowered, trainable


@functools.cache
def on_mesh(kind, mesh_shape):
  """(mesh, module, shapes of a device's shards of the trainable)."""
  mesh, lowered, trainable = lowered_on_mesh(kind, mesh_shape)
  module = hlo.parse(lowered.compile(FAST_COMPILE).as_text())
  shards = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(trainable)]
  return mesh, module, shards


def instructions(module):
  return [
    one
    for computation in module.computations.values()
    for one in computation.instructions.values()
  ]


def dots(module):
  """Yields (operand shapes, whether it has batch dimensions) of every dot."""
  for computation in module.computations.values():
    for one in computation.instructions.values():
      if one.opcode == "dot":
        operands = [computation.instructions[n] for n in one.operands]
        batched = "batch_dims={" in one.attributes
        yield [x.shapes[0].dims for x in operands], batched


def test_base_product_is_one_matmul_over_all_lanes():
  found = list(dots(on_one_device()))
  tokens = LANES * BATCH * LENGTH
  kernels = models.decoder(CONFIG).shapes["layers"]
  by_shape = {}
  for kernel in kernels.values():
    if len(kernel.shape) == 3:
      by_shape.setdefault(frozenset(kernel.shape[1:]), []).append(kernel)
  # q and o are 16 x 24; k and v 16 x 12; gate, up and down 16 x 40.
  assert sorted(len(same) for same in by_shape.values()) == [2, 2, 3]
  for shape, same in by_shape.items():
    products = [
      (operands, batched)
      for operands, batched in found
      if any(frozenset(o[-2:]) == shape for o in operands)
      and not any(3 in o for o in operands)  # The adapter's rank.
      and any(len(o) == 2 and tokens in o for o in operands)
    ]
    # One product forward and one backward, all lanes' tokens in its rows.
    assert len(products) == 2 * len(same), (shape, products)
    assert not any(batched for _, batched in products)
  # Nothing multiplies a copy of a kernel per lane.
  for operands, batched in found:
    for operand in operands:
      a_copy = len(operand) > 2 and frozenset(operand[-2:]) in by_shape
      assert not (batched and a_copy), operands
  # The adapter's products are the ones with a batch over lanes.
  assert any(batched and (LANES, 16, 3) in ops for ops, batched in found)


@pytest.mark.parametrize(
  ("line", "groups"),
  [
    ("replica_groups={{0,1},{2,3}}, x={1}", [[0, 1], [2, 3]]),
    ("source_target_pairs={{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[4], dims={0}", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=1] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    (
      "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x={1}",
      [[0, 2], [1, 3]],
    ),
    ("replica_groups={}", [[0, 1, 2, 3]]),
  ],
)
def test_replica_groups_are_read_in_all_forms(line, groups):
  assert hlo.replica_groups(line, 4) == groups


def collectives(mesh, module):
  """Yields (operation, dimensions of each result, mesh axes)."""
  for one in instructions(module):
    kind = one.opcode.removesuffix("-start")
    if kind in hlo.COLLECTIVES:
      groups = hlo.replica_groups(one.attributes, mesh.size)
      axes = hlo.group_axes(groups, mesh.shape)
      yield kind, [shape.dims for shape in one.shapes], axes


ROUNDS = [("lora", (2, 2, 2)), ("full", (2, 2, 2))]
CASES = [
  ROUNDS[0],
  pytest.param(*ROUNDS[1], marks=pytest.mark.slow),
  pytest.param("lora", (4, 2, 1), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "mesh_shape"), CASES, ids=str)
def test_exactly_the_trainable_is_reduced_over_clients(kind, mesh_shape):
  mesh, module, shards = on_mesh(kind, mesh_shape)
  crossed = []
  for operation, shapes, axes in collectives(mesh, module):
    if "clients" in axes:
      assert operation in ("all-reduce", "reduce-scatter"), (operation, shapes)
      crossed += shapes
  # Beside each shard of the trainable, once: scalars, and one a client.
  large = [shape for shape in crossed if np.prod(shape) > NUM_CLIENTS]
  assert sorted(map(sorted, large)) == sorted(map(sorted, shards))
  assert len(crossed) > len(large)


@pytest.mark.parametrize(("kind", "mesh_shape"), CASES, ids=str)
def test_weights_are_gathered_within_a_client_only(kind, mesh_shape):
  mesh, module, _ = on_mesh(kind, mesh_shape)
  gathered = collections.Counter()
  for operation, shapes, axes in collectives(mesh, module):
    if operation == "all-gather":
      assert "clients" not in axes, shapes
      if axes == ("fsdp",):
        gathered.update(frozenset(shape[-2:]) for shape in shapes)
  # Layer by layer, forward and backward.
  for columns in (24, 40):
    assert gathered[frozenset({16, columns // mesh.shape["tensor"]})] >= 2


@pytest.mark.parametrize(("kind", "mesh_shape"), CASES, ids=str)
def test_lanes_hold_only_their_shards(kind, mesh_shape):
  """Weights, both moments of Adam, and the sum over clients, in the loop."""
  mesh, module, shards = on_mesh(kind, mesh_shape)
  entry = module.computations[module.entry].instructions.values()
  (loop,) = [one for one in entry if one.opcode == "while"]
  carried = collections.Counter(shape.dims for shape in loop.shapes)
  lanes = LANES // mesh.shape["clients"]
  for shard, count in collections.Counter(shards).items():
    assert carried[(lanes, *shard)] >= 4 * count, shard
  whole = {
    (lanes, *x.shape)
    for x in jax.tree.leaves(lowered_on_mesh(kind, mesh_shape)[2])
    if x.sharding.shard_shape(x.shape) != x.shape
  }
  assert whole and not whole & set(carried)


def test_activations_are_split_over_clients_by_their_own_constraints():
  """Each constraint of a lane's value names the axis; propagation may not."""
  _, lowered, _ = lowered_on_mesh("lora", (2, 2, 2))
  found = re.findall(
    r"sharding_constraint %\S+ <@mesh, \[(.*?)\]> : tensor<(\S+)xf32>",
    lowered.as_text(),
  )
  activations = [
    spec.split("}, {")
    for spec, dims in found
    if dims.startswith(f"{LANES}x{BATCH}x{LENGTH}x")
  ]
  assert len(activations) >= 4
  for spec in activations:
    assert spec[:2] == ['{"clients"', '"fsdp"']


def logits_of_all_tokens(module, mesh_shape=(1, 1, 1)):
  """Arrays as large as all of a device's logits."""
  _, fsdp, tensor = mesh_shape
  vocab = CONFIG.vocab_size // tensor
  return [
    shape
    for one in instructions(module)
    for shape in one.shapes
    if vocab in shape.dims
    and {LENGTH, LENGTH - 1} & set(shape.dims)
    and shape.size >= BATCH // fsdp * (LENGTH - 1) * vocab
  ]


def test_all_logits_never_exist_at_once():
  assert logits_of_all_tokens(on_one_device())  # The plain loss.
  for kind, mesh_shape in ROUNDS:
    _, module, _ = on_mesh(kind, mesh_shape)
    assert not logits_of_all_tokens(module, mesh_shape)
