"""Streaming DiLoCo against the paper's algorithm, step by step in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from streaming_problem import (
  ADAMW,
  FAST,
  LAYERS,
  NUM_REPLICAS,
  SOURCE,
  adamw,
  by_the_paper,
  cohort_of,
  flat,
  loss,
  owners,
  run,
  start,
  streaming,
)

from fedfm import algorithms, clients, compression, data, errors, sharding


@pytest.mark.slow
@pytest.mark.parametrize(
  ("options", "of_layer", "other", "offsets"),
  [
    # Even offsets: rounds of three and four steps.
    ({"overlap": 2}, (0, 1, 0, 1), 0, (3, 0)),
    # Arrivals that wait for several rounds, at uneven offsets.
    (
      {"overlap": 6, "mixing": 0.3, "offsets": (5, 4, 1)}
      | {"layer_fragments": (2, 0, 1, 0), "num_fragments": None},
      (2, 0, 1, 0), 1, (5, 4, 1),
    ),
    pytest.param(
      {"overlap": 0, "mixing": 0.0, "pattern": "sequential"}, (0, 0, 1, 1), 0,
      (3, 0), marks=pytest.mark.slow,
    ),
    pytest.param(
      {"overlap": 3, "mixing": 1.0}, (0, 1, 0, 1), 0, (3, 0),
      marks=pytest.mark.slow,
    ),
  ],
)  # fmt: skip
def test_rounds_equal_the_paper_step_by_step(options, of_layer, other, offsets):
  with jax.enable_x64(True):
    algorithm, owner = streaming(**options), owners(of_layer, other)
    state = run(algorithm, 7)[-1]
    steps = sum(map(algorithm.local_steps, range(7)))
    overlap, mixing = options["overlap"], options.get("mixing", 0.5)
    r, w = by_the_paper(steps, owner, 7, offsets, overlap, mixing)
    # The outer step of what is on its way is in `trainable` already; the paper
    # takes it on arrival.
    arrived = np.asarray(state.extra["age"])[owner] < 0
    assert not arrived.all()
    np.testing.assert_allclose(
      flat(state.trainable)[arrived], r[arrived], rtol=1e-10
    )
    for c in range(NUM_REPLICAS):
      got = flat(jax.tree.map(lambda x, c=c: x[c], state.clients["weights"]))
      # Without overlap, an arrival is mixed in as the next round starts.
      same = slice(None) if overlap else arrived
      np.testing.assert_allclose(got[same], w[c][same], rtol=1e-10)
    if not overlap:
      np.testing.assert_allclose(flat(state.trainable), r, rtol=1e-10)


def test_a_scalar_worked_by_hand():
  """Two replicas, SGD of rate 0.5 to 0 and to 4; H = 2, tau = 1, alpha = 0.25.

  One fragment, outer SGD of rate 0.5 without momentum, all from r = w = 1.
    steps 1, 2:  w = (0.5, 2.5), then (0.25, 3.25);
                 D = 1 - 1.75 = -0.75,  r <- 1 + 0.375 = 1.375
    step 3:      w = (0.125, 3.625), and 1.375 arrives: w <- 0.25 w + 0.75 r
                 = (1.0625, 1.9375)
    step 4:      w = (0.53125, 2.96875),  D = 1.375 - 1.75 = -0.375,
                 r <- 1.375 + 0.1875 = 1.5625
  The next D is taken from r = 1.375: from the mixtures, whose mean is 1.5, it
  would be -0.25. With alpha and 1 - alpha swapped w would be (0.4375, 3.0625)
  at step 3; with D of the wrong sign r would be 0.625 at step 2.
  """
  source = data.from_arrays(
    {"to 0": {"x": np.zeros((2, 1))}, "to 4": {"x": np.full((2, 1), 4.0)}}
  )

  def pull(w, base, batch, key):
    del base, key
    return jnp.sum(0.5 * (w - batch["x"][:, 0]) ** 2 * batch["mask"]), {}

  with jax.enable_x64(True):
    algorithm = algorithms.streaming_diloco(
      pull,
      client_optimizer=optax.sgd(0.5),
      server_optimizer=optax.sgd(0.5),
      num_clients=2,
      num_fragments=1,
      inner_steps=2,
      overlap=1,
      mixing=0.25,
    )
    state = algorithm.init(jnp.asarray(1.0))
    round_fn = jax.jit(algorithm.round, compiler_options=FAST)
    cohort = data.pack(source, source.ids, batch_size=1, lanes=2, aligned=True)
    for r, w in ((1.375, [0.25, 3.25]), (1.5625, [0.53125, 2.96875])):
      state, _ = round_fn(state, None, cohort)
      np.testing.assert_allclose(state.trainable, r, rtol=1e-14)
      np.testing.assert_allclose(state.clients["weights"], w, rtol=1e-14)


def test_one_fragment_without_overlap_or_mixing_is_diloco():
  options = {"num_fragments": 1, "inner_steps": 3, "overlap": 0, "mixing": 0.0}
  with jax.enable_x64(True):
    plain = algorithms.diloco(
      loss, client_optimizer=ADAMW, num_clients=NUM_REPLICAS
    )
    plain = plain._replace(local_steps=lambda r: 3)
    for state, expected in zip(run(streaming(**options), 3), run(plain, 3)):
      np.testing.assert_allclose(
        flat(state.trainable), flat(expected.trainable), rtol=1e-12
      )


@pytest.mark.slow
def test_layouts_agree():
  ids = list(SOURCE.ids)
  cohorts = [ids[:2], ids[:2], ids, [ids[0], ids[2]], ids]
  with jax.enable_x64(True):
    algorithm = streaming(overlap=2)
    expected = run(algorithm, 5, cohorts)
    for x, y in zip(
      jax.tree.leaves(run(algorithm, 5, cohorts, lanes=2)),
      jax.tree.leaves(expected),
    ):
      np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-15)


@pytest.mark.slow
def test_replicas_of_unequal_weight_of_whom_some_are_away():
  own = dict(zip(SOURCE.ids, (1.0, 3.0, 0.5)))
  first, second, third = SOURCE.ids
  cohorts = [
    [first, second, third],
    [first, third],
    [first, second, third],
    [first, second],
    [second, third],
    [first, second, third],
  ]
  with jax.enable_x64(True):
    algorithm, owner = streaming(overlap=2), owners((0, 1, 0, 1), 0)
    state = run(algorithm, len(cohorts), cohorts, weights=own)[-1]
    weights = [
      [own[i] if i in ids else 0.0 for i in SOURCE.ids]
      for index, ids in enumerate(cohorts)
      for _ in range(algorithm.local_steps(index))
    ]
    r, w = by_the_paper(
      len(weights), owner, 7, (3, 0), 2, 0.5, np.array(weights)
    )
    arrived = np.asarray(state.extra["age"])[owner] < 0
    assert arrived.any()
    np.testing.assert_allclose(
      flat(state.trainable)[arrived], r[arrived], rtol=1e-10
    )
    for c in range(NUM_REPLICAS):
      got = flat(jax.tree.map(lambda x, c=c: x[c], state.clients["weights"]))
      np.testing.assert_allclose(got, w[c], rtol=1e-10)


def test_replicas_may_join_and_leave():
  ids = list(SOURCE.ids)
  with jax.enable_x64(True):
    algorithm = streaming(overlap=2)
    # The third joins in round 2, from the outer weights that hold then.
    alone = run(algorithm, 3, [[ids[0]], [ids[0]], [ids[2]]])
    first = np.asarray(alone[1].clients["weights"]["layers"]["a"][2])
    np.testing.assert_array_equal(first, LAYERS)  # Not touched before.
    r = flat(alone[2].trainable)
    w, m, v = r.copy(), np.zeros(10), np.zeros(10)
    for t in range(1, 4):  # Rounds have 3, 4, 3 steps.
      w, m, v = adamw(w, m, v, t, SOURCE.read(ids[2]), 6 + t)
      if t == 2:  # What was sent in round 1 arrives.
        own = owners((0, 1, 0, 1), 0) == 1
        w = np.where(own, 0.5 * w + 0.5 * r, w)
    got = jax.tree.map(lambda x: x[2], alone[3].clients["weights"])
    np.testing.assert_allclose(flat(got), w, rtol=1e-10)
    # One that was left out keeps its state to the bit.
    rows = [jax.tree.map(lambda x: x[0], s.clients) for s in alone[2:4]]
    assert reference.state_bytes(rows[0]) == reference.state_bytes(rows[1])


def test_a_replica_of_fewer_steps_still_hears_what_arrives():
  with jax.enable_x64(True):
    algorithm = streaming(num_fragments=1, inner_steps=4, overlap=3, mixing=0.0)
    round_fn = jax.jit(algorithm.round, compiler_options=FAST)
    state = algorithm.init(start())
    cohort, done = cohort_of(algorithm, 0, 0)
    state, _ = round_fn(state, jnp.zeros(()), cohort)
    sent = state.trainable
    short = data.pack(
      SOURCE, SOURCE.ids, batch_size=1, lanes=3, aligned=True,
      local_steps=[4, 2, 3], step_buckets=[16], slot_buckets=[3],
    )  # fmt: skip
    state, _ = round_fn(state, jnp.zeros(()), short)
    # With alpha = 0 the second, which stops before step 3, ends at r itself,
    # and so does the third, which stops there.
    for c in (1, 2):
      own = jax.tree.map(lambda x, c=c: x[c], state.clients["weights"])
      np.testing.assert_array_equal(flat(own), flat(sent))


@pytest.mark.slow
def test_only_a_fragment_crosses_the_network():
  replicas = 8
  num_layers, width = 8, 6
  source = data.from_arrays(
    {f"replica {c}": {"x": np.ones((4, width), np.float32)} for c in range(8)}
  )

  def deep(w, base, batch, key):
    del base, key
    x = batch["x"]
    for i in range(num_layers):
      x = jnp.tanh(x @ w["layers"]["kernel"][i])
    return jnp.sum(jnp.square(x - w["out"]) * batch["mask"][:, None]), {}

  trainable = {
    "layers": {"kernel": jnp.ones((num_layers, width, width))},
    "out": jnp.ones(width),
  }
  algorithm = algorithms.streaming_diloco(
    deep,
    client_optimizer=ADAMW,
    num_clients=replicas,
    inner_steps=8,
    num_fragments=4,
    overlap=1,
  )
  mesh = sharding.make_mesh({"clients": replicas})
  replicated = jax.NamedSharding(mesh, jax.P())
  with jax.set_mesh(mesh):
    state = algorithm.init(trainable)
    places = jax.tree.map(lambda x: replicated, state)
    row = jax.tree.map(lambda x: replicated, state.clients)
    object.__setattr__(
      places, "clients", clients.store.shardings(mesh, row, replicas)
    )
    cohort = data.pack(
      source, source.ids, batch_size=2, lanes=replicas, aligned=True
    )
    program = jax.jit(
      algorithm.round,
      out_shardings=(places, replicated),
      compiler_options=FAST,
    ).lower(jax.device_put(state, places), None, clients.put(cohort, mesh))
    text = program.compile().as_text()
  sizes = reference.sizes_of_collectives(text)
  # Two layers of eight, and a tensor outside of them, which always has a place.
  assert max(sizes) == 2 * width * width
  up, down = algorithm.bytes_per_client(state)
  assert up == down == 4 * (2 * width * width + width)


def test_bytes_of_every_round():
  algorithm = streaming()
  state = algorithm.init(start())
  e3m0 = streaming(transforms=(compression.e3m0(),))
  for index in range(3):
    now = jax.tree.map(lambda x: x, state)
    object.__setattr__(now, "round", jnp.asarray(index))
    # Fragment 0 has two layers of two weights and the other tensor.
    values = (4, 2) if index % 2 == 0 else (4,)
    expected = 4 * sum(values)
    assert algorithm.bytes_per_client(now) == (expected, expected)
    low = sum(v // 2 + 4 for v in values)
    assert e3m0.bytes_per_client(now)[0] == low


@pytest.mark.slow
def test_low_bit_exchange_stays_near():
  algorithm = streaming(overlap=2)
  e3m0 = streaming(overlap=2, transforms=(compression.e3m0(),))
  with jax.enable_x64(True):
    plain, coarse = (run(a, 3)[-1] for a in (algorithm, e3m0))
    error = reference.relative_error(
      flat(coarse.trainable), flat(plain.trainable), flat(start())
    )
    assert 1e-3 < error < 0.3


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"layer_fragments": (0, 0, 2, 2), "num_fragments": None},
     r"^num_fragments: got 3 for 4 layers, .* a layer in each of 0 to 2"),
    ({"layer_fragments": (0, 1, 1)},
     r"^layer_fragments: got 3 numbers, .* each of the 4 layers"),
    ({"num_fragments": 5}, r"^num_fragments: got 5 for 4 layers"),
    ({"num_fragments": 0}, r"^num_fragments: got 0"),
    ({"inner_steps": 1}, r"^inner_steps: got 1, expected at least one"),
    ({"offsets": (0, 0)}, r"^offsets: got \(0, 0\), expected 2 distinct"),
    ({"offsets": (0, 7)}, r"^offsets: got \(0, 7\), .* in \[0, 7\)"),
    ({"offsets": (1,)}, r"^offsets: got \(1,\), expected 2"),
    ({"overlap": 7}, r"^overlap: got 7, expected in \[0, 7\)"),
    ({"mixing": 1.5}, r"^mixing: got 1.5"),
    ({"pattern": "stride"}, r"^pattern: got 'stride' \(did you mean 'strided'"),
    ({"downlink": compression.int8()}, r"^downlink: got one, but replicas"),
  ],
)  # fmt: skip
def test_bad_options_are_named(options, message):
  with pytest.raises(errors.ConfigError, match=message):
    jax.eval_shape(streaming(**options).init, start())
