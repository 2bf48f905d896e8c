"""The files that a run's data are read from, and a digest of what they hold.

A run that goes on with other data is another run, so every checkpoint has it.
"""

import pathlib

from fedfm.data import file_digest, python_stdlib
from fedfm.population import POOLED
from fedfm.settings import Settings


def digest(settings: Settings) -> str:
  """Names the content of a run's data; see `data.file_digest`.

  Args:
    settings: The run's.

  Returns:
    "sha256:" and 64 hex digits, the same wherever the files are.

  Raises:
    DataError: A file cannot be read.
  """
  d, root = settings.data, place(settings)
  if d.name in ("jsonl", *POOLED):
    return file_digest.digest({"": root})
  patterns = [d.files if d.name == "files" else "*.array_record*"]
  if d.test_files:
    patterns.append(d.test_files)
  found = [path for pattern in patterns for path in root.glob(pattern)]
  # Names count: they tell the clients, or the splits, apart.
  return file_digest.digest(
    {str(p.relative_to(root)): p for p in found if p.is_file()}
  )


def place(settings: Settings) -> pathlib.Path:
  """Returns the file or folder that a run's data are read from."""
  d = settings.data
  if d.name == "python_stdlib":
    return python_stdlib.folder(d.path or None)
  if d.name in ("jsonl", "files", *POOLED):
    return pathlib.Path(d.path)
  return file_digest.tfds_folder(d.name, d.path or None)
