"""What the compiled round of LoRA does with the base, read in its HLO."""

import functools
import re

import jax
import numpy as np
import optax
import pytest

from fedfm import adapters, algorithms, clients, data, models, sharding, trees

LANES, BATCH, LENGTH, NUM_CLIENTS = 4, 2, 11, 8
TARGETS = ["q_proj", "up_proj"]
# All sizes differ, so that a shape in the HLO says what it belongs to.
CONFIG = models.DecoderConfig(
    vocab_size=32, width=16, num_layers=2, num_heads=4, head_dim=6,
    num_kv_heads=2, mlp_width=40,
)  # fmt: skip
_COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)


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


@functools.cache
def compiled_text(mesh_shape=None):
  """Optimized HLO of a round, and the trainable."""
  model = models.decoder(CONFIG)
  adapter = adapters.lora(model, rank=3, targets=TARGETS)
  loss = models.losses.language_model(adapters.loss_apply(adapter))
  algorithm = algorithms.fedavg(loss, client_optimizer=optax.adam(0.01))
  params = model.init(jax.random.key(0))
  state = algorithm.init(adapter.init(jax.random.key(1), params))
  source = text_source()
  cohort = data.pack(source, source.ids, lanes=LANES, batch_size=BATCH)
  round_fn = jax.jit(
    algorithm.round,
    donate_argnums=0,
    # Of LLVM, which comes after HLO and takes most of the time.
    compiler_options={"xla_backend_optimization_level": "0"},
  )
  if mesh_shape is None:
    return round_fn.lower(state, params, cohort).compile().as_text(), state
  mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, mesh_shape)))
  with jax.set_mesh(mesh):
    placed = jax.device_put(
      params, sharding.shardings(mesh, model.axes, model.shapes)
    )
    state = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
    lowered = round_fn.lower(state, placed, clients.put(cohort, mesh))
    return lowered.compile().as_text(), state


def shapes_in(text):
  """All array shapes in a piece of HLO: [(3, 4), ...]."""
  found = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]*)\]", text)
  return [tuple(int(n) for n in dims.split(",") if n) for dims in found]


def dots(text):
  """Yields (operand shapes, whether it has batch dimensions) of every dot."""
  shapes = {}
  for name, value in re.findall(r"%([\w.-]+) = (\S+\[[\d,]*\])", text):
    shapes[name] = shapes_in(value)[0]
  for operands, rest in re.findall(r" dot\(([^)]*)\)(.*)", text):
    names = re.findall(r"%([\w.-]+)", operands)
    assert len(names) == 2, operands
    yield [shapes[n] for n in names], "batch_dims={" in rest


def test_base_product_is_one_matmul_over_all_lanes():
  text, _ = compiled_text()
  found = list(dots(text))
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


def integers(text):
  return [int(n) for n in text.split(",")]


def device_order(dims, permutation, num_devices):
  """Partition ids counted in another order, as HLO's `[4,2]T(1,0)` says it."""
  ids = np.arange(num_devices)
  if dims:
    ids = ids.reshape(integers(dims))
  if permutation:
    ids = ids.transpose(integers(permutation))
  return ids.reshape(-1)


def replica_groups(line, num_devices):
  """Groups of partition ids of a collective, in any of HLO's forms."""
  listed = re.search(
    r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line
  )
  if listed:
    return [
      [int(n) for n in group.split(",")]
      for group in re.findall(r"\{([\d,]+)\}", listed[1])
    ]
  iota = re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line
  )
  if iota:
    ids = device_order(iota[2], iota[3], num_devices)
    return ids.reshape(integers(iota[1])).tolist()
  mesh = re.search(
    r"replica_groups=mesh\[((?:'\w+'=\d+,?)+)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    r" \{((?:'\w+',?)*)\}",
    line,
  )
  if mesh:
    axes = re.findall(r"'(\w+)'=(\d+)", mesh[1])
    over = re.findall(r"'(\w+)'", mesh[4])
    names = [name for name, _ in axes]
    ids = device_order(mesh[2], mesh[3], num_devices)
    ids = ids.reshape([int(size) for _, size in axes])
    rest = [i for i, name in enumerate(names) if name not in over]
    inside = [names.index(name) for name in over]
    size = int(np.prod([ids.shape[i] for i in inside]))
    return ids.transpose(rest + inside).reshape(-1, size).tolist()
  if "replica_groups={}" in line:
    return [list(range(num_devices))]
  raise AssertionError(f"no groups in {line}")


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
  assert replica_groups(line, 4) == groups


def collectives(text, num_devices):
  """Yields (operation, shapes of its results, groups)."""
  pattern = r"= (.*?) (" + "|".join(_COLLECTIVES) + r")(?:-start)?\("
  for line in text.splitlines():
    found = re.search(pattern, line)
    if found:
      groups = replica_groups(line, num_devices)
      yield found[2], shapes_in(found[1]), groups


@pytest.mark.parametrize("mesh_shape", [(4, 2, 1), (2, 2, 2)])
def test_only_reductions_of_the_trainable_cross_clients(mesh_shape):
  text, state = compiled_text(mesh_shape)
  per_client = mesh_shape[1] * mesh_shape[2]
  leaves = [x.shape for x in jax.tree.leaves(state.trainable)]

  def part_of_trainable(shape):
    return any(
      len(leaf) == len(shape) and all(n % m == 0 for n, m in zip(leaf, shape))
      for leaf in leaves
    )

  crossing, local = [], []
  for operation, shapes, groups in collectives(text, 8):
    crosses = any(
      len({device // per_client for device in group}) > 1 for group in groups
    )
    (crossing if crosses else local).append((operation, shapes))
  for operation, shapes in crossing:
    assert operation in ("all-reduce", "reduce-scatter"), (operation, shapes)
    for shape in shapes:
      small = np.prod(shape) <= NUM_CLIENTS
      assert small or part_of_trainable(shape), (operation, shape)
  # The sum of the trainable does cross, once.
  crossed = [shape for _, shapes in crossing for shape in shapes]
  elements = sum(int(np.prod(s)) for s in crossed if part_of_trainable(s))
  total = trees.num_elements(state.trainable)
  assert total / mesh_shape[2] <= elements <= total
  # And the base is gathered, layer by layer, inside a client's devices only.
  gathered = [s for op, shapes in local if op == "all-gather" for s in shapes]
  q_columns = 24 // mesh_shape[2]
  assert any(set(s[-2:]) == {16, q_columns} for s in gathered)
