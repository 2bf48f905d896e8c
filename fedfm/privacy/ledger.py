"""What a run has spent: every round that released anything, in order."""

from collections.abc import Mapping
from concurrent import futures
from typing import Any

from fedfm import errors
from fedfm.privacy.accounting import Accounting, Event, spent_epsilon


class Ledger:
  """Charges rounds, also those that nobody came to, and tells epsilon.

  A round that is run again after a kill draws the same noise and so releases
  nothing new: the ledger of the checkpoint, which has not seen it, charges it.
  """

  def __init__(
    self, accounting: Accounting, stored: Mapping[str, Any] | None = None
  ):
    """Begins, or goes on from a checkpoint.

    Args:
      accounting: What rounds are charged from now on.
      stored: `to_json` of an earlier ledger.

    Raises:
      CheckpointError: A stored ledger that cannot be read.
    """
    self._accounting = accounting
    self._spent: list[tuple[Event, int]] = []
    # Epsilon of a round is worked out while the round before it runs on.
    self._worker = futures.ThreadPoolExecutor(1, "epsilon")
    try:
      for entry in (stored or {}).get("spent", ()):
        fields = {name: entry[name] for name in Event._fields}
        self._spent.append((Event(**fields), int(entry["rounds"])))
    except (KeyError, TypeError, ValueError):
      raise errors.CheckpointError(
        f"privacy ledger: got {stored!r}, expected rounds and their noise"
      ) from None

  @property
  def rounds(self) -> int:
    """Rounds charged so far."""
    return sum(count for _, count in self._spent)

  def charge(self) -> float:
    """Charges a round; returns epsilon of all so far."""
    self._spent = self._after_a_round()
    epsilon = self._epsilon(self._spent)
    self._worker.submit(self._epsilon, self._after_a_round())
    return epsilon

  def _after_a_round(self) -> list[tuple[Event, int]]:
    event, spent = self._accounting.event, self._spent
    if spent and spent[-1][0] == event:
      return [*spent[:-1], (event, spent[-1][1] + 1)]
    return [*spent, (event, 1)]

  def _epsilon(self, spent: list[tuple[Event, int]]) -> float:
    a = self._accounting
    return spent_epsilon(tuple(spent), a.delta, a.accountant)

  def to_json(self) -> dict[str, Any]:
    """What a checkpoint keeps."""
    return {
      "delta": self._accounting.delta,
      "accountant": self._accounting.accountant,
      "spent": [
        {**event._asdict(), "rounds": count} for event, count in self._spent
      ],
    }
