"""Tells a training loss that went wrong from one that goes up and down."""

from collections.abc import Sequence
import math
import statistics

_FEWEST = 3  # Rounds before a jump can be told.


class LossGuard:
  """Judges the loss of each round by those before it.

  Examples:
    >>> guard = LossGuard(max_jump=2.0, window=4)
    >>> [guard.judge(loss, 8, 0) for loss in (1.0, 1.5, 0.9, 1.2)]
    [None, None, None, None]
    >>> guard.judge(2.4, 8, 0)
    'train/loss is 2.4, more than 2 times 1.1, the median of 4 rounds'
    >>> guard.judge(float("nan"), 0, 8)
    'no client was finite'
  """

  def __init__(
    self, max_jump: float, window: int, losses: Sequence[float] = ()
  ):
    """Starts with the losses of earlier rounds.

    Args:
      max_jump: A loss above so many times the median of the rounds before is
        bad; 0 looks for losses that are not finite only.
      window: How many rounds to take the median of.
      losses: Those of the rounds before, oldest first.
    """
    self._max_jump = max_jump
    self._window = window
    self.losses = list(losses)

  def judge(
    self, loss: float, participating: int, nonfinite: int
  ) -> str | None:
    """Says what is wrong with a round, and remembers a good one.

    Args:
      loss: Training loss of the round.
      participating: Clients that it is over.
      nonfinite: Clients that were left out as not finite.

    Returns:
      What is wrong, or None. A round to which nobody came is neither.
    """
    if participating == 0:
      return "no client was finite" if nonfinite else None
    if not math.isfinite(loss):
      return f"train/loss is {loss}"
    if self._max_jump and len(self.losses) >= _FEWEST:
      usual = statistics.median(self.losses)
      if loss > self._max_jump * usual:
        return (
          f"train/loss is {loss:.6g}, more than {self._max_jump:g} times "
          f"{usual:.6g}, the median of {len(self.losses)} rounds"
        )
    self.losses = [*self.losses, loss][-self._window :]
    return None
