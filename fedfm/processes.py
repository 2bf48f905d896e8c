"""What the processes of one run have to agree on before and while they run."""

from collections.abc import Mapping
import json
from typing import Any
import zlib

import jax
from jax.experimental import multihost_utils
import numpy as np

from fedfm import errors


def wait_for_all(name: str) -> None:
  """Waits until every process is here; a no-op with one.

  Args:
    name: The same in all of them.
  """
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def agree(error: errors.FedFMError | None, fields: Mapping[str, Any]) -> None:
  """Lets either all processes go on, or none; all of them call it.

  A process that left on its own would leave the others waiting for it.

  Args:
    error: Why this process cannot go on, or None.
    fields: What must be the same in all of them: name -> JSON value, with the
      same names everywhere.

  Raises:
    FedFMError: `error`, if there is one.
    ConfigError: Another process has one, or was given another config.
  """
  if jax.process_count() > 1:
    texts = [json.dumps(value, sort_keys=True) for value in fields.values()]
    row = [error is not None, *(zlib.crc32(text.encode()) for text in texts)]
    rows = multihost_utils.process_allgather(np.array(row, np.uint32))
    others = [i for i in np.flatnonzero(rows[:, 0]).tolist()]
    differing = [
      name
      for name, column in zip(fields, rows[:, 1:].T)
      if len(set(column.tolist())) > 1
    ]
    if error is None and others:
      raise errors.ConfigError(
        f"process {jax.process_index()}: process {others[0]} cannot start, "
        "which says why"
      )
    if error is None and differing:
      name = differing[0]
      raise errors.ConfigError(
        f"{name}: process {jax.process_index()} has {fields[name]!r}, another "
        "one has not; expected one config for all processes"
      )
  if error is not None:
    raise error
