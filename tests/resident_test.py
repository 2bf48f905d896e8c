"""Data on the device, and several rounds a dispatch, change no number."""

import jax
import numpy as np
import optax
import pytest
import reference

from fedfm import algorithms, data, errors
from fedfm.data import instructions, prompt_formats, resident

SOURCE = reference.mlp_source()
IDS = reference.client_ids()


def pack(source, round_index):
  return data.pack(
    source,
    IDS[round_index:],
    batch_size=reference.BATCH,
    lanes=2,
    shuffle=True,
    round=round_index,
    step_buckets=[32],
    slot_buckets=[len(IDS)],
  )


@pytest.fixture(scope="module")
def one_by_one():
  """State and losses of three rounds, and what they started from."""
  algorithm = algorithms.fedavgm(
    reference.mlp_loss, client_optimizer=optax.sgd(0.1)
  )
  start = algorithm.init(reference.mlp_params())
  run, state, losses = jax.jit(algorithm.round), start, []
  for r in range(3):
    state, metrics = run(state, reference.mlp_base(), pack(SOURCE, r))
    losses.append(metrics["train/loss"])
  return algorithm, start, state, losses


def assert_close(state, other):
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(other)):
    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


def test_rows_of_a_resident_table_train_the_same(one_by_one):
  _, start, expected, losses = one_by_one
  rows, table = resident.rows(SOURCE)
  assert rows.ids == SOURCE.ids
  for client_id in IDS:
    numbers = rows.read(client_id)["row"]
    for name, x in SOURCE.read(client_id).items():
      np.testing.assert_array_equal(table[name][numbers], x)
  algorithm = one_by_one[0]
  run, state = jax.jit(resident.looked_up(algorithm.round)), start
  for r in range(3):
    cohort = pack(rows, r)
    assert set(cohort.batches) == {"row", "mask"}
    state, metrics = run(state, (reference.mlp_base(), table), cohort)
    np.testing.assert_array_equal(metrics["train/loss"], losses[r])
  jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_several_rounds_a_dispatch_are_the_same_rounds(one_by_one):
  algorithm, start, expected, losses = one_by_one
  cohorts = jax.tree.map(
    lambda *x: np.stack(x), *[pack(SOURCE, r) for r in range(3)]
  )
  state, metrics = jax.jit(algorithms.many_rounds(algorithm.round))(
    start, reference.mlp_base(), cohorts
  )
  np.testing.assert_allclose(metrics["train/loss"], losses, rtol=1e-6)
  assert_close(state, expected)


def test_a_table_that_is_too_large_names_its_size():
  with pytest.raises(
    errors.DataError, match="data.resident: more than 10 bytes"
  ):
    resident.rows(SOURCE, max_bytes=10)


def test_packed_prompts_of_a_resident_table_weigh_the_same():
  """A client's weight is its examples, of which a row holds several."""
  counts = {"ann": 2, "bob": 9}
  source = data.instruct(
    data.from_arrays(
      {c: {"ask": ["a"] * n, "say": ["b"] * n} for c, n in counts.items()}
    ),
    data.byte_tokenizer(),
    sequence_length=24,
    fields=instructions.Fields("ask", "say"),
    prompt_format=prompt_formats.builtin("plain"),
  )
  rows, table = resident.rows(source)
  assert "num_examples" not in table
  cohorts = [
    data.pack(s, s.ids, batch_size=1, lanes=1, slot_buckets=[2])
    for s in (source, rows)
  ]
  assert set(cohorts[1].batches) == {"row", "mask"}
  for cohort in cohorts:
    assert sorted(cohort.num_examples.ravel().tolist()) == [2, 9]
