"""Tells files that are damaged from a machine that cannot read them now.

Damage is set aside, and an older checkpoint used. A read that fails for another
reason says nothing about the files: the run ends, and they stay as they are.
"""

import pathlib
import re
from typing import Any

import jax

from fedfm import errors
from fedfm.checkpoint import manifest as manifests

# What is not there, or is something else, is damage; other errors of the
# system (input/output, too many open files, stale handles) are the machine's.
_DAMAGE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_MACHINE = (OSError, MemoryError, jax.errors.JaxRuntimeError)
# TensorStore begins a message with its code, some with none. It has UNKNOWN for
# the system's errors that have no code of their own, such as EIO.
_CODE = re.compile(
  r"\b(ABORTED|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|"
  r"INTERNAL|INVALID_ARGUMENT|NOT_FOUND|OUT_OF_RANGE|PERMISSION_DENIED|"
  r"RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE|UNIMPLEMENTED|UNKNOWN): "
)
_MACHINE_CODES = frozenset((
    "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "UNAVAILABLE", "UNKNOWN",
))  # fmt: skip


def is_of_the_machine(error: Exception) -> bool:
  """Whether a failed read says nothing about the files.

  Args:
    error: Of Python, Orbax or TensorStore.

  Examples:
    >>> is_of_the_machine(OSError(5, "Input/output error"))
    True
    >>> is_of_the_machine(FileNotFoundError(2, "No such file or directory"))
    False
    >>> is_of_the_machine(ValueError("UNKNOWN: Error reading local file"))
    True
    >>> is_of_the_machine(ValueError("DATA_LOSS: Error decoding manifest"))
    False
  """
  if isinstance(error, _DAMAGE):
    return False
  code = _CODE.search(str(error))
  coded = code is not None and code[1] in _MACHINE_CODES
  return coded or isinstance(error, _MACHINE)


def of_reading(place: pathlib.Path | str, error: Exception):
  """Makes the error to raise where something could not be read.

  Args:
    place: What was read, for the message.
    error: What happened.

  Returns:
    A DamagedError, a StorageError, or `error` with the place before it where it
    is a CheckpointError already.
  """
  if isinstance(error, errors.CheckpointError):
    if str(error).startswith(f"{place}: "):
      return error
    return type(error)(f"{place}: {error}")
  kind = manifests.DamagedError
  if is_of_the_machine(error):
    kind = errors.StorageError
  return kind(f"{place}: unreadable: {one_line(error)}")


def one_line(error: Any) -> str:
  """Returns an error's kind and message, without TensorStore's appendix."""
  # It appends its whole specification, as [name='...'].
  text = re.split(r" \[\w+='", " ".join(str(error).split()))[0]
  return f"{type(error).__name__}: {text[:400]}" if text else repr(error)
