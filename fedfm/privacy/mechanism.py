"""What stands between the clients' messages and all that is made of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedfm.types import Aggregator

PyTree = Any


class Release(NamedTuple):
  """What a mechanism lets out of a round.

  Attributes:
    update: In the place of an aggregate; all that the server sees.
    state: The mechanism's, for the next round.
    done: bool scalar; where it is False the round leaves the server as it is.
    metrics: Scalars by name, for whoever runs the simulation.
  """

  update: PyTree
  state: PyTree
  done: jax.Array
  metrics: dict[str, jax.Array]


class Mechanism(NamedTuple):
  """An aggregation that says little of each client.

  What an algorithm does with the update afterwards cannot undo this.

  Attributes:
    aggregator: Collects the messages; clients weigh the same.
    release: `release(aggregate, state, weights, key) -> Release`, of what the
      aggregator finished with, its state, the clients' weights [clients], and a
      key of (seed, round).
    num_bytes: `num_bytes(message) -> int` on the wire; None for as it is.
  """

  aggregator: Aggregator
  release: Callable[[PyTree, PyTree, jax.Array, jax.Array], Release]
  num_bytes: Callable[[PyTree], int] | None = None
