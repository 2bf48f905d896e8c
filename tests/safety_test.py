"""Bad clients are left out and named; a bad loss warns, stops or rolls back."""

import dataclasses
import logging
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import tiny

from fedfm import (
  algorithms,
  checkpoint,
  clients,
  data,
  errors,
  evaluation,
  experiment,
  guard,
  interruption,
  metrics,
  sums,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  return tiny.build(
    tmp_path_factory.mktemp("tiny"), rounds=6, checkpoint={"every": 2}
  )


def poisoned(built, when, positions=None, factor=None, **changes):
  """The experiment, with clients or losses that go wrong in some rounds.

  Args:
    built: The experiment.
    when: Which rounds, from 1.
    positions: Clients whose data is NaN; default all of the cohort.
    factor: Multiplies the loss that is reported instead.
    **changes: For `tiny.variant`.
  """
  other = tiny.variant(built, **changes)

  def run(state, base, cohort):
    bad = int(state.round) + 1 in when
    if bad and factor is None:
      mask = np.array(cohort.batches["loss_mask"])
      for position in range(3) if positions is None else positions:
        lane, steps = reference.rows_of(cohort, position)
        mask[lane, steps] = np.nan
      place = cohort.batches["loss_mask"].sharding
      batches = cohort.batches | {"loss_mask": jax.device_put(mask, place)}
      cohort = dataclasses.replace(cohort, batches=batches)
    state, values = built.run_naming_round(state, base, cohort)
    if bad and factor is not None:
      values |= {"train/loss": factor * values["train/loss"]}
    return state, values

  other.__dict__["run_naming_round"] = run
  return other


def lines(workdir):
  return {line["round"]: line for line in metrics.read(workdir)}


def test_bad_clients_are_named(built, tmp_path, caplog):
  run = poisoned(built, {2}, positions=(0, 2), rounds=2)
  with caplog.at_level(logging.WARNING, logger="fedfm"):
    summary = experiment.run(run, tmp_path)[0]
  ids = built.client_ids(1)
  found = lines(tmp_path)
  assert found[2]["clients/nonfinite_ids"] == [ids[0], ids[2]]
  assert found[2]["clients/nonfinite"] == 2 == summary["clients/nonfinite"]
  assert found[2]["clients/participating"] == 1
  assert found[2]["train/loss"] > 0 and "safety/problem" not in found[2]
  assert "clients/nonfinite_ids" not in found[1]
  (warning,) = [r.getMessage() for r in caplog.records if "fedfm" in r.name]
  assert warning == (f"round 2: left out as not finite: {ids[0]!r}, {ids[2]!r}")


def test_a_round_of_bad_clients_only_is_a_no_op(built, tmp_path, caplog):
  run = poisoned(built, {2}, rounds=2)
  with caplog.at_level(logging.WARNING, logger="fedfm"):
    experiment.run(run, tmp_path)
  experiment.run(tiny.variant(built, rounds=1), tmp_path / "one")
  found = lines(tmp_path)
  assert found[2]["train/loss"] is None
  assert found[2]["safety/problem"] == "no client was finite"
  assert "round 2: no client was finite" in caplog.text
  after = tiny.content(tmp_path)["arrays"]
  before = tiny.content(tmp_path / "one")["arrays"]
  assert {k for k in after if after[k] != before[k]} == {"round"}


def test_a_loss_that_is_not_finite_condemns_its_client():
  """Although the weights that come with it are finite."""

  def loss(w, base, batch, key):
    error = jnp.sum(batch["mask"] * jnp.square(w - batch["y"]))
    return error + jnp.where(jnp.max(batch["y"]) > 5, jnp.inf, 0.0), {}

  source = data.from_arrays(
    {f"c{i}": {"y": np.full(2, y, np.float32)} for i, y in enumerate((1, 9, 3))}
  )
  algorithm = algorithms.fedavg(loss, client_optimizer=optax.sgd(0.1))
  state, runs = algorithm.init(jnp.zeros(())), {}
  run = jax.jit(clients.naming_clients(algorithm.round))
  for name, ids in (("all", source.ids), ("good", ("c0", "c2"))):
    cohort = data.pack(
      source, ids, batch_size=2, lanes=1, step_buckets=[3], slot_buckets=[3]
    )
    runs[name] = run(state, None, cohort)
  (after, got), (expected, _) = runs["all"], runs["good"]
  assert after.trainable == expected.trainable != 0
  assert got["clients/nonfinite"] == 1 and np.isfinite(got["train/loss"])
  assert got["clients/nonfinite_mask"].tolist()[:3] == [False, True, False]
  plain = jax.jit(algorithm.round)(state, None, cohort)[1]
  assert all(value.shape == () for value in plain.values())


def test_a_bad_loss_stops_the_run(built, tmp_path):
  stop = {"on_bad_loss": "stop"}
  run = poisoned(built, {4}, safety=stop)
  for _ in range(2):  # The same command comes to the same end.
    with pytest.raises(errors.DivergedError) as error:
      experiment.run(run, tmp_path)
    assert str(error.value) == (
      "round 4: no client was finite; stopped (safety.on_bad_loss = 'stop'); "
      "the newest checkpoint is of round 2"
    )
    assert error.value.exit_code == 4
    assert max(lines(tmp_path)) == 4 and len(lines(tmp_path)) == 5
  experiment.run(poisoned(built, {4}), tmp_path)  # Told to go on, it does.
  assert tiny.content(tmp_path)["summary"]["safety/problems"] == 1


def rolled_back(built, tmp_path, rounds, **safety):
  safety = {"on_bad_loss": "roll_back"} | safety
  run = poisoned(built, rounds, safety=safety)
  experiment.run(run, tmp_path)
  return tiny.content(tmp_path)


def test_a_roll_back_leaves_rounds_out(built, tmp_path):
  got = rolled_back(built, tmp_path / "run", {4})
  line = lines(tmp_path / "run")[4]
  assert line["safety/rolled_back_to"] == 2
  assert len(got["metrics"]) == 7 and got["extra"]["rollbacks"] == 1
  # By hand: rounds 1 and 2, then 5 and 6.
  state = built.initial_state()
  with jax.set_mesh(built.mesh):
    for index in (0, 1, 4, 5):
      number = jax.device_put(np.int32(index), state.round.sharding)
      state = dataclasses.replace(state, round=number)
      state, _ = built.run_naming_round(state, built.base, built.cohort(index))
  expected = checkpoint.Checkpointer(tmp_path / "by hand")
  expected.save(6, state, block=True)
  leaves = expected.manifest(6)["leaves"]
  assert got["arrays"] == {leaf["path"]: leaf["digest"] for leaf in leaves}


def test_a_roll_back_does_not_depend_on_interruptions(
  built, tmp_path, monkeypatch
):
  expected = rolled_back(built, tmp_path / "whole", {4})
  safety = {"on_bad_loss": "roll_back"}
  run = poisoned(built, {4}, safety=safety)
  write = metrics.MetricsWriter.write
  for round in (3, 4, 5):

    def write_and_stop(self, line, round=round):
      write(self, line)
      if line["round"] == round:
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
      patch.setattr(metrics.MetricsWriter, "write", write_and_stop)
      with pytest.raises(interruption.Stopped):
        experiment.run(run, tmp_path / "stopped")
  experiment.run(run, tmp_path / "stopped")
  assert tiny.content(tmp_path / "stopped") == expected


def test_roll_backs_are_counted(built, tmp_path):
  with pytest.raises(errors.DivergedError, match="round 5: .* after 1 roll-ba"):
    rolled_back(built, tmp_path, {4, 5}, max_rollbacks=1)


def test_a_jump_is_a_bad_loss(built, tmp_path):
  run = poisoned(
    built,
    {5},
    factor=3.0,
    safety={"on_bad_loss": "roll_back", "max_jump": 2.0},
  )
  experiment.run(run, tmp_path)
  line = lines(tmp_path)[5]
  assert line["safety/rolled_back_to"] == 4
  assert "more than 2 times" in line["safety/problem"]
  assert "the median of 4 rounds" in line["safety/problem"]


def test_the_guard_forgets_old_rounds_and_ignores_empty_ones():
  judge = guard.LossGuard(max_jump=2.0, window=3)
  for loss in (9.0, 8.0, 7.0, 1.0, 1.0, 1.0):
    assert judge.judge(loss, 4, 0) is None
  assert judge.judge(float("nan"), 0, 0) is None  # Nobody came.
  assert judge.losses == [1.0, 1.0, 1.0]
  assert judge.judge(2.5, 4, 0) is not None
  assert judge.judge(float("inf"), 4, 0) == "train/loss is inf"
  assert judge.losses == [1.0, 1.0, 1.0]


def test_counts_do_not_stall():
  """A client of more than 2**24 tokens, and as many clients as it takes."""
  million = 2.0**20

  def loss(w, base, batch, key):
    aux = {"tokens": jnp.where(batch["big"][0] > 0, 16 * million, 1.0)}
    aux |= {"loss_sum": 0.0 * w, "correct": aux["tokens"]}
    return jnp.sum(w * batch["mask"]), aux

  big = np.zeros(101, np.float32)
  big[0] = 1
  source = data.from_arrays({"a": {"big": big}, "b": {"big": big}})
  algorithm = algorithms.fedavg(
    loss, client_optimizer=optax.sgd(0.0), weighting="tokens"
  )
  cohort = data.pack(source, source.ids, batch_size=1, lanes=1)
  state = algorithm.init(jnp.zeros(()))
  _, got = jax.jit(algorithm.round)(state, None, cohort)
  # Exact to one rounding; adding ones to 2**24 would stay there.
  exact = 2 * (16 * million + 100)
  assert got["train/count"] == np.float32(exact)
  totals = jax.jit(
    lambda c: evaluation.evaluate_cohort(loss, jnp.zeros(()), None, c)
  )(cohort)
  np.testing.assert_array_equal(totals["tokens"][:2], np.float32(exact / 2))
  np.testing.assert_array_equal(totals["tokens"], totals["correct"])
  ones = jnp.concatenate([jnp.full(1, 2.0**24), jnp.ones(999)])
  assert float(jax.jit(sums.total)(ones)) == 2.0**24 + 999 + 1  # Even.


def test_a_running_sum_is_exact_under_jit():
  """Were the compiler to reorder it, nothing would be left of it."""
  terms = np.random.default_rng(0).lognormal(0, 3, 10_000).astype(np.float32)

  def step(carry, x):
    return sums.add(*carry, x), None

  zero = (jnp.zeros(()), jnp.zeros(()))
  (total, _), _ = jax.jit(lambda x: jax.lax.scan(step, zero, x))(terms)
  exact = np.sum(terms, dtype=np.float64)
  assert abs(float(total) - exact) <= np.spacing(np.float32(exact))
  assert float(jax.jit(sums.total)(terms)) == np.float32(exact)
