"""Where a run's time goes, and how much memory it took.

Time is told apart by what the main thread does: waiting for data, a round, an
evaluation, a checkpoint; compiling, wherever it happens, counts for itself.
What is left is start-up and the odds and ends of the loop.
"""

from collections.abc import Iterator
import contextlib
import resource
import threading
import time
from typing import Any, Self

import jax

# What jax reports for each function it turns into a program; tracing may nest.
_COMPILING = (
  "/jax/core/compile/jaxpr_trace_duration",
  "/jax/core/compile/jaxpr_to_mlir_module_duration",
  "/jax/core/compile/backend_compile_duration",
)
SPANS = ("data_wait", "round", "evaluation", "checkpoint")


class Clock:
  """Measures spans of the main thread, from one line of metrics to the next.

  Examples:
    >>> with Clock() as clock, clock.measure("round"):
    ...   time.sleep(0.01)
    >>> clock.take()["time/round_seconds"] >= 0.01
    True
  """

  def __init__(self, began: float | None = None):
    """Starts the clock.

    Args:
      began: `time.perf_counter()` of when the run began to be built.
    """
    self._last = time.perf_counter() if began is None else began
    self._spans = dict.fromkeys(SPANS, 0.0)
    self._thread = threading.get_ident()
    self._compiling: list[tuple[float, float]] = []  # Begin and end, disjoint.
    self._compiled = 0

  def __enter__(self) -> Self:
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *_) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)

  @contextlib.contextmanager
  def measure(self, name: str) -> Iterator[None]:
    """Adds what happens within to a span, but for compiling.

    Args:
      name: One of `SPANS`.

    Yields:
      Nothing.
    """
    began = time.perf_counter()
    try:
      yield
    finally:
      ended = time.perf_counter()
      compiling = sum(
        end - max(begin, began) for begin, end in self._compiling if end > began
      )
      self._spans[name] += max(0.0, ended - began - compiling)

  def take(self) -> dict[str, float]:
    """Returns the time since the last call and starts anew.

    Returns:
      `time/<span>_seconds`, `time/compile_seconds`, `time/other_seconds`,
      `time/elapsed_seconds` (the sum of all) and `time/compilations`, the
      number of programs compiled.
    """
    now = time.perf_counter()
    elapsed, self._last = now - self._last, now
    fields = {f"time/{k}_seconds": v for k, v in self._spans.items()}
    fields["time/compile_seconds"] = sum(e - b for b, e in self._compiling)
    fields["time/other_seconds"] = max(0.0, elapsed - sum(fields.values()))
    fields["time/elapsed_seconds"] = elapsed
    fields["time/compilations"] = self._compiled
    self._spans = dict.fromkeys(SPANS, 0.0)
    self._compiling, self._compiled = [], 0
    return fields

  def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
    if event == _COMPILING[-1]:
      self._compiled += 1
    if event in _COMPILING and threading.get_ident() == self._thread:
      end = time.perf_counter()
      begin = max(end - duration_secs, self._last)
      while self._compiling and self._compiling[-1][1] > begin:
        begin = min(begin, self._compiling.pop()[0])  # Within this one.
      self._compiling.append((begin, end))


def memory() -> dict[str, int]:
  """Returns the high-water marks of this process so far, in bytes.

  Returns:
    `memory/host_peak_bytes`, and `memory/device_peak_bytes` of the fullest
    local device where the backend keeps count (a CPU does not).
  """
  # Linux counts kilobytes.
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  fields = {"memory/host_peak_bytes": peak}
  stats = [device.memory_stats() for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if s]
  if peaks:
    fields["memory/device_peak_bytes"] = max(peaks)
  return fields
