"""Small data sets that live on the device: a round is sent row numbers only.

All clients' examples are concatenated once and placed beside the base; the
cohort's batches hold the numbers of their rows, and the round looks them up:

  rows, table = resident.rows(source)
  round_fn = resident.looked_up(algorithm.round)
  cohort = data.pack(rows, ids, batch_size=20)
  state, metrics = round_fn(state, (base, table), cohort)
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from fedfm import errors
from fedfm.data import packing
from fedfm.data import source as source_lib

PyTree = Any
ROW = "row"


def rows(
  source: source_lib.ClientSource, max_bytes: int = 2**31
) -> tuple[source_lib.ClientSource, source_lib.Examples]:
  """Splits a population into row numbers and one table of examples.

  Args:
    source: The clients, numeric; all are read.
    max_bytes: The largest table that may be made.

  Returns:
    A `ClientSource` of the same clients whose field is `row`, int32 [examples],
    beside the "num_examples" of rows that hold several (see `packing.pack`),
    and the table {field: array [all examples, ...]} of all other fields.

  Raises:
    DataError: A table above `max_bytes`.

  Examples:
    >>> clients = {"a": {"x": [5.0, 6.0]}, "b": {"x": [7.0]}}
    >>> numbers, table = rows(source_lib.from_arrays(clients))
    >>> numbers.read("b")["row"].tolist(), table["x"].tolist()
    ([2], [5.0, 6.0, 7.0])
  """
  first, held, parts, size, count = {}, {}, [], 0, 0
  for client_id in source.ids:
    examples = dict(source.read(client_id))
    if packing.NUM_EXAMPLES in examples:  # Weighs the client, on the host.
      held[client_id] = examples.pop(packing.NUM_EXAMPLES)
    size += sum(x.nbytes for x in examples.values())
    if size > max_bytes:
      raise errors.DataError(
        f"data.resident: more than {max_bytes} bytes by client {client_id!r}, "
        "expected a data set that fits the device"
      )
    first[client_id] = count
    count += source.size(client_id)
    parts.append(examples)
  table = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

  def read(client_id: str) -> source_lib.Examples:
    begin = first[client_id]
    end = begin + source.size(client_id)
    examples = {ROW: np.arange(begin, end, dtype=np.int32)}
    if client_id in held:
      examples[packing.NUM_EXAMPLES] = held[client_id]
    return examples

  return source_lib.ClientSource(source.ids, source.size_fn, read), table


def place(table: source_lib.Examples, mesh: Mesh) -> dict[str, jax.Array]:
  """Puts a whole table on every device.

  Args:
    table: From `rows`, the same in every process.
    mesh: The mesh.

  Returns:
    The table as global arrays.
  """
  whole = NamedSharding(mesh, jax.P())
  return {
    name: jax.make_array_from_callback(x.shape, whole, x.__getitem__)
    for name, x in table.items()
  }


def looked_up(round_fn: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a round read its cohort from the table that comes with the base.

  Args:
    round_fn: `round(state, base, cohort) -> (state, metrics)`.

  Returns:
    `round(state, (base, table), cohort)`, whose cohort's batches hold `row` and
    `mask`, [lanes, steps, batch] each.
  """

  def run(state, base_and_table, cohort):
    base, table = base_and_table
    batches = dict(cohort.batches)
    numbers = batches.pop(ROW, None)
    if numbers is not None:  # Deterministic rounds conclude without batches.
      batches |= {name: x[numbers] for name, x in table.items()}
    return round_fn(state, base, dataclasses.replace(cohort, batches=batches))

  return run
