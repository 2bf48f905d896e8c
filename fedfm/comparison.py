"""Compares settings: arms and seeds on the same clients and the same budget.

An arm is a name and its own settings. All seeds of an arm share one compiled
round, as the seed is part of the server state; on accelerators they run as one
program (vmapped), on a CPU one after the other. Finished runs are kept in the
folder and not run again.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import logging
import pathlib
import time
import types
from typing import Any, NamedTuple

import numpy as np

from fedfm import arm_runs, comparison_checks, errors, optimizers
from fedfm import settings as settings_lib
from fedfm.settings import Settings

_LOG = logging.getLogger("fedfm")


class Comparison(NamedTuple):
  """What is compared.

  Attributes:
    arms: Name -> the arm's settings, its seed aside.
    seeds: Seeds that every arm runs with.
    metric: What is plotted and tabulated, such as "eval/unseen/loss".
    higher_is_better: Of the metric.
    target: Value of the metric for "rounds to target"; None for no column.
    rates: Multiples of the client learning rate that every arm is tuned over;
      the best by the last `metric`, mean over seeds, is shown.
    server_rates: Multiples of the server learning rate, tried with each of
      `rates`; a compilation each.
    tuning_seeds: Seeds that rates are chosen with, so that `seeds` run with the
      best alone; () for `seeds` themselves.
    own_metrics: {arm: the metric that stands for `metric` in its runs}, such as
      that of fine-tuned models beside personal ones.
    columns: More metrics to tabulate, of the last round.
  """

  arms: Mapping[str, Settings]
  seeds: Sequence[int]
  metric: str
  higher_is_better: bool = False
  target: float | None = None
  rates: Sequence[float] = (1.0,)
  server_rates: Sequence[float] = (1.0,)
  tuning_seeds: Sequence[int] = ()
  own_metrics: Mapping[str, str] = types.MappingProxyType({})
  columns: Sequence[str] = ()


def from_dict(values: Mapping[str, Any]) -> Comparison:
  """Checks a nested dict: `base` settings and `arms` that differ from them.

  Args:
    values: {"base": fields of `Settings`, "arms": {name: fields that differ},
      "seeds", "metric", ...}.

  Returns:
    A `Comparison`.

  Raises:
    ConfigError: An unknown field, one that is mistyped or out of range, no arm,
      or what `Settings` refuses (under the arm's name).

  Examples:
    >>> got = from_dict({"base": {"rounds": 3}, "seeds": (0, 1),
    ...                  "metric": "train/loss",
    ...                  "arms": {"avg": {}, "adam": {"algorithm": "fedadam"}}})
    >>> [(name, arm.algorithm, arm.rounds) for name, arm in got.arms.items()]
    [('avg', 'fedavg', 3), ('adam', 'fedadam', 3)]
  """
  known = {*Comparison._fields, "base"}
  for name in values:
    if name not in known:
      raise errors.ConfigError(
        f"{name}: unknown field{errors.nearest(str(name), known)}"
      )
  comparison_checks.check_fields(values)
  for name in ("arms", "seeds", "metric"):
    if not values.get(name):
      raise errors.ConfigError(f"{name}: missing, expected a value")
  arms = {}
  for name, changes in values["arms"].items():
    try:
      arms[name] = settings_lib.from_dict(
        merge(values.get("base", {}), changes)
      )
    except errors.ConfigError as e:
      raise errors.ConfigError(f"arms.{name}.{e}") from None
  options = {k: v for k, v in values.items() if k not in ("base", "arms")}
  for name in options.get("own_metrics", {}):
    if name not in arms:
      raise errors.ConfigError(
        f"own_metrics: got {name!r}{errors.nearest(name, arms)}"
      )
  for name in ("rates", "server_rates"):
    if name in options:
      options[name] = tuple(float(rate) for rate in values[name])
  for name in ("seeds", "tuning_seeds"):
    options[name] = tuple(int(seed) for seed in values.get(name, ()))
  return Comparison(arms=arms, **options)


def merge(base: Any, changes: Any) -> Any:
  """Merges nested mappings; what is no mapping is replaced."""
  if not isinstance(base, Mapping) or not isinstance(changes, Mapping):
    return changes
  merged = {name: merge(base.get(name), x) for name, x in changes.items()}
  return {**base, **merged}


def run(
  comparison: Comparison,
  folder: pathlib.Path,
  parallel: bool | None = None,
) -> dict[str, list[dict[str, Any]]]:
  """Runs what the folder does not hold yet.

  Args:
    comparison: What to run.
    folder: Gets a JSON file an arm, of all its runs so far.
    parallel: Whether the seeds and rates of an arm run as one program; default
      on accelerators only.

  Returns:
    {arm: runs}, a run being {"seed", "rate", "lines"} with the metrics of each
    round, round 0 the evaluation before training.

  Raises:
    ConfigError: What `assembly.build` refuses, under the arm's name.
  """
  folder.mkdir(parents=True, exist_ok=True)
  results = {}
  for number, (name, arm) in enumerate(comparison.arms.items(), start=1):
    began = time.perf_counter()
    try:
      named = _of_arm(comparison, name)
      results[name] = run_arm(named, arm, folder, parallel)
    except errors.ConfigError as e:
      raise errors.ConfigError(f"arms.{name}.{e}") from None
    _LOG.info(
      "%s (%d of %d): %.0f s",
      name,
      number,
      len(comparison.arms),
      time.perf_counter() - began,
    )
  return results


def _of_arm(comparison: Comparison, name: str) -> Comparison:
  """The comparison as one arm sees it, its metric the arm's own."""
  own = comparison.own_metrics.get(name, comparison.metric)
  return comparison._replace(metric=own)


def run_arm(
  comparison: Comparison,
  settings: Settings,
  folder: pathlib.Path,
  parallel: bool | None = None,
) -> list[dict[str, Any]]:
  """Runs one arm: all rates with the tuning seeds, then the best with all.

  Args:
    comparison: Its seeds and rates.
    settings: The arm's settings; `seed` is replaced.
    folder: As in `run`.
    parallel: As in `run`.

  Returns:
    The runs, as in `run`, each with its "server_rate".
  """
  seeds, tuning = comparison.seeds, comparison.tuning_seeds
  every_run = {}
  for multiple in comparison.server_rates:
    server = dataclasses.replace(
      settings.server, learning_rate=optimizers.server_rate(settings) * multiple
    )
    every_run[multiple] = arm_runs.kept_runs(
      dataclasses.replace(settings, server=server),
      [*tuning, *seeds],
      comparison.metric,
      folder,
      parallel,
    )

  def runs_of(multiple, cases):
    runs = every_run[multiple](cases)
    return [run | {"server_rate": multiple} for run in runs]

  cases = [(s, r) for r in comparison.rates for s in tuning or seeds]
  runs = [run for multiple in every_run for run in runs_of(multiple, cases)]
  rate, multiple = best_rates(comparison, runs)
  for name, best, tried in (
    ("rates", rate, comparison.rates),
    ("server_rates", multiple, comparison.server_rates),
  ):
    if len(tried) > 1 and best in (min(tried), max(tried)):
      _LOG.info("%s: the best, %g, is at an end of those tried", name, best)
  more = [(s, rate) for s in seeds if s not in tuning] if tuning else []
  return runs + runs_of(multiple, more)


def best_rates(
  comparison: Comparison, runs: list[dict[str, Any]]
) -> tuple[float, float]:
  """Multiples of the client and the server rate with the best last metric."""
  by_rate: dict[tuple[float, float], list[float]] = {}
  tuning = comparison.tuning_seeds or comparison.seeds
  for one in runs:
    if one["seed"] not in tuning:
      continue
    line = one["lines"][-1]
    arm_runs.expect_metric(comparison.metric, line)
    by_rate.setdefault(_rates(one), []).append(line[comparison.metric])
  sign = -1 if comparison.higher_is_better else 1
  # A run that diverged is the worst there is.
  means = {
    r: np.nan_to_num(sign * np.mean(v), nan=np.inf) for r, v in by_rate.items()
  }
  return min(means, key=lambda rates: (means[rates], rates))


def _rates(one: Mapping[str, Any]) -> tuple[float, float]:
  """The client's and the server's multiple of a run."""
  return one["rate"], one["server_rate"]


def _at_best(
  comparison: Comparison, runs: list[dict[str, Any]]
) -> tuple[tuple[float, float], list[list[dict[str, Any]]]]:
  """The best rates, and the lines of each seed's run at them."""
  rates = best_rates(comparison, runs)
  return rates, [
    one["lines"]
    for one in runs
    if _rates(one) == rates and one["seed"] in comparison.seeds
  ]


def summarise(
  comparison: Comparison, results: Mapping[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
  """Makes a row of each arm, mean and standard deviation over seeds.

  Args:
    comparison: What was compared.
    results: From `run`.

  Returns:
    Rows with the arm's name, the last metric, rounds to target, megabytes up
    and down in sum, and the mean drift; at the best of the tried rates.
  """
  rows, shown = [], comparison.metric
  for name, runs in results.items():
    comparison = _of_arm(comparison._replace(metric=shown), name)
    (rate, server_rate), chosen = _at_best(comparison, runs)
    row: dict[str, Any] = {"arm": name}
    if len(comparison.rates) > 1:
      row["rate"] = rate
    if len(comparison.server_rates) > 1:
      row["server rate"] = server_rate
    row[shown] = spread([x[-1][comparison.metric] for x in chosen])
    for metric in comparison.columns:
      values = [x[-1][metric] for x in chosen if metric in x[-1]]
      row[metric] = spread(values) if values else None
    if comparison.target is not None:
      reached = [rounds_to_target(comparison, lines) for lines in chosen]
      known = [r for r in reached if r is not None]
      row["rounds to target"] = (
        spread(known) if len(known) == len(reached) else "not reached"
      )
    for direction in ("up", "down"):
      total = [
        sum(line.get(f"comm/bytes_{direction}", 0) for line in lines) / 1e6
        for lines in chosen
      ]
      row[f"MB {direction}"] = float(np.mean(total))
    for metric in ("drift/cosine", "drift/diversity", "lora/aggregation_error"):
      values = [line[metric] for x in chosen for line in x if metric in line]
      if values:
        row[metric] = float(np.mean(values))
    rows.append(row)
  return rows


def spread(values: Sequence[float]) -> str:
  """Formats mean and standard deviation (of the sample) over seeds.

  Examples:
    >>> spread([1.0, 2.0, 3.0])
    '2.000 +- 1.000'
    >>> spread([1.5])
    '1.500'
  """
  mean = f"{np.mean(values):.3f}"
  if len(values) < 2:
    return mean
  return f"{mean} +- {np.std(values, ddof=1):.3f}"


def rounds_to_target(
  comparison: Comparison, lines: Sequence[Mapping[str, Any]]
) -> int | None:
  """The first evaluated round at the target or better, or None."""
  assert comparison.target is not None
  sign = -1 if comparison.higher_is_better else 1
  for line in lines:
    value = line.get(comparison.metric)
    if value is not None and sign * value <= sign * comparison.target:
      return int(line["round"])
  return None


def curves(
  comparison: Comparison,
  results: Mapping[str, list[dict[str, Any]]],
  over: str = "round",
) -> dict[str, tuple[list[float], list[float], list[float]]]:
  """Makes a curve of each arm.

  Args:
    comparison: What was compared.
    results: From `run`.
    over: "round", or "megabytes" sent so far in both directions.

  Returns:
    {arm: (xs, means over seeds, standard deviations)}.
  """
  drawn, shown = {}, comparison.metric
  for name, runs in results.items():
    comparison = _of_arm(comparison._replace(metric=shown), name)
    _, chosen = _at_best(comparison, runs)
    xs, sent = [], 0.0
    for line in chosen[0]:
      sent += line.get("comm/bytes_up", 0) + line.get("comm/bytes_down", 0)
      if comparison.metric in line:
        xs.append(line["round"] if over == "round" else sent / 1e6)
    ys = np.array(
      [
        [x[comparison.metric] for x in lines if comparison.metric in x]
        for lines in chosen
      ]
    )
    spreads = ys.std(axis=0, ddof=1) if len(ys) > 1 else 0 * ys[0]
    drawn[name] = (xs, ys.mean(axis=0).tolist(), spreads.tolist())
  return drawn
