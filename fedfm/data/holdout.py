"""Holding out clients, and a part of each client, for evaluation."""

from collections.abc import Sequence
import hashlib

import numpy as np

from fedfm import errors
from fedfm.data import source as source_lib


def _unit(*parts: str) -> float:
  """A stable hash in [0, 1)."""
  digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little") / 2**64


def hold_out(
  source: source_lib.ClientSource,
  unseen_fraction: float,
  heldout_fraction: float,
  seed: int = 0,
) -> source_lib.FederatedData:
  """Splits a population into training clients and evaluation populations.

  Args:
    source: All clients and examples.
    unseen_fraction: Share of clients that are never trained on.
    heldout_fraction: Share of examples held out in each training client; a
      client of one example holds out none.
    seed: Other seeds choose other clients and examples.

  Returns:
    `train`, and `evals` "seen" (held-out examples of training clients) and
    "unseen" (clients never trained on), each where it is not empty.

  Raises:
    ConfigError: Nothing would be left to train on.
  """
  ranked = sorted(source.ids, key=lambda c: (_unit(str(seed), c), c))
  num_unseen = int(round(unseen_fraction * len(ranked)))
  if num_unseen >= len(ranked):
    raise errors.ConfigError(
      f"data.unseen_fraction: {unseen_fraction} of {len(ranked)} clients "
      "leaves none to train on"
    )
  unseen = set(ranked[:num_unseen])
  seen = [c for c in source.ids if c not in unseen]
  train, held_out = split_examples(source, seen, heldout_fraction, seed)
  evals = {}
  with_held_out = [c for c in seen if held_out.size(c)]
  if with_held_out:
    evals["seen"] = source_lib.subset(held_out, with_held_out)
  if unseen:
    evals["unseen"] = source_lib.subset(
      source, [c for c in source.ids if c in unseen]
    )
  return source_lib.FederatedData(train=train, evals=evals)


def split_examples(
  source: source_lib.ClientSource,
  ids: Sequence[str],
  heldout_fraction: float,
  seed: int = 0,
) -> tuple[source_lib.ClientSource, source_lib.ClientSource]:
  """Holds out a share of each client's examples.

  Args:
    source: The clients.
    ids: Those to split.
    heldout_fraction: As in `hold_out`.
    seed: Likewise.

  Returns:
    What is left to train on, and what is held out, where a client may hold
    nothing.
  """

  def held_out_rows(client_id: str) -> np.ndarray:
    size = source.size(client_id)
    count = min(round(heldout_fraction * size), size - 1)
    if heldout_fraction > 0 and size > 1:
      count = max(count, 1)
    order = sorted(
      range(size), key=lambda i: _unit(str(seed), client_id, str(i))
    )
    chosen = np.zeros(size, bool)
    chosen[order[:count]] = True
    return chosen

  def part(held_out: bool) -> source_lib.ClientSource:
    def size(client_id):
      return int(np.sum(held_out_rows(client_id) == held_out))

    def read(client_id):
      rows = held_out_rows(client_id) == held_out
      return {k: x[rows] for k, x in source.read(client_id).items()}

    return source_lib.ClientSource(ids, size, read)

  return part(False), part(True)
