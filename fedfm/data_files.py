"""A digest of the data that a run trains on.

A run that goes on with other data is another run, so every checkpoint has it.
"""

import hashlib
import pathlib

import numpy as np

from fedfm.data import ClientSource, file_digest
from fedfm.population import POOLED
from fedfm.settings import Settings

_MOST_CLIENTS = 32  # That are read, of a TFDS data set.


def digest(settings: Settings, train: ClientSource) -> str:
  """Names a run's data, wherever they are.

  By what the files hold, see `data.file_digest`. Those of a TFDS data set that
  is prepared again differ in their bytes, so that it is named by its clients,
  and what a few of them hold.

  Args:
    settings: The run's.
    train: The clients that it trains on.

  Returns:
    "sha256:" and 64 hex digits.

  Raises:
    DataError: A file cannot be read.
  """
  d, root = settings.data, pathlib.Path(settings.data.path)
  if d.name in ("jsonl", *POOLED):
    return file_digest.digest({"": root})
  if d.name != "files":
    return _of_clients(train)
  patterns = [d.files, *([d.test_files] if d.test_files else [])]
  found = [path for pattern in patterns for path in root.glob(pattern)]
  # Names count: they are the clients'.
  return file_digest.digest(
    {str(p.relative_to(root)): p for p in found if p.is_file()}
  )


def _of_clients(source: ClientSource) -> str:
  hashed = hashlib.sha256("\0".join(source.ids).encode())
  count = min(_MOST_CLIENTS, len(source))
  for row in np.linspace(0, len(source) - 1, count).round().astype(int):
    for name, x in sorted(source.read(source.ids[row]).items()):
      hashed.update(f"{name}\0{x.dtype}\0{x.shape}\0".encode())
      hashed.update(np.ascontiguousarray(x).tobytes())
  return f"sha256:{hashed.hexdigest()}"
