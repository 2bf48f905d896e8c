"""Metrics of a run: a JSON object a line, TensorBoard events, a progress line.

Lines are appended with one write each, and resuming drops those of rounds that
will run again, so no round is ever doubled or torn.
"""

from collections.abc import Mapping
import contextlib
import json
import logging
import math
import os
import pathlib
import shutil
import sys
import time
from typing import Any, Self, TextIO

from fedfm import errors, run_folder

FILE = "metrics.jsonl"
EVENTS = "tensorboard"
_logger = logging.getLogger(__name__)


class MetricsWriter:
  """Appends to `metrics.jsonl` and to TensorBoard's event files."""

  def __init__(
    self,
    folder: str | pathlib.Path,
    resume_round: int | None = None,
    tensorboard: bool = True,
  ):
    """Opens the metrics of a run.

    Args:
      folder: The run's folder.
      resume_round: The round that was restored: later lines, and torn ones, are
        dropped, and missing ones are warned of. None starts anew.
      tensorboard: Write event files, in `folder/tensorboard`, too.

    Raises:
      CheckpointError: The files cannot be written.
    """
    self._path = pathlib.Path(folder) / FILE
    self._events = None
    last = -1 if resume_round is None else resume_round
    try:
      _drop_after(self._path, last)
      self._fd = os.open(
        self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
      )
      if tensorboard:
        self._events = _Events(self._path.parent / EVENTS, last + 1)
    except OSError as e:
      raise errors.CheckpointError(
        f"{self._path}: cannot be written: {e.strerror}"
      ) from e

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def write(self, metrics: Mapping[str, Any]) -> None:
    """Appends one line.

    Args:
      metrics: `round` and any numbers, strings, bools, scalar arrays or lists
        of strings. NaN and infinity, which JSON does not know, become null.

    Raises:
      ValueError: `round` is missing, or a value is not a scalar.
      SaveError: The line could not be written; none of it is kept.
    """
    if "round" not in metrics:
      raise ValueError("metrics: got no 'round'")
    names = ["round", *sorted(name for name in metrics if name != "round")]
    row = {name: _scalar(name, metrics[name]) for name in names}
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    size = os.fstat(self._fd).st_size
    try:
      written = os.write(self._fd, line)
    except OSError as e:
      raise _cannot_write(self._path, e.strerror) from e
    if written < len(line):
      os.ftruncate(self._fd, size)
      raise _cannot_write(self._path, "no space left for a whole line")
    if self._events is not None:
      try:
        self._events.write(row)
      except OSError as e:
        raise _cannot_write(self._path.parent / EVENTS, e.strerror) from e

  def sync(self) -> None:
    """Brings the lines to the disk, before a checkpoint that relies on them.

    Raises:
      SaveError: The disk did not take them.
    """
    try:
      os.fsync(self._fd)
    except OSError as e:
      raise _cannot_write(self._path, e.strerror) from e

  def close(self) -> None:
    """Closes both; closing twice is fine."""
    if self._fd >= 0:
      os.close(self._fd)
      self._fd = -1
      if self._events is not None:
        self._events.close()


class _Events:
  """TensorBoard's events, a record a line.

  Without the thread of tensorboardX's own writer, which dies on a full disk and
  lets the next lines wait for it for ever.
  """

  def __init__(self, folder: pathlib.Path, purge_step: int):
    # Slow to import, and not every reader of metrics needs them.
    from tensorboardX import event_file_writer
    import tensorboardX.proto.event_pb2
    import tensorboardX.proto.summary_pb2

    # Generated at import, which no type checker sees.
    events: Any = tensorboardX.proto.event_pb2
    summaries: Any = tensorboardX.proto.summary_pb2
    self._event, self._summary = events.Event, summaries.Summary
    folder.mkdir(exist_ok=True)
    self._writer = event_file_writer.EventsWriter(
      str(folder / "events"), f".{os.getpid()}.{time.monotonic_ns()}"
    )
    start = events.SessionLog(status=events.SessionLog.START)
    # Hides the rounds of an earlier process that are run again.
    self._record(step=purge_step, session_log=start)

  def write(self, row: Mapping[str, Any]) -> None:
    values = [
      self._summary.Value(tag=name, simple_value=float(value))
      for name, value in row.items()
      if isinstance(value, int | float) and name != "round"
    ]
    self._record(step=row["round"], summary=self._summary(value=values))

  def _record(self, **fields: Any) -> None:
    self._writer.write_event(self._event(wall_time=time.time(), **fields))
    self._writer.flush()

  def close(self) -> None:
    with contextlib.suppress(OSError):
      self._writer.close()


def last_round(folder: str | pathlib.Path) -> int:
  """Returns the last round that has a line; -1 where none has.

  Args:
    folder: A run's folder.

  Raises:
    CheckpointError: The file cannot be read.
  """
  path = pathlib.Path(folder) / FILE
  try:
    rows = map(_parse, path.read_bytes().split(b"\n")[:-1])
  except FileNotFoundError:
    return -1
  except OSError as e:
    raise errors.CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
  return max((row["round"] for row in rows if row is not None), default=-1)


def read(folder: str | pathlib.Path) -> list[dict[str, Any]]:
  """Reads the metrics of a run, which may still be going on.

  Args:
    folder: The run's folder.

  Returns:
    A dict per line; NaN and infinity were written as None.

  Raises:
    CheckpointError: There is no such file, or a line is not a JSON object (a
      last one without an end is left out).
  """
  path = pathlib.Path(folder) / FILE
  try:
    lines = path.read_bytes().split(b"\n")[:-1]
  except OSError as e:
    raise errors.CheckpointError(f"{path}: cannot be read: {e.strerror}") from e
  rows = []
  for number, line in enumerate(lines, start=1):
    row = _parse(line)
    if row is None:
      raise errors.CheckpointError(
        f"{path}:{number}: got {line[:40]!r}, expected a JSON object with a "
        "round"
      )
    rows.append(row)
  return rows


class Progress:
  """Prints round, loss, speed and time left of long work.

  One line that is rewritten on a terminal; elsewhere a line every so often.
  """

  def __init__(
    self,
    total_rounds: int,
    first_round: int = 0,
    every_seconds: float = 30.0,
    stream: TextIO | None = None,
  ):
    """Starts the clock.

    Args:
      total_rounds: The round that the work ends with.
      first_round: Rounds done before, in an earlier process.
      every_seconds: Time between lines where there is no terminal.
      stream: Where to print, default standard error.
    """
    self._total = total_rounds
    self._stream = sys.stderr if stream is None else stream
    self._every = every_seconds
    self._terminal = self._stream.isatty()
    self._start = self._printed = time.monotonic()
    self._first = first_round
    self._warm = False

  def update(
    self,
    round: int,
    loss: float | None = None,
    tokens_per_second: float | None = None,
    **values: float,
  ) -> None:
    """Reports that `round` rounds are done.

    Args:
      round: How many rounds are done.
      loss: The training loss.
      tokens_per_second: Speed.
      **values: Other numbers to show.
    """
    now = time.monotonic()
    parts = [f"round {round}/{self._total}"]
    if loss is not None:
      parts.append(f"loss {loss:.4f}")
    parts += [f"{name} {value:.4g}" for name, value in values.items()]
    if tokens_per_second is not None:
      parts.append(f"{tokens_per_second:,.0f} tokens/s")
    if round > self._first:
      left = (now - self._start) * (self._total - round) / (round - self._first)
      parts.append(f"{_duration(left)} left")
    if not self._warm:
      # The first round compiles; what is left is guessed from the others.
      self._warm, self._start, self._first = True, now, round
    if self._terminal:
      width = shutil.get_terminal_size().columns - 1
      self._print("\r" + "  ".join(parts)[:width].ljust(width))
    elif now - self._printed >= self._every or round == self._total:
      self._printed = now
      self._print("  ".join(parts) + "\n")

  def close(self) -> None:
    """Ends the line on a terminal."""
    if self._terminal:
      self._print("\n")
      self._terminal = False

  def _print(self, text: str) -> None:
    try:
      self._stream.write(text)
      self._stream.flush()
    except (OSError, ValueError):
      # A closed terminal is no reason to stop a run.
      self._terminal, self._every = False, math.inf


def _parse(line: bytes) -> dict[str, Any] | None:
  """Returns the line's object, or None if it is not one with a round."""
  try:
    row = json.loads(line.decode())
  except (ValueError, RecursionError):
    return None
  whole = isinstance(row, dict) and isinstance(row.get("round"), int)
  return row if whole else None


def _drop_after(path: pathlib.Path, last: int) -> None:
  text = path.read_bytes() if path.exists() else b""
  rows = [(line, _parse(line)) for line in text.split(b"\n")[:-1]]
  kept = [
    (line, row["round"])
    for line, row in rows
    if row is not None and row["round"] <= last
  ]
  broken = sum(row is None for _, row in rows)
  if broken:
    _logger.warning("%s: dropped %d lines that are not JSON", path, broken)
  missing = sorted(set(range(last + 1)) - {round for _, round in kept})
  if missing:
    _logger.warning(
      "%s: lacks the lines of %d of %d rounds, the first of them round %d; the "
      "run goes on without them",
      path,
      len(missing),
      last + 1,
      missing[0],
    )
  new = b"".join(line + b"\n" for line, _ in kept)
  if new != text:
    run_folder.write_text(path, new.decode())


def _scalar(name: str, value: Any) -> Any:
  if hasattr(value, "item"):
    if getattr(value, "size", 1) != 1:
      raise ValueError(
        f"metrics: {name}: got shape {value.shape}, not a scalar"
      )
    value = value.item()
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, list) and all(isinstance(x, str) for x in value):
    return value
  if value is None or isinstance(value, bool | int | str):
    return value
  raise ValueError(f"metrics: {name}: got {type(value).__name__}, not a scalar")


def _duration(seconds: float) -> str:
  """Formats a time.

  Examples:
    >>> _duration(59.6), _duration(75), _duration(3700)
    ('1m 00s', '1m 15s', '1h 01m')
  """
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds}s"
  if seconds < 3600:
    return f"{seconds // 60}m {seconds % 60:02d}s"
  return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"


def _cannot_write(path, reason) -> errors.SaveError:
  return errors.SaveError(f"{path}: cannot be written: {reason}")
