"""Lines of metrics are whole, in order, and never doubled."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import errors, metrics


def write_rounds(folder, rounds, **options):
  with metrics.MetricsWriter(folder, tensorboard=False, **options) as writer:
    for r in rounds:
      writer.write({"train/loss": r / 7, "round": r})


def test_writes_valid_json_with_round_first(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(
      {
        "z": jnp.float32(0.1),
        "a": np.int64(3),
        "nan": float("nan"),
        "inf": np.float32(np.inf),
        "name": "x",
        "none": None,
        "round": np.int32(1),
      }
    )
  (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
  row = json.loads(line, parse_constant=pytest.fail)
  assert list(row) == ["round", "a", "inf", "name", "nan", "none", "z"]
  assert row["z"] == float(np.float32(0.1)) and row["round"] == 1
  assert row["nan"] is None and row["inf"] is None
  assert metrics.read(tmp_path) == [row]


def test_refuses_what_is_no_metric(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    with pytest.raises(ValueError, match="no 'round'"):
      writer.write({"loss": 1.0})
    with pytest.raises(ValueError, match=r"loss: got shape \(2,\)"):
      writer.write({"round": 1, "loss": np.ones(2)})
    with pytest.raises(ValueError, match="loss: got dict"):
      writer.write({"round": 1, "loss": {}})
  assert metrics.read(tmp_path) == []


def test_resuming_drops_later_and_torn_lines(tmp_path):
  write_rounds(tmp_path, range(6))
  whole = (tmp_path / "metrics.jsonl").read_bytes()
  with open(tmp_path / "metrics.jsonl", "ab") as f:
    f.write(b'{"round": 6, "train/lo')
  assert [row["round"] for row in metrics.read(tmp_path)] == list(range(6))
  write_rounds(tmp_path, range(4, 6), resume_round=3)
  assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_without_a_checkpoint_the_file_starts_anew(tmp_path):
  write_rounds(tmp_path, range(3))
  write_rounds(tmp_path, range(2))
  assert [row["round"] for row in metrics.read(tmp_path)] == [0, 1]


def test_a_broken_line_is_named_by_read_and_dropped_by_resume(tmp_path, caplog):
  write_rounds(tmp_path, [1])
  with open(tmp_path / "metrics.jsonl", "ab") as f:
    f.write(b'{"round": 1, "x": \n{"round": 2}\n')
  with pytest.raises(errors.CheckpointError, match="metrics.jsonl:2: got"):
    metrics.read(tmp_path)
  write_rounds(tmp_path, [3], resume_round=2)
  assert [row["round"] for row in metrics.read(tmp_path)] == [1, 2, 3]
  assert "dropped 1 lines" in caplog.text


def test_no_file_is_an_error(tmp_path):
  with pytest.raises(errors.CheckpointError, match="cannot be read"):
    metrics.read(tmp_path)
  with pytest.raises(errors.CheckpointError, match="cannot be written"):
    metrics.MetricsWriter(tmp_path / "none", tensorboard=False)


def test_a_killed_writer_leaves_whole_lines(tmp_path):
  code = (
    "import itertools, sys\nfrom fedfm import metrics\n"
    "writer = metrics.MetricsWriter(sys.argv[1], tensorboard=False)\n"
    "for r in itertools.count():\n"
    "  writer.write({'round': r, 'pad': 'x' * (r % 997)})\n"
  )
  child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
  path = tmp_path / "metrics.jsonl"
  deadline = time.monotonic() + 30
  while time.monotonic() < deadline:
    if path.exists() and path.stat().st_size > 100_000:
      break
    time.sleep(0.01)
  child.send_signal(signal.SIGKILL)
  child.wait()
  assert path.read_bytes().endswith(b"\n")
  rows = metrics.read(tmp_path)
  assert [row["round"] for row in rows] == list(range(len(rows)))


def test_a_line_cut_by_a_full_disk_is_taken_back(tmp_path, monkeypatch):
  writer = metrics.MetricsWriter(tmp_path, tensorboard=False)
  writer.write({"round": 1})
  real = os.write
  with monkeypatch.context() as patch:
    patch.setattr(os, "write", lambda fd, data: real(fd, data[:5]))
    with pytest.raises(errors.SaveError, match="no space left"):
      writer.write({"round": 2})
  writer.write({"round": 2})
  writer.close()
  assert metrics.read(tmp_path) == [{"round": 1}, {"round": 2}]


def test_tensorboard_events_are_written_beside(tmp_path):
  for resume in (None, 1):
    with metrics.MetricsWriter(tmp_path, resume_round=resume) as writer:
      writer.write({"round": 1 if resume is None else 2, "train/loss": 0.5})
  files = list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
  assert files and any(b"train/loss" in f.read_bytes() for f in files)


def test_a_full_disk_is_an_error_and_no_hang(tmp_path):
  """Through /dev/full, whose every write fails as on a full disk."""
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.write({"round": 0, "train/loss": 1.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    for name, message in (("events", "tensorboard: "), ("lines", "jsonl: ")):
      full = os.open("/dev/full", os.O_WRONLY)
      if name == "events":
        writer._events._writer._py_recordio_writer._writer = os.fdopen(
          full, "wb"
        )
      else:
        os.dup2(full, writer._fd)
      for _ in range(2):
        with pytest.raises(errors.SaveError, match=f"{message}.*No space left"):
          writer.write({"round": 1, "train/loss": 1.0})
  assert events.stat().st_size > 0
  assert metrics.read(tmp_path)[0] == {"round": 0, "train/loss": 1.0}


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_rewrites_one_line_on_a_terminal(monkeypatch):
  clock = iter([0.0, 10.0, 12.0, 14.0])
  monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
  out = Terminal()
  progress = metrics.Progress(50, stream=out)
  progress.update(1, loss=2.0, tokens_per_second=12345.6)
  progress.update(2, loss=1.5)
  progress.update(3, loss=1.0, accuracy=0.25)
  progress.close()
  lines = out.getvalue().rstrip("\n").split("\r")[1:]
  assert out.getvalue().count("\n") == 1
  # the first round, which compiles, is not held against the others
  assert [line.rstrip() for line in lines] == [
    "round 1/50  loss 2.0000  12,346 tokens/s  8m 10s left",
    "round 2/50  loss 1.5000  1m 36s left",
    "round 3/50  loss 1.0000  accuracy 0.25  1m 34s left",
  ]


def test_progress_prints_now_and_then_elsewhere(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
  out = io.StringIO()
  progress = metrics.Progress(100, every_seconds=30, stream=out)
  for r in range(1, 101):
    now[0] = float(r)
    progress.update(r)
  progress.close()
  starts = [line.split("  ")[0] for line in out.getvalue().splitlines()]
  assert starts == [f"round {r}/100" for r in (30, 60, 90, 100)]


def test_progress_outlives_its_stream():
  out = io.StringIO()
  progress = metrics.Progress(2, every_seconds=0, stream=out)
  out.close()
  progress.update(1)
  progress.update(2)
