"""Tables line up and plots are written."""

import numpy as np

from fedfm import report


def test_table_is_aligned_markdown():
  rows = [
    {"name": "fedavg", "loss": 1.23456, "rounds": 100, "extra": 1},
    {"name": "dp", "loss": np.float32(10), "rounds": None},
  ]
  assert report.table(rows, ["name", "loss", "rounds"]) == "\n".join(
    [
      "| name   |  loss | rounds |",
      "|:-------|------:|-------:|",
      "| fedavg | 1.235 |    100 |",
      "| dp     |    10 |      - |",
    ]
  )
  assert report.table(rows).splitlines()[0].split() == (
    ["|", "name", "|", "loss", "|", "rounds", "|", "extra", "|"]
  )


def test_table_of_no_rows_has_its_head():
  assert report.table([], ["a"]).splitlines()[0] == "|   a |"


def test_plot_is_a_png_with_gaps_allowed(tmp_path):
  path = tmp_path / "loss.png"
  series = {
    "a": ([0, 1, 2], [1.0, None, 0.5]),
    "b": (np.arange(30), [0.1] * 30),
  }
  panel = report.Panel(series, xlabel="round", ylabel="loss", title="t")
  report.plot_lines(path, panel, panel)
  assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_percentiles_interpolate():
  assert report.percentiles(np.arange(11)) == {"mean": 5, "p10": 1, "p90": 9}
  assert report.percentiles([3.0]) == {"mean": 3, "p10": 3, "p90": 3}
  assert all(np.isnan(v) for v in report.percentiles([]).values())
