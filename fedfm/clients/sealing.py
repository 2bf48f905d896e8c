"""Records of clients' states with digests, and files that are written whole."""

import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from fedfm import errors

DIGEST = 8  # Bytes before a record's content; zero where none was written.


class DamagedRowsError(errors.CheckpointError):
  """Files of clients' states do not hold what was written."""


def seal(row: int, record: np.ndarray) -> None:
  """Writes a record's digest before its content."""
  record[:DIGEST] = np.frombuffer(digest(row, record[DIGEST:]), np.uint8)


def write_whole(path: pathlib.Path, content: bytes) -> None:
  """Writes a file whole or not at all, and brings it to the disk."""
  temporary = path.with_name(path.name + ".tmp")
  try:
    with open(temporary, "wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise
  folder = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(folder)
  finally:
    os.close(folder)


def digest(number: int, content: Any) -> bytes:
  """A digest of a record and its row, or of a log's head and its version."""
  start = number.to_bytes(8, "little")
  return hashlib.blake2b(
    start + bytes(content), digest_size=DIGEST, person=b"fedfm row"
  ).digest()


def json_digest(content: Any) -> str:
  """The SHA-256 of JSON data."""
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
