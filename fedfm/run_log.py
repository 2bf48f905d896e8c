"""A log that a person can read, in the run's folder."""

import contextlib
import dataclasses
import logging
import pathlib
import time
from typing import Any, Self, TextIO

from fedfm import metrics

FILE = "log.txt"
_LOG = logging.getLogger("fedfm")


class RunLog(logging.Handler):
  """Appends what fedfm logs to `log.txt`, a dated line each.

  A log that cannot be written is no reason to stop a run.
  """

  def __init__(self, folder: pathlib.Path):
    """Opens the log.

    Args:
      folder: The run's folder.
    """
    super().__init__(logging.INFO)
    self._file: TextIO | None = None
    path = folder / FILE
    try:
      self._file = path.open("a", encoding="utf-8", buffering=1)
    except OSError as e:
      _LOG.warning("%s: cannot be written: %s", path, e.strerror)

  def __enter__(self) -> Self:
    _LOG.addHandler(self)
    return self

  def __exit__(self, *_) -> None:
    _LOG.removeHandler(self)
    self.close()

  def emit(self, record: logging.LogRecord) -> None:
    """Writes one record; called by `logging`."""
    self.line(record.getMessage(), record.levelno >= logging.WARNING)

  def say(self, text: str) -> None:
    """Logs something for the console too, if that shows what fedfm says.

    Args:
      text: One line.
    """
    if _LOG.isEnabledFor(logging.INFO):
      _LOG.info("%s", text)
    else:
      self.line(text)

  def line(self, text: str, warning: bool = False) -> None:
    """Writes a line that is for the file only.

    Args:
      text: The line.
      warning: Whether it is about something wrong.
    """
    if self._file is None:
      return
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError, ValueError):
      self._file.write(f"{now}  {'WARNING: ' if warning else ''}{text}\n")

  def close(self) -> None:
    """Closes the file; closing twice is fine."""
    if self._file is not None:
      with contextlib.suppress(OSError):
        self._file.close()
    super().close()


@dataclasses.dataclass(frozen=True)
class Reports:
  """Where process 0 reports; the others say nothing."""

  writer: metrics.MetricsWriter | None = None
  progress: metrics.Progress | None = None
  log: RunLog | None = None

  def say(self, text: str) -> None:
    """Logs a line for people."""
    if self.log is not None:
      self.log.say(text)

  def write(self, line: dict[str, Any]) -> None:
    """Appends a line of metrics, and one to the log."""
    if self.writer is None or self.log is None:
      return
    self.writer.write(line)
    names = ("train/loss", "time/tokens_per_second", "clients/participating")
    names += ("privacy/epsilon",)
    shown = [f"{k} {line[k]:.6g}" for k in names if k in line]
    shown += [
      f"{k} {v:.4g}"
      for k, v in line.items()
      if k.startswith("eval/") and k.endswith("/loss")
    ]
    self.log.line(f"round {line['round']}: {', '.join(shown) or 'start'}")

  def sync(self) -> None:
    """Brings the metrics to the disk."""
    if self.writer is not None:
      self.writer.sync()

  def update(self, done: int, **values: float) -> None:
    """Shows progress."""
    if self.progress is not None:
      self.progress.update(done, **values)
