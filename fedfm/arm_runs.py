"""Runs an arm of a comparison: its seeds and rates share a compiled round.

What was run is kept in a file of the arm's settings, and not run again.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np

from fedfm import assembly, errors, personalization, run_folder
from fedfm import settings as settings_lib
from fedfm.assembly import Experiment
from fedfm.settings import Settings
from fedfm.types import Cohort, ServerState

Case = tuple[int, float]  # Seed, multiple of the client learning rate.
_LOG = logging.getLogger("fedfm")


def expect_metric(name: str, line: Mapping[str, Any]) -> None:
  """Raises ConfigError unless a line of metrics has one of that name."""
  if name not in line:
    hint = errors.nearest(name, line)
    raise errors.ConfigError(f"metric: got {name!r}{hint}")


def kept_runs(
  settings: Settings,
  seeds: Sequence[int],
  metric: str,
  folder: pathlib.Path,
  parallel: bool | None,
) -> Callable[[Sequence[Case]], list[dict[str, Any]]]:
  """Runs what the arm's file does not hold.

  Args:
    settings: As in `make_runner`.
    seeds: As in `make_runner`.
    metric: As in `make_runner`.
    folder: Holds the files.
    parallel: As in `make_runner`.

  Returns:
    `run(cases) -> runs`, as `make_runner` does, which is called if it has to.
  """
  text = json.dumps(settings_lib.to_dict(settings), sort_keys=True)
  digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
  file = folder / f"arm-{digest}.json"
  done = _read_runs(file)

  @functools.cache
  def runner():
    return make_runner(settings, seeds, metric, parallel)

  def run(cases: Sequence[Case]) -> list[dict[str, Any]]:
    if missing := [case for case in cases if case not in done]:
      done.update(zip(missing, runner()(missing), strict=True))
      run_folder.write_text(file, json.dumps(list(done.values())) + "\n")
    return [done[case] for case in cases]

  return run


def _read_runs(file: pathlib.Path) -> dict[Case, dict[str, Any]]:
  """Reads the runs of an arm; a file that is damaged is set aside."""
  if not file.is_file():
    return {}
  try:
    stored = json.loads(file.read_text(encoding="utf-8"))
    runs = {(one["seed"], one["rate"]): one for one in stored}
    if all(isinstance(one["lines"], list) for one in stored):
      return runs
  except (ValueError, KeyError, TypeError):
    pass
  aside = file.with_name(file.name + ".damaged")
  os.replace(file, aside)
  _LOG.warning(
    "%s: is damaged; set aside as %s, and its runs are made again",
    file,
    aside.name,
  )
  return {}


def make_runner(
  settings: Settings,
  seeds: Sequence[int],
  metric: str,
  parallel: bool | None = None,
) -> Callable[[Sequence[Case]], list[dict[str, Any]]]:
  """Builds one arm for several seeds.

  Args:
    settings: The arm's settings; `seed` is replaced.
    seeds: All seeds that will be run.
    metric: What will be asked of the runs; one that does not exist ends them
      after the first evaluation, or the first round.
    parallel: Whether cases run as one program; default on accelerators only.

  Returns:
    `run(cases) -> runs`, each {"seed", "rate", "lines"}, in the order of the
    cases; compiled once.

  Raises:
    ConfigError: What `assembly.build` refuses; by `run`, an unknown metric.
  """
  built = _build_seeds(settings, seeds)
  first = built[seeds[0]]
  if parallel is None:
    parallel = first.mesh.devices.flat[0].platform != "cpu"
  step = _in_parallel(first) if parallel else _one_by_one(first)

  def run(cases: Sequence[Case]) -> list[dict[str, Any]]:
    states = [_initial_state(first, built[seed], seed) for seed, _ in cases]
    bases = [built[seed].base for seed, _ in cases]
    runs = [{"seed": s, "rate": rate, "lines": []} for s, rate in cases]

    def evaluate():
      for one, state, base in zip(runs, states, bases):
        own = built[one["seed"]]
        # One compiled evaluation for all, where seeds hold out the same.
        held = own if settings.data.dealt_heldout_fraction else first
        start = own.trainable
        values = personalization.evaluate_all(
          held, state, start, base, one["rate"]
        )
        one["lines"][-1] |= values

    for one in runs:
      one["lines"].append({"round": 0})
    evaluate()
    if metric.startswith("eval/"):
      expect_metric(metric, runs[0]["lines"][0])
    for r in range(settings.rounds):
      cohorts = [_cohort(built[seed], r, rate) for seed, rate in cases]
      # Before the round: some algorithms send other things in every round.
      sent = [first.algorithm.bytes_per_client(state) for state in states]
      states, metrics = step(states, bases, cohorts)
      for one, values, (up, down) in zip(runs, metrics, sent):
        own = built[one["seed"]]
        one["lines"].append(
          {
            "round": r + 1,
            **{name: float(x) for name, x in values.items()},
            **own.ledger.line(own.plan(r), up, down),
          }
        )
        if own.accounting is not None:
          spent = own.accounting.epsilon(r + 1)
          one["lines"][-1]["privacy/epsilon"] = spent
      if not metric.startswith("eval/"):
        expect_metric(metric, runs[0]["lines"][-1])
      if r + 1 == settings.rounds or (r + 1) % settings.eval.every == 0:
        evaluate()
    return runs

  return run


def _build_seeds(
  settings: Settings, seeds: Sequence[int]
) -> dict[int, Experiment]:
  """Builds an experiment a seed, with the lanes and buffers of all alike."""
  built: dict[int, Experiment] = {}
  for seed in dict.fromkeys(seeds):
    lanes = built[seeds[0]].num_lanes if built else settings.lanes
    built[seed] = assembly.build(
      dataclasses.replace(
        settings,
        seed=seed,
        lanes=lanes,
        # Seeds may hold out other rows; and rounds are told apart here.
        data=dataclasses.replace(settings.data, resident=False),
        rounds_per_dispatch=1,
      )
    )
  steps = max(max(one.buckets[0]) for one in built.values())
  slots = max(max(one.buckets[1]) for one in built.values())
  buckets = ((steps,), (slots,))
  return {s: dataclasses.replace(b, buckets=buckets) for s, b in built.items()}


def _initial_state(
  first: Experiment, own: Experiment, seed: int
) -> ServerState:
  """The state of a seed, by the first seed's compiled function."""
  state = first.initial_state(own.trainable)
  place = state.seed.sharding
  seed_array = jax.device_put(np.asarray(seed, np.uint32), place)
  return dataclasses.replace(state, seed=seed_array)


def _cohort(one: Experiment, round_index: int, rate: float) -> Cohort:
  """Packs and places a cohort, its learning rates multiplied."""
  cohort = one.cohort(round_index)
  return dataclasses.replace(cohort, rate=cohort.rate * np.float32(rate))


def _one_by_one(first: Experiment) -> Callable[..., Any]:
  """Runs cases in turn, by the one compiled round."""

  def step(states, bases, cohorts):
    results = []
    for state, base, cohort in zip(states, bases, cohorts):
      with jax.set_mesh(first.mesh):
        state, metrics = first.run_round(state, base, cohort)
        # One dispatch at a time: virtual CPU devices deadlock with more queued.
        results.append((state, jax.device_get(metrics)))
    states, metrics = zip(*results)
    return list(states), metrics

  return step


def _in_parallel(first: Experiment) -> Callable[..., Any]:
  """Runs all cases as one program, vmapped."""
  # Only random weights differ between seeds.
  own_base = first.base is not None and first.settings.model.init == "random"
  axes = (0, 0 if own_base else None, 0)
  run = jax.jit(
    jax.vmap(first.algorithm.round, in_axes=axes),
    # Metrics are whole in every process.
    out_shardings=(None, NamedSharding(first.mesh, jax.P())),
  )

  def stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)

  def step(states, bases, cohorts):
    base = stack(bases) if own_base else bases[0]
    with jax.set_mesh(first.mesh):
      states, metrics = run(stack(states), base, stack(cohorts))
      metrics = jax.device_get(metrics)

    def part(tree, i):
      return jax.tree.map(lambda x: x[i], tree)

    count = len(cohorts)
    return (
      [part(states, i) for i in range(count)],
      [part(metrics, i) for i in range(count)],
    )

  return step
