"""Packing: nothing lost, nothing doubled, and the same on any processes."""

import dataclasses
import re
import types

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import reference

from fedfm import data, errors, planning, settings
from fedfm.data import packing


def steps_of(cohort, position):
  """A client's steps, in order: a list of the examples' ids of each batch."""
  lane, steps = reference.rows_of(cohort, position)
  ids, mask = cohort.batches["id"][lane], cohort.batches["mask"][lane]
  return [ids[t][mask[t] > 0].tolist() for t in range(steps.start, steps.stop)]


sizes_strategy = st.lists(st.integers(1, 30), min_size=1, max_size=12)
options_strategy = st.fixed_dictionaries(
  {
    "batch_size": st.integers(1, 7),
    "epochs": st.integers(1, 3),
    "lanes": st.integers(1, 6),
    "shuffle": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
    "round": st.integers(0, 1000),
  }
)
quick = hypothesis.settings(max_examples=30, deadline=None)


@quick
@hypothesis.given(sizes_strategy, options_strategy, st.randoms())
def test_every_example_is_there_as_often_as_there_are_epochs(
  sizes, options, random
):
  source = reference.numbered(sizes)
  ids = random.sample(source.ids, random.randint(1, len(sizes)))
  cohort = data.pack(source, ids, **options)
  for position, client_id in enumerate(ids):
    own = source.read(client_id)["id"].tolist()
    steps = steps_of(cohort, position)
    per_epoch = -(-len(own) // options["batch_size"])
    for epoch in range(options["epochs"]):
      epoch_steps = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
      seen = sum(epoch_steps, [])
      if options["shuffle"]:
        assert sorted(seen) == own
      else:
        assert seen == own
      # Only the last batch of an epoch may be part full.
      assert all(len(s) == options["batch_size"] for s in epoch_steps[:-1])
    lane, slot = divmod(int(cohort.order[position]), cohort.row.shape[1])
    assert cohort.num_examples[lane, slot] == len(own)
    assert cohort.num_steps[lane, slot] == len(steps)
    assert cohort.row[lane, slot] == source.index(client_id)
    assert cohort.weight[lane, slot] == 1
    np.testing.assert_array_equal(
      cohort.id_hash[lane, slot], packing.id_hash(client_id)
    )
  total = options["epochs"] * sum(source.size(i) for i in ids)
  assert cohort.batches["mask"].sum() == total
  for name in ("id", "x"):
    padded = cohort.batches[name][cohort.batches["mask"] == 0]
    assert not padded.any()


@quick
@hypothesis.given(sizes_strategy, options_strategy)
def test_flags_slots_and_boundaries_agree(sizes, options):
  source = reference.numbered(sizes)
  cohort = data.pack(source, source.ids, **options)
  lanes, slots = cohort.row.shape
  used = cohort.order[: len(sizes)]
  assert len(set(used.tolist())) == len(sizes)
  assert (cohort.order[len(sizes) :] == -1).all()
  assert cohort.start.sum() == cohort.end.sum() == len(sizes)
  assert (cohort.weight.reshape(-1)[used] == 1).all()
  assert cohort.weight.sum() == len(sizes)
  count = int(cohort.num_segments)
  bounds = cohort.boundaries[: count + 1]
  assert bounds[0] == 0
  assert (np.diff(bounds) > 0).all()
  assert (cohort.boundaries[count:] == bounds[-1]).all()
  assert bounds[-1] <= cohort.slot.shape[1]
  begins, ends = np.nonzero(cohort.start)[1], np.nonzero(cohort.end)[1]
  assert set(begins) <= set(bounds[:-1])
  assert set(ends + 1) == set(bounds[1:])
  for lane in range(lanes):
    begins = np.flatnonzero(cohort.start[lane])
    ends = np.flatnonzero(cohort.end[lane])
    # Back to back: a client starts where the one before it ended.
    np.testing.assert_array_equal(begins[1:], ends[:-1] + 1)
    np.testing.assert_array_equal(begins[:1], np.zeros_like(begins[:1]))
    for slot, (begin, end) in enumerate(zip(begins, ends)):
      assert cohort.num_steps[lane, slot] == end - begin + 1
      assert (cohort.slot[lane, begin : end + 1] == slot).all()
      assert cohort.batches["mask"][lane, begin : end + 1].any(axis=1).all()
    assert (cohort.weight[lane, : len(begins)] == 1).all()
    assert not cohort.weight[lane, len(begins) :].any()
    assert cohort.slot[lane].max() < slots
    idle = ends[-1] + 1 if len(ends) else 0
    assert not cohort.batches["mask"][lane, idle:].any()


def test_shuffle_is_a_function_of_seed_round_client_and_epoch():
  source = reference.numbered([40, 40, 5])

  def order(client_id="client 0", ids=None, lanes=1, **options):
    ids = [client_id] if ids is None else ids
    cohort = data.pack(
        source, ids, batch_size=3, epochs=2, lanes=lanes, shuffle=True,
        **options,
    )  # fmt: skip
    seen = sum(steps_of(cohort, ids.index(client_id)), [])
    return [x % 1000 for x in seen]

  plain = order(seed=1, round=2)
  assert plain != list(range(40)) * 2
  assert plain[:40] != plain[40:]
  assert order(seed=1, round=2) == plain
  others = ["client 2", "client 1", "client 0"]
  assert order(ids=others, lanes=2, seed=1, round=2) == plain
  assert order(seed=2, round=2) != plain
  assert order(seed=1, round=3) != plain
  assert order(seed=2, round=1) != plain
  assert order("client 1", seed=1, round=2) != plain


@quick
@hypothesis.given(
  sizes_strategy, options_strategy, st.integers(1, 9), st.integers(1, 20)
)
def test_caps_on_steps_and_examples(sizes, options, local_steps, max_examples):
  source = reference.numbered(sizes)
  cohort = data.pack(
      source, source.ids, local_steps=local_steps, max_examples=max_examples,
      **options,
  )  # fmt: skip
  for position, size in enumerate(sizes):
    used, steps = min(size, max_examples), steps_of(cohort, position)
    per_epoch = -(-used // options["batch_size"])
    assert len(steps) == min(local_steps, options["epochs"] * per_epoch)
    for epoch in range(len(steps) // per_epoch):
      seen = sum(steps[epoch * per_epoch : (epoch + 1) * per_epoch], [])
      assert len(seen) == len(set(seen)) == used
      if not options["shuffle"]:
        assert [x % 1000 for x in seen] == list(range(used))
    lane, slot = divmod(int(cohort.order[position]), cohort.row.shape[1])
    distinct = len(set(sum(steps, [])))
    assert cohort.num_examples[lane, slot] == distinct


@quick
@hypothesis.given(
  sizes_strategy, options_strategy, st.integers(1, 3), st.integers(1, 3)
)
def test_processes_hold_their_own_lanes_of_one_layout(
  sizes, options, processes, lanes
):
  source = reference.numbered(sizes)
  options |= {"lanes": processes * lanes}
  whole = data.pack(source, source.ids, **options)
  read = []
  parts = []
  for process in range(processes):
    watched = dataclasses.replace(
      source, read_fn=lambda c: read.append(c) or source.read(c)
    )
    parts.append(
      data.pack(
        watched,
        source.ids,
        process_index=process,
        process_count=processes,
        **options,
      )  # fmt: skip
    )
  # Beside the spec of the first client, each process reads its own only.
  assert len(read) == len(sizes) + processes
  for field in dataclasses.fields(whole):
    values = [getattr(part, field.name) for part in parts]
    if field.name == "batches":
      for name, expected in whole.batches.items():
        got = np.concatenate([v[name] for v in values])
        np.testing.assert_array_equal(got, expected)
    elif field.name in ("boundaries", "num_segments", "order", "aligned"):
      for value in values:
        np.testing.assert_array_equal(value, getattr(whole, field.name))
    elif field.name == "part":
      lanes_of = [v.lanes if v else range(options["lanes"]) for v in values]
      assert sum(map(list, lanes_of), []) == list(range(options["lanes"]))
    else:
      np.testing.assert_array_equal(
        np.concatenate(values), getattr(whole, field.name)
      )


def test_lanes_are_balanced_on_heavy_tails():
  for seed in range(20):
    sizes = np.random.default_rng(seed).lognormal(3, 1.5, 64).astype(int) + 1
    steps = [packing.steps_per_client(int(n), 4) for n in sizes]
    layout = packing.assign(steps, 8)
    assert sorted(sum(layout, [])) == list(range(64))
    cost = max(sum(steps[c] for c in lane) for lane in layout)
    assert cost <= 1.1 * max(sum(steps) / 8, *steps)
  source = reference.numbered([4] * 8)
  cohort = data.pack(source, source.ids, batch_size=2, lanes=4)
  assert packing.efficiency(cohort) == 1


def test_buffers_take_the_bucket_that_holds_them():
  source = reference.numbered([9, 2, 1])
  cohort = data.pack(
      source, source.ids, batch_size=1, lanes=2, step_buckets=[5, 11, 20],
      slot_buckets=[3],
  )  # fmt: skip
  assert cohort.slot.shape == (2, 11)
  assert cohort.boundaries.shape == (12,)
  assert cohort.row.shape == (2, 3)
  grown = data.pack(
    source, source.ids, batch_size=1, lanes=1, step_buckets=[5, 11]
  )
  assert grown.slot.shape == (1, 16)  # A power of two beyond the buckets.


def test_auto_lanes():
  assert packing.auto_lanes([5] * 100, 8, on_cpu=True) == 8
  assert packing.auto_lanes([], 4, on_cpu=False) == 4
  assert packing.auto_lanes([100, 1, 1], 1, on_cpu=False) == 1
  for devices in (1, 4):
    lanes = packing.auto_lanes([3] * 1000, devices, on_cpu=False)
    assert lanes % devices == 0
    assert lanes > devices


def test_the_lanes_that_were_chosen_are_logged(caplog):
  caplog.set_level("INFO", logger="fedfm")
  source = reference.numbered([3, 1])
  data.pack(source, source.ids, batch_size=1, lanes=2)
  assert not caplog.messages
  cohort = data.pack(source, source.ids, batch_size=1)
  (line,) = caplog.messages
  assert line == f"lanes='auto' chose {cohort.num_lanes} for 2 clients"


@pytest.mark.parametrize("rate", ["a", None, -1, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_named(rate):
  source = reference.numbered([3, 1])
  with pytest.raises(errors.ConfigError, match=f"rates: got {rate!r}, expect"):
    data.pack(source, source.ids, batch_size=1, rates=[1.0, rate])


@pytest.mark.parametrize(
  ("platform", "lanes", "why"),
  [
    ("cpu", "auto", "one for each of 2 along mesh.clients, as these are CPU"),
    ("tpu", "auto", "up to 16 for each of 2 .* the first cohort keeps 3 busy"),
    ("tpu", 4, None),
  ],
)
def test_a_run_says_which_lanes_it_has_and_why(platform, lanes, why):
  device = types.SimpleNamespace(platform=platform)
  mesh = types.SimpleNamespace(
    shape={"clients": 2}, devices=np.array([device, device])
  )
  work = planning.Work(list("abcd"), [4, 4, 3, 1], [1.0] * 4, 4)
  config = settings.Settings(lanes=lanes)
  text = planning.say_lanes(config, lambda round_index: work, mesh, 4)
  expected = rf"4 lanes \(lanes = 'auto': {why}.*\)" if why else "4 lanes"
  assert re.fullmatch(expected, text), text


def test_empty_cohort_has_no_segments():
  cohort = data.pack(reference.numbered([3]), [], batch_size=2, lanes=2)
  assert cohort.num_segments == 0
  assert not cohort.weight.any()
  assert (cohort.order == -1).all()
  assert cohort.batches["id"].shape[2:] == (2,)


def test_numpy_integers_are_integers():
  source = reference.numbered([3, 3])
  counted = dataclasses.replace(source, size_fn=lambda c: np.int64(3))
  cohort = data.pack(
    counted, source.ids, batch_size=np.int64(2), lanes=np.int64(1)
  )
  assert cohort.batches["id"].shape == (1, 4, 2)


def test_epochs_beyond_the_steps_cost_nothing():
  source = reference.numbered([3, 5])
  options = {"batch_size": 2, "local_steps": 4, "shuffle": True}
  many, few = (
    data.pack(source, source.ids, epochs=n, **options) for n in (2**31 - 1, 3)
  )
  for name, x in few.batches.items():
    np.testing.assert_array_equal(many.batches[name], x)
