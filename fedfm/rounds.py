"""The training loop: rounds, and what is reported, judged and saved."""

import collections
from collections.abc import Callable
import contextlib
import dataclasses
import logging
import math
import pathlib
from typing import Any

import jax
import numpy as np

from fedfm import (
  checkpoint,
  dispatch,
  errors,
  goodput,
  personalization,
  prefetch,
  privacy,
  run_log,
)
from fedfm.assembly import Experiment
from fedfm.guard import LossGuard
from fedfm.interruption import Stopped, StopRequest
from fedfm.types import Cohort, ServerState

# Waits for rounds that were started, and tells what each brought.
Fetch = Callable[[], list[dispatch.Outcome]]
_LOG = logging.getLogger("fedfm")
_MOST_NAMED = 10  # Clients on one line of the log; metrics.jsonl has all.


class Training:
  """One process's part of a run, from a state to the last round."""

  def __init__(
    self,
    experiment: Experiment,
    checkpointer: checkpoint.Checkpointer,
    reports: run_log.Reports,
    clock: goodput.Clock,
    extra: dict[str, Any],
    profile: tuple[int, pathlib.Path] | None = None,
  ):
    """Continues, or begins.

    Args:
      experiment: What to train.
      checkpointer: Where to save.
      reports: Where to report.
      clock: Measures everything.
      extra: Of the checkpoint that was restored, or {}.
      profile: A round to trace, and where to write its profile.
    """
    self._experiment = experiment
    self._settings = experiment.settings
    self._checkpointer = checkpointer
    self._reports = reports
    self._clock = clock
    self._profile = profile
    safety = self._settings.safety
    self._guard = LossGuard(
      safety.max_jump, safety.window, extra.get("losses", ())
    )
    self._rollbacks: int = extra.get("rollbacks", 0)
    self._best_by = self._settings.checkpoint.best_by
    same = extra.get("best_by") == self._best_by
    self._best: float | None = extra["best"] if same else None
    self._ledger: privacy.Ledger | None = None
    if experiment.accounting is not None:
      stored = extra.get("privacy")
      self._ledger = privacy.Ledger(experiment.accounting, stored)
    self._saved = -1
    self._round_seconds = self._seconds = 0.0
    self._share: dict[str, Any] = {}  # Of a round, in what its dispatch took.
    on_cpu = experiment.mesh.devices.flat[0].platform == "cpu"
    # Metrics are fetched while the next round runs, but: virtual CPU devices
    # deadlock with more than one round under way, and a guard has to see a
    # round before the next.
    self._ahead = 0 if on_cpu or safety.on_bad_loss != "continue" else 1

  def begin(self, state: ServerState) -> None:
    """Evaluates and saves the state before the first round."""
    line = {"round": 0, **self._evaluate(state)}
    score = self._score(line)
    self._write(line)
    self._save(0, state, score)

  def run(
    self, state: ServerState, first: int, stop: StopRequest
  ) -> ServerState:
    """Runs rounds [first, settings.rounds).

    Args:
      state: After round `first`.
      first: Rounds done.
      stop: Asked after every round.

    Returns:
      The last state, saved.

    Raises:
      CheckpointError: The privacy ledger is not that of `first` rounds.
      Stopped: It was asked to stop; the state is saved.
      DivergedError: The loss went wrong.
      SaveError: The disk is full, for example.
    """
    s = self._settings
    if self._ledger is not None and self._ledger.rounds != first:
      raise errors.CheckpointError(
        f"privacy ledger: got {self._ledger.rounds} rounds of privacy in the "
        f"checkpoint of round {first}, expected {first}"
      )
    under_way: collections.deque[tuple[range, Fetch]] = collections.deque()
    spans = dispatch.Spans(first, s.rounds, s.rounds_per_dispatch)
    cohorts = prefetch.prefetch(
      lambda index: self._cohort(spans[index]), 0, len(spans)
    )
    with contextlib.closing(cohorts):
      while True:
        with self._clock.measure("data_wait"):
          index, cohort = next(cohorts, (None, None))
        if index is None or cohort is None:
          break
        rounds, done = spans[index], spans[index].stop
        profiled = self._profile is not None and (
          self._profile[0] - 1 in rounds
        )
        while profiled and under_way:
          state = self._settle(*under_way.popleft(), state)
        with self._traced(profiled), self._clock.measure("round"):
          state, fetch = self._dispatch(state, cohort)
          under_way.append((rounds, fetch))
          if profiled:
            jax.block_until_ready(state)
        due = self._is_due(done) or profiled
        while under_way and (due or len(under_way) > self._ahead):
          state = self._settle(*under_way.popleft(), state)
        # Processes agree on steps that are counted one by one.
        signum = stop.at(first + index + 1)
        if signum is not None and done < s.rounds:
          while under_way:
            state = self._settle(*under_way.popleft(), state)
          self._save(done, state)
          self._checkpointer.wait()
          self._reports.say(f"stopped at round {done}, which is saved")
          raise Stopped(signum, done)
    with self._clock.measure("checkpoint"):
      self._checkpointer.wait()
    return state

  def _cohort(self, rounds: range) -> Cohort:
    if self._settings.rounds_per_dispatch > 1:
      return self._experiment.cohorts(rounds)
    return self._experiment.cohort(rounds.start)

  def _dispatch(
    self, state: ServerState, cohort: Cohort
  ) -> tuple[ServerState, Fetch]:
    """Starts a round, or several, and says how to get what they brought."""
    one = self._experiment
    bytes_per_client = one.algorithm.bytes_per_client
    if self._settings.rounds_per_dispatch > 1:
      like = dispatch.shapes(state)
      state, several = one.run_rounds(state, one.base, cohort)
      return state, lambda: dispatch.outcomes(
        jax.device_get(several), like, bytes_per_client
      )
    # Of the state that is donated: what is sent may differ by round.
    sizes = bytes_per_client(state)
    state, values = one.run_naming_round(state, one.base, cohort)
    return state, lambda: [dispatch.Outcome(jax.device_get(values), sizes)]

  def _is_due(self, done: int) -> bool:
    """Whether the state after this round is looked at, before the next."""
    s = self._settings
    return (
      done == s.rounds
      or done % s.eval.every == 0
      or done % s.checkpoint.every == 0
    )

  def _settle(
    self, rounds: range, fetch: Fetch, state: ServerState
  ) -> ServerState:
    """Reports, judges and saves rounds; returns the state to go on with."""
    with self._clock.measure("round"):
      results = fetch()
    if len(rounds) > 1:
      shares = dispatch.divided(self._clock.take(), len(rounds))
    else:
      shares = [{}]
    for done, outcome, share in zip(
      range(rounds.start + 1, rounds.stop + 1), results, shares, strict=True
    ):
      self._share = share
      state = self._settle_one(done, outcome, state)
    return state

  def _settle_one(
    self, done: int, outcome: dispatch.Outcome, state: ServerState
  ) -> ServerState:
    """As `_settle`; `state` is that of the last round of the dispatch.

    Only there anything is evaluated or saved.
    """
    s, values = self._settings, outcome.metrics
    mask = values.pop("clients/nonfinite_mask", None)
    line: dict[str, Any] = {"round": done}
    line |= {k: v.item() for k, v in values.items()}
    self._name_nonfinite(done, mask, line)
    participating = int(line["clients/participating"])
    if not participating:
      line["train/loss"] = math.nan  # Of nobody; null in the file.
    problem = self._guard.judge(
      line["train/loss"], participating, int(line["clients/nonfinite"])
    )
    if problem is not None:
      line["safety/problem"] = problem
      state = self._handle(problem, line, state)
    rolled_back = "safety/rolled_back_to" in line
    work = self._experiment.plan(done - 1)
    line |= self._experiment.ledger.line(work, *outcome.sizes)
    if self._ledger is not None:
      line["privacy/epsilon"] = self._ledger.charge()
    last = done == s.rounds
    if last or done % s.eval.every == 0:
      line |= self._evaluate(state)
    score = self._score(line)
    is_best = self._is_best(score)
    with self._clock.measure("checkpoint"):
      # A save may take as long as one round: were others told to be done
      # meanwhile, a kill would lose more of them than lie between two saves.
      self._checkpointer.wait()
    self._write(line)
    self._reports.update(
      done,
      loss=line["train/loss"],
      tokens_per_second=line["time/tokens_per_second"],
    )
    if last or done % s.checkpoint.every == 0 or rolled_back or is_best:
      self._save(done, state, score)
    return state

  def _write(self, line: dict[str, Any]) -> None:
    """Adds where the time went, and reports."""
    times = self._clock.take()
    times = {k: v + self._share.get(k, 0) for k, v in times.items()}
    self._round_seconds += times["time/round_seconds"]
    self._seconds += times["time/elapsed_seconds"]
    busy = times["time/round_seconds"] + times["time/data_wait_seconds"]
    if "train/count" in line:
      times["time/tokens_per_second"] = line["train/count"] / max(busy, 1e-9)
    times["time/goodput"] = self._round_seconds / max(self._seconds, 1e-9)
    line |= times | goodput.memory()
    self._reports.write(line)

  def _name_nonfinite(self, done: int, mask, line: dict[str, Any]) -> None:
    if not line["clients/nonfinite"] or mask is None:
      return
    ids = self._experiment.client_ids(done - 1)
    bad = [ids[i] for i in np.flatnonzero(mask).tolist()]
    line["clients/nonfinite_ids"] = bad
    more = f" and {len(bad) - _MOST_NAMED} more" * (len(bad) > _MOST_NAMED)
    if jax.process_index() == 0:
      _LOG.warning(
        "round %d: left out as not finite: %s%s",
        done,
        ", ".join(map(repr, bad[:_MOST_NAMED])),
        more,
      )

  def _handle(
    self, problem: str, line: dict[str, Any], state: ServerState
  ) -> ServerState:
    """Does what `safety.on_bad_loss` says."""
    done, policy = line["round"], self._settings.safety.on_bad_loss
    if policy == "continue":
      if jax.process_index() == 0:
        _LOG.warning("round %d: %s", done, problem)
      return state
    if policy == "roll_back" and (
      self._rollbacks < self._settings.safety.max_rollbacks
    ):
      return self._roll_back(problem, line, state)
    # As everywhere: what is told of is in a checkpoint, or after one.
    self._checkpointer.wait()
    self._write(line)
    latest = self._checkpointer.latest()
    after = f" after {self._rollbacks} roll-backs" if self._rollbacks else ""
    raise errors.DivergedError(
      f"round {done}: {problem}; stopped{after} (safety.on_bad_loss = "
      f"{policy!r}); the newest checkpoint is of round {latest}"
    )

  def _roll_back(
    self, problem: str, line: dict[str, Any], state: ServerState
  ) -> ServerState:
    """Undoes the rounds since the last regular checkpoint, and leaves them out.

    Only regular ones, so that where a run was interrupted changes nothing.
    """
    done, every = line["round"], self._settings.checkpoint.every
    with self._clock.measure("checkpoint"):
      restored = self._checkpointer.restore(
        checkpoint.abstract(state),
        choose=lambda r: r < done and r % every == 0,
      )
    if restored is None:
      raise errors.DivergedError(
        f"round {done}: {problem}; there is no checkpoint to roll back to"
      )
    back, state, extra = restored
    self._rollbacks += 1
    self._guard.losses = list(extra.get("losses", ()))
    line["safety/rolled_back_to"] = back
    if jax.process_index() == 0:
      _LOG.warning(
        "round %d: %s; back to the state of round %d, without rounds %d to %d",
        done,
        problem,
        back,
        back + 1,
        done,
      )
    count = jax.make_array_from_callback(
      (), state.round.sharding, lambda _: np.asarray(done, state.round.dtype)
    )
    return dataclasses.replace(state, round=count)

  def _evaluate(self, state: ServerState) -> dict[str, float]:
    with self._clock.measure("evaluation"):
      return personalization.evaluate_all(self._experiment, state)

  def _score(self, line: dict[str, Any]) -> float | None:
    """The metric by which the best round is kept, the lower the better."""
    c = self._settings.checkpoint
    value = line.get(c.keep_best) if c.keep_best else None
    if value is None or not math.isfinite(value):
      return None
    return -value if c.best_is == "highest" else value

  def _is_best(self, score: float | None) -> bool:
    return score is not None and (self._best is None or score < self._best)

  def _save(
    self, done: int, state: ServerState, score: float | None = None
  ) -> None:
    if done == self._saved:
      return
    if self._is_best(score):
      self._best = score
    extra: dict[str, Any] = {
      "losses": self._guard.losses,
      "rollbacks": self._rollbacks,
      "best": self._best,
      "best_by": self._best_by,
      "score": score,
    }
    if self._ledger is not None:
      extra["privacy"] = self._ledger.to_json()
    with self._clock.measure("checkpoint"):
      self._reports.sync()
      self._checkpointer.save(done, state, extra)
    self._saved = done

  @contextlib.contextmanager
  def _traced(self, profiled: bool):
    if not profiled or self._profile is None:
      yield
      return
    with jax.profiler.trace(str(self._profile[1])):
      yield
    self._reports.say(f"profile of round {self._profile[0]} written")
