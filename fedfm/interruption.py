"""SIGTERM and Ctrl-C while a run trains: it saves its state, then stops.

With one process the handlers are Python's. With several, whoever is signalled
tells the others through JAX's preemption service, and all stop at one round.
"""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
  """A run was asked to stop, and has saved its state."""

  def __init__(self, signum: int, round: int):
    """Says where it stopped.

    Args:
      signum: The signal; `128 + signum` is a script's exit code.
      round: The round that is saved.
    """
    name = signal.Signals(signum).name
    super().__init__(
      f"{name}: stopped at round {round}, which is saved; the same command "
      "goes on from there"
    )
    self.signum = signum


class StopRequest:
  """Catches the signals within `with`; a second one does not hurt the save."""

  def __init__(self):
    """Catches nothing yet."""
    self._signum: int | None = None
    self._previous = {}

  def __enter__(self) -> Self:
    # Signals are the main thread's; elsewhere they stay as they are.
    if threading.current_thread() is threading.main_thread():
      for signum in _SIGNALS:
        # JAX's preemption service has its own handler of SIGTERM.
        if signum == signal.SIGINT or jax.process_count() == 1:
          self._previous[signum] = signal.signal(signum, self._note)
    return self

  def __exit__(self, *_) -> None:
    for signum, handler in self._previous.items():
      signal.signal(signum, handler)

  def at(self, round: int) -> int | None:
    """Asks whether to stop at this round; all processes ask at every round.

    Args:
      round: Rounds done.

    Returns:
      The signal, the same round in every process, or None.
    """
    if jax.process_count() == 1:
      return self._signum
    if not multihost_utils.reached_preemption_sync_point(round):
      return None
    if threading.current_thread() is threading.main_thread():
      # From here on the state is being saved, whatever else arrives.
      signal.signal(signal.SIGTERM, self._note)
    return self._signum or signal.SIGTERM

  def _note(self, signum: int, frame: FrameType | None) -> None:
    del frame
    first, self._signum = self._signum is None, self._signum or signum
    text = "saving this round, then stopping; kill -9 would lose it"
    with contextlib.suppress(OSError):
      # Not `print`: the signal may have come while that was at work.
      os.write(2, f"\n{signal.Signals(signum).name}: {text}\n".encode())
    if first and jax.process_count() > 1 and signum == signal.SIGINT:
      os.kill(os.getpid(), signal.SIGTERM)  # Tells the other processes.
