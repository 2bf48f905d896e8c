"""Whether the rows of a round fit the memory of the host that packs them."""

import os

import jax
import numpy as np

from fedfm import errors
from fedfm.data.source import ClientSource
from fedfm.settings import Settings


def total() -> int:
  """Returns the bytes of memory that this machine has."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def row_bytes(source: ClientSource) -> int:
  """Returns the bytes of a row in a batch, with its mask, by the first client.

  Args:
    source: The clients, numeric.
  """
  fields = source.read(source.ids[0]).values()
  return 4 + sum(np.asarray(x)[:1].nbytes for x in fields)


def check_steps(settings: Settings, each: int, lanes: int) -> None:
  """Refuses batches of which not even one a lane fits.

  Args:
    settings: The run's settings.
    each: From `row_bytes`.
    lanes: Number of lanes.

  Raises:
    ConfigError: Names the field of the batch, and what its rows take.
  """
  for field, rows in (
    ("client.batch_size", settings.client.batch_size),
    ("eval.batch_size", settings.eval.batch_size),
  ):
    _check(f"{field}: got {rows}, whose rows", each, lanes, rows)


def check_round(settings: Settings, each: int, lanes: int, steps: int) -> None:
  """Refuses rounds of too many steps.

  Args:
    settings: The run's settings.
    each: From `row_bytes`.
    lanes: Likewise.
    steps: Of the longest lane in any round.

  Raises:
    ConfigError: Names the field that steps come from, and what they take.
  """
  c, rounds = settings.client, settings.rounds_per_dispatch
  rows = steps * c.batch_size
  field, value = "client.epochs", c.epochs
  if value == 1:
    field, value = "clients_per_round", settings.clients_per_round
  what = f"{field}: got {value}, with which the rows of a round"
  _check(what, each, lanes, rows)
  what = f"rounds_per_dispatch: got {rounds}, whose rows"
  _check(what, each, lanes, rows * rounds)


def _check(what: str, each: int, lanes: int, rows: int) -> None:
  lanes = max(1, lanes // jax.process_count())
  needed, there = lanes * rows * each, total()
  if needed > there:
    raise errors.ConfigError(
      f"{what} take {needed / 1e9:,.1f} GB on {lanes} lanes, expected at most "
      f"this machine's {there / 1e9:,.1f} GB of memory"
    )
