"""One exception class per family of bad input; scripts turn them into exit 2.

Every message is one line: what, where, got, expected.
"""

from collections.abc import Iterable, Iterator
import contextlib
import difflib
import os


class FedFMError(ValueError):
  """A mistake in what the user gave; the message is for the user."""

  exit_code = 2  # Of a script that ends with it.

  def __init__(self, message: object):
    """Keeps to one line, whatever the names in it hold.

    Args:
      message: What, where, got, expected.
    """
    super().__init__(" ".join(str(message).splitlines()))


class ConfigError(FedFMError):
  """A config field, flag or argument is unknown, mistyped or out of range."""


class DataError(FedFMError):
  """Client data is missing, malformed or outside the model's vocabulary."""


class CheckpointError(FedFMError):
  """Weights or a run's folder cannot be read, written or trusted."""


class StorageError(CheckpointError):
  """The machine cannot read files, which may be whole: a disk, a lost mount."""

  exit_code = 3


class SaveError(StorageError):
  """A running job cannot write any more: a full disk, a limit, a lost mount."""


class DivergedError(FedFMError):
  """The training loss is not finite or jumped, and the run was to stop then."""

  exit_code = 4


class PrivacyError(FedFMError):
  """A privacy parameter is invalid or does not match the sampler."""


@contextlib.contextmanager
def at(
  field: str,
  value: object,
  kinds: tuple[type[FedFMError], ...] = (CheckpointError, DataError),
) -> Iterator[None]:
  """Names the config's field in errors about the file that it names.

  Args:
    field: Its dotted name.
    value: Its value, which the message gets where it lacks it.
    kinds: Which errors.

  Yields:
    Nothing.

  Examples:
    >>> with at("model.path", "llama"):
    ...   raise DataError("no tokenizer")
    Traceback (most recent call last):
    ...
    fedfm.errors.DataError: model.path: llama: no tokenizer
  """
  try:
    yield
  except kinds as e:
    where = "" if str(value) in str(e) else f"{value}: "
    raise type(e)(f"{field}: {where}{e}") from None


def check_path(
  path: str | os.PathLike, kind: type[FedFMError] = ConfigError
) -> None:
  """Refuses a path that no file can have; that nothing is there is fine.

  Args:
    path: A path that the user gave.
    kind: What to raise.

  Raises:
    FedFMError: It is too long, holds NUL, or cannot be looked at.

  Examples:
    >>> check_path("a" * 300)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedfm.errors.ConfigError: aaa...aaa: File name too long
  """
  try:
    os.stat(path)
  except (FileNotFoundError, NotADirectoryError):
    pass
  except (OSError, ValueError) as e:
    reason = e.strerror if isinstance(e, OSError) else e
    raise kind(f"{os.fspath(path)}: {reason}") from None


def short(value: object) -> str:
  """Returns the `repr` of what a user gave, cut where it is very long.

  Args:
    value: Any value.

  Returns:
    At most 200 characters.

  Examples:
    >>> short("ten"), short(10**5000)
    ("'ten'", 'a value of very many digits')
  """
  try:
    text = repr(value)
  except ValueError:  # Python writes no integer of more than 4,300 digits.
    return "a value of very many digits"
  return text if len(text) <= 200 else f"{text[:60]}...{text[-30:]}"


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
