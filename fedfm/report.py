"""Tables and plots of finished runs."""

from collections.abc import Mapping, Sequence
import os
from typing import Any, NamedTuple

import numpy as np


def table(
  rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> str:
  """Formats rows as an aligned Markdown table.

  Args:
    rows: A mapping per row; what a row lacks, or is None, shows as `-`.
    columns: Which columns and in which order; default all, as they come.

  Returns:
    Lines without a final newline; numbers are aligned to the right.

  Examples:
    >>> print(table([{"name": "a", "loss": 0.5}, {"name": "bc"}]))
    | name | loss |
    |:-----|-----:|
    | a    |  0.5 |
    | bc   |    - |
  """
  if columns is None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
  cells = [[_cell(row.get(name)) for name in columns] for row in rows]
  widths = [
    max(len(name), 3, *(len(row[i]) for row in cells))
    for i, name in enumerate(columns)
  ]
  numeric = [
    all(not isinstance(row.get(name), str | bool) for row in rows)
    for name in columns
  ]

  def line(texts: Sequence[str]) -> str:
    padded = (
      text.rjust(width) if right else text.ljust(width)
      for text, width, right in zip(texts, widths, numeric)
    )
    return "| " + " | ".join(padded) + " |"

  rule = "|".join(
    "-" * (width + 1) + ":" if right else ":" + "-" * (width + 1)
    for width, right in zip(widths, numeric)
  )
  return "\n".join([line(columns), f"|{rule}|", *map(line, cells)])


class Panel(NamedTuple):
  """One pair of axes of a plot.

  Attributes:
    series: Label -> (xs, ys) of equal length; None and NaN leave a gap. A third
      sequence is drawn as a band of that half width around ys.
    xlabel: What x is, with its unit.
    ylabel: What y is, with its unit.
    title: Heading, if any.
  """

  series: Mapping[str, tuple[Sequence[Any], ...]]
  xlabel: str
  ylabel: str
  title: str = ""


def plot_lines(path: str | os.PathLike, *panels: Panel) -> None:
  """Draws panels side by side into a file, a line a series; needs no display.

  Args:
    path: The file; its ending (`.png`, `.svg`, `.pdf`) says the format.
    *panels: What to draw, left to right.
  """
  from matplotlib import figure  # Slow to import, and few callers draw.

  canvas = figure.Figure(
    figsize=(6.4 * len(panels), 4.0), dpi=150, layout="constrained"
  )
  for index, panel in enumerate(panels):
    axes = canvas.add_subplot(1, len(panels), index + 1)
    for number, (label, (xs, ys, *band)) in enumerate(panel.series.items()):
      marker = "o" if len(xs) < 20 else None
      dashes = ("-", "--", ":")[number // 10 % 3]  # There are ten colours.
      values = np.asarray(ys, dtype=float)
      (line,) = axes.plot(xs, values, dashes, label=label, marker=marker, ms=3)
      if band:
        width = np.asarray(band[0], dtype=float)
        axes.fill_between(
          xs, values - width, values + width, color=line.get_color(), alpha=0.2
        )
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, title=panel.title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(panel.series) > 1:
      axes.legend(frameon=False)
  canvas.savefig(path)


def percentiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
  """Summarizes one value per client.

  Args:
    values: `[clients]`.

  Returns:
    `mean`, `p10` and `p90` (linear interpolation); NaN without clients.

  Examples:
    >>> percentiles([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    {'mean': 5.0, 'p10': 1.0, 'p90': 9.0}
    >>> percentiles([])
    {'mean': nan, 'p10': nan, 'p90': nan}
  """
  x = np.asarray(values, dtype=np.float64).reshape(-1)
  if x.size == 0:
    return dict.fromkeys(("mean", "p10", "p90"), float("nan"))
  p10, p90 = np.percentile(x, [10, 90])
  return {"mean": float(x.mean()), "p10": float(p10), "p90": float(p90)}


def forgetting(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Says how much of its best a run has lost on each population.

  Args:
    lines: Metrics of the rounds, some with `eval/<population>/loss`.

  Returns:
    {"forgetting/<population>": last loss minus the least of all rounds, nats};
    0 where the last is the best (arXiv 1801.10112, with loss for accuracy).

  Examples:
    >>> forgetting([{"eval/a/loss": x} for x in (3.0, 2.0, 2.5)])
    {'forgetting/a': 0.5}
  """
  losses: dict[str, list[float]] = {}
  for line in lines:
    for name, value in line.items():
      if name.startswith("eval/") and name.endswith("/loss"):
        population = name.removeprefix("eval/").removesuffix("/loss")
        losses.setdefault(population, []).append(value)
  return {
    f"forgetting/{population}": values[-1] - min(values)
    for population, values in losses.items()
    if None not in values
  }


def _cell(value: Any) -> str:
  if value is None:
    return "-"
  if isinstance(value, float | np.floating):
    return f"{value:.4g}"
  return str(value)
