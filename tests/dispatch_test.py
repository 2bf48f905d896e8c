"""Several rounds a dispatch, and rows on the device: runs of the same bits."""

import signal
import tracemalloc

import jax
import numpy as np
import pytest
import tiny

from fedfm import dispatch, errors, experiment, interruption, metrics

EVERY = {"checkpoint": {"every": 2}, "rounds": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def built(folder):
  return tiny.build(folder, **EVERY)


@pytest.fixture(scope="module")
def by_two(folder):
  """Two rounds a dispatch, of rows on the device."""
  data = tiny.config(folder)["data"] | {"resident": True}
  return tiny.build(folder, data=data, rounds_per_dispatch=2, **EVERY)


@pytest.fixture(scope="module")
def one_by_one(built, folder):
  """What a run of one round a dispatch leaves."""
  experiment.run(built, folder / "one")
  return tiny.content(folder / "one")


def test_two_rounds_a_dispatch_are_the_same_run(by_two, one_by_one, folder):
  cohorts = by_two.cohorts(range(2))
  assert cohorts.slot.shape[:2] == (2, 1)  # Rounds, lanes.
  assert set(cohorts.batches) == {"row", "mask"}
  experiment.run(by_two, folder / "two")
  assert tiny.content(folder / "two") == one_by_one
  lines = metrics.read(folder / "two")[1:]
  assert [line["time/compilations"] for line in lines] == [1, 0, 0, 0]
  # What a dispatch takes is divided among its rounds.
  seconds = [line["time/round_seconds"] for line in lines]
  assert seconds[0] == pytest.approx(seconds[1]) != pytest.approx(seconds[2])
  assert all(line["time/tokens_per_second"] > 0 for line in lines)


def test_a_stopped_run_goes_on_after_its_dispatch(
  by_two, one_by_one, folder, monkeypatch
):
  with monkeypatch.context() as patch:
    patch.setattr(
      interruption.StopRequest, "at", lambda self, step: signal.SIGTERM
    )
    with pytest.raises(interruption.Stopped, match="stopped at round 2"):
      experiment.run(by_two, folder / "stopped")
  assert len(metrics.read(folder / "stopped")) == 3
  experiment.run(by_two, folder / "stopped")
  assert tiny.content(folder / "stopped") == one_by_one


def test_a_bad_round_within_a_dispatch_stops_the_run(by_two, folder):
  other = tiny.variant(by_two, safety={"on_bad_loss": "stop"})

  def run(state, base, cohorts):
    third = int(state.round) == 2
    state, (values, scalars) = by_two.run_rounds(state, base, cohorts)
    if third:
      bad = values["train/loss"].at[0].set(np.nan)
      values = values | {"train/loss": bad}
    return state, (values, scalars)

  other.__dict__["run_rounds"] = run
  with pytest.raises(errors.DivergedError, match="^round 3: .* of round 2$"):
    experiment.run(other, folder / "bad")
  assert [line["round"] for line in metrics.read(folder / "bad")] == [
    0, 1, 2, 3,
  ]  # fmt: skip


def test_bytes_of_rounds_follow_from_scalars_of_the_state(built):
  state = built.initial_state()
  like = dispatch.shapes(state)
  scalars = [np.array([5, 6]) for x in jax.tree.leaves(like) if not x.shape]

  def bytes_per_client(began):
    kernel = jax.tree.leaves(began.trainable)[0]
    assert kernel.shape and isinstance(kernel, jax.ShapeDtypeStruct)
    return int(began.round), 0

  outcomes = dispatch.outcomes(
    ({"loss": np.array([1.0, 2.0])}, scalars), like, bytes_per_client
  )
  assert [one.sizes for one in outcomes] == [(5, 0), (6, 0)]
  assert [one.metrics["loss"] for one in outcomes] == [1.0, 2.0]


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    # Cohorts of other numbers of clients and steps share a dispatch.
    {"sampler": "poisson", "clients_per_round": 2, "client": {"batch_size": 1}},
    # What is sent differs by round.
    {"algorithm": "rolora"},
    # Clients keep states.
    {"algorithm": "scaffold", "mesh": {"clients": 4, "fsdp": 2}},
    {"data": {"schedule": "phases", "resident": True, "schedule_options": {
      "num_phases": 2, "rounds_each": 1}}},
    # Noise and epsilon are those of each round.
    {"sampler": "poisson", "clients_per_round": 2, "privacy": {
      "kind": "gaussian", "clip_norm": 0.1, "noise_multiplier": 1.3,
      "delta": 1e-3}},
  ],
  ids=["poisson", "rolora", "scaffold on a mesh", "resident phases", "private"],
)  # fmt: skip
def test_runs_of_two_rounds_a_dispatch(folder, tmp_path, changes):
  lines = {}
  for each in (1, 2):
    config = tiny.config(folder, **(EVERY | changes), rounds_per_dispatch=each)
    if each == 1:
      config["data"] = config["data"] | {"resident": False}
    experiment.train(config, tmp_path / str(each))
    lines[each] = tiny.content(tmp_path / str(each))["metrics"]
  for one, two in zip(lines[1], lines[2], strict=True):
    assert two == pytest.approx(one, rel=1e-5, abs=1e-7, nan_ok=True)


@pytest.mark.parametrize(
  ("first", "last", "each"),
  [(0, 6, 1), (0, 6, 3), (2, 9, 3), (3, 9, 3), (5, 6, 4), (6, 6, 2), (7, 6, 1)],
)
def test_spans_are_the_rounds_split_at_multiples(first, last, each):
  spans = dispatch.Spans(first, last, each)
  assert [r for span in spans for r in span] == list(range(first, last))
  assert len(spans) == len(list(spans)) and all(spans)
  assert all(s.start % each == 0 for s in list(spans)[1:])
  assert all(s.stop % each == 0 for s in list(spans)[:-1])


def test_millions_of_spans_take_no_memory():
  tracemalloc.start()
  spans = dispatch.Spans(0, 2**31 - 1, 1)
  assert spans[len(spans) - 1] == range(2**31 - 2, 2**31 - 1)
  assert tracemalloc.get_traced_memory()[1] < 1e5
  tracemalloc.stop()
