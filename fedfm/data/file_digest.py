"""A digest of the files that data are read from, in a fraction of a second.

Of more than 64 MiB only evenly spaced parts are read, so that a small change in
a very large file may not be seen. It is of contents and sizes, not of times and
places: files that were moved or copied are the same.
"""

from collections.abc import Mapping
import hashlib
import os
import pathlib

from fedfm import errors

_MOST_BYTES = 64 << 20  # That are read.
_PART_BYTES = 64 << 10  # Of each part, where not all is read.


def digest(
  files: Mapping[str, pathlib.Path],
  most_bytes: int = _MOST_BYTES,
  part_bytes: int = _PART_BYTES,
) -> str:
  """Names the content of files.

  Args:
    files: By name, which is part of it.
    most_bytes: How much is read, in all.
    part_bytes: Bytes of a part, where there are more.

  Returns:
    "sha256:" and 64 hex digits.

  Raises:
    DataError: A file cannot be read.
  """
  hashed, before = hashlib.sha256(), 0
  try:
    sizes = {name: os.path.getsize(files[name]) for name in sorted(files)}
    total = sum(sizes.values())
    # Bytes from a part's begin to the next one's, through all files.
    step = part_bytes * -(-total // most_bytes)
    for name, size in sizes.items():
      hashed.update(f"{name}\0{size}\0".encode())
      first = -before % step if total > most_bytes else 0
      with open(files[name], "rb") as file:
        for at in range(first, size, max(step, part_bytes)):
          file.seek(at)
          hashed.update(file.read(part_bytes))
      before += size
  except OSError as e:
    raise errors.DataError(
      f"{e.filename or 'data'}: cannot be read: {e.strerror}"
    ) from e
  return f"sha256:{hashed.hexdigest()}"
