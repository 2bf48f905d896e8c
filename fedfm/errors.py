"""One exception class per family of bad input; scripts turn them into exit 2.

Every message is one line: what, where, got, expected.
"""

from collections.abc import Iterable
import difflib


class FedFMError(ValueError):
  """A mistake in what the user gave; the message is for the user."""


class ConfigError(FedFMError):
  """A config field, flag or argument is unknown, mistyped or out of range."""


class DataError(FedFMError):
  """Client data is missing, malformed or outside the model's vocabulary."""


class CheckpointError(FedFMError):
  """Weights or a run's folder cannot be read, written or trusted."""


class PrivacyError(FedFMError):
  """A privacy parameter is invalid or does not match the sampler."""


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns `" (did you mean 'x'?)"`, or what is known if nothing is close.

  Args:
    name: What the user wrote.
    known: The names that would have been accepted.

  Returns:
    A clause to append to an error message.

  Examples:
    >>> nearest("round", ["rounds", "seed"])
    " (did you mean 'rounds'?)"
    >>> nearest("zzz", ["rounds", "seed"])
    ' (known: rounds, seed)'
  """
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1)
  if close:
    return f" (did you mean {close[0]!r}?)"
  return f" (known: {', '.join(known)})"
