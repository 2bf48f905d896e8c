"""Packing: lays the clients of a round out on lanes, on the host."""

from collections.abc import Iterable, Sequence
import hashlib
import logging
from typing import Literal

import jax
import numpy as np

from fedfm import errors
from fedfm.data.layout import align, assign, auto_lanes, bucket
from fedfm.data.source import ClientSource
from fedfm.types import Cohort, LanePart

NUM_EXAMPLES = "num_examples"  # Of rows that hold several examples.


def id_hash(client_id: str) -> np.ndarray:
  """A 64-bit hash of a client's id, as two uint32 words.

  Args:
    client_id: The id.

  Returns:
    shape=(2,), dtype=uint32; the same on every machine.
  """
  digest = hashlib.blake2b(client_id.encode(), digest_size=8).digest()
  return np.frombuffer(digest, "<u4").copy()


def steps_per_client(
  num_examples: int,
  batch_size: int,
  epochs: int = 1,
  local_steps: int | None = None,
  max_examples: int | None = None,
) -> int:
  """Local steps of a client: every epoch's last batch may be part full.

  Args:
    num_examples: Examples that the client has.
    batch_size: Examples a step.
    epochs: Passes over the client's examples.
    local_steps: Most steps, or None.
    max_examples: Most examples used an epoch, or None.

  Returns:
    The number of steps, at least 1 for a client with an example.

  Examples:
    >>> steps_per_client(5, 2, epochs=2)
    6
  """
  if max_examples is not None:
    num_examples = min(num_examples, max_examples)
  steps = epochs * -(-num_examples // batch_size)
  return steps if local_steps is None else min(steps, local_steps)


def _check_integer(name, value, least, most=None, otherwise="") -> None:
  integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
  if not integer or value < least or (most is not None and value > most):
    allowed = f"at least {least}" if most is None else f"{least} to {most}"
    raise errors.ConfigError(
      f"{name}: got {value!r}, expected an integer of {allowed}{otherwise}"
    )


def _one_a_client(name, value, ids) -> list:
  """Repeats a single value; checks that several are as many as the clients."""
  if not isinstance(value, list | tuple | np.ndarray):
    return [value] * len(ids)
  if len(value) != len(ids):
    raise errors.ConfigError(
      f"{name}: got {len(value)} numbers for {len(ids)} clients"
    )
  return list(value)


def _check_lanes(lanes, processes) -> None:
  if lanes % processes:
    raise errors.ConfigError(
      f"lanes: {processes} processes do not divide {lanes} lanes"
    )


def _check_own_lanes(own_lanes, lanes, processes) -> None:
  if processes > 1:
    raise errors.ConfigError(
      f"process_count: got {processes}, expected 1 beside own_lanes, which "
      "say what this process packs"
    )
  if lanes == "auto":
    raise errors.ConfigError(
      "lanes: got 'auto', expected their number beside own_lanes"
    )
  for lane in own_lanes:
    _check_integer("own_lanes", lane, 0, lanes - 1)
  if list(own_lanes) != sorted(set(own_lanes)):
    raise errors.ConfigError(
      f"own_lanes: got {list(own_lanes)}, expected them ascending"
    )


def pack(
  source: ClientSource,
  ids: Sequence[str],
  *,
  batch_size: int,
  epochs: int = 1,
  lanes: int | Literal["auto"] = "auto",
  shuffle: bool = False,
  seed: int = 0,
  round: int = 0,  # pylint: disable=redefined-builtin
  local_steps: int | Sequence[int | None] | None = None,
  max_examples: int | None = None,
  rates: Sequence[float] | None = None,
  aligned: bool = False,
  process_index: int = 0,
  process_count: int = 1,
  own_lanes: Sequence[int] | None = None,
  step_buckets: Iterable[int] | None = None,
  slot_buckets: Iterable[int] | None = None,
  client_buckets: Iterable[int] | None = None,
) -> Cohort:
  """Packs clients' examples into batches on lanes.

  Args:
    source: Where the examples are; numeric leaves only. Rows that hold several
      examples say how many in a field "num_examples" [rows], which is counted
      for the clients' weights and not put into batches.
    ids: The cohort, each client once.
    batch_size: Examples a local step.
    epochs: Passes over each client's examples.
    lanes: Parallel tracks, or "auto".
    shuffle: Draw a new order of examples for every epoch, from (seed, round,
      client); otherwise the stored order.
    seed: Seed of the shuffle.
    round: Round of the shuffle.
    local_steps: Most steps a client takes, or one such number a client, or
      None.
    max_examples: Most examples a client uses in an epoch, or None.
    rates: Multiplies each client's learning rate; default 1.
    aligned: Put every client on the lane and slot where its row of the client
      store lies; see `align`. All of `source.ids` have a slot.
    process_index: This process. Of `process_count`, each packs an equal block
      of the lanes, as is right where no part of the mesh axis `clients` is
      shared by processes.
    process_count: Processes; `lanes` must divide by it.
    own_lanes: Instead of both, the numbers of the lanes to pack, ascending:
      what `clients.own_lanes` gives for a mesh. Beside the first client of the
      cohort, whose shapes all must have, only their clients are read.
    step_buckets: Allowed lengths of the step axis; default powers of two.
    slot_buckets: Likewise for clients a lane.
    client_buckets: Likewise for clients of the cohort.

  Returns:
    A `Cohort` of NumPy arrays, this process's lanes only. Clients' order in
    `Cohort.order` is that of `ids`.

  Raises:
    DataError: A repeated id, a client without examples, or non-numeric leaves.
    ConfigError: A number out of range.
  """
  _check_integer("batch_size", batch_size, 1)
  _check_integer("epochs", epochs, 1)
  _check_integer("seed", seed, 0, 2**32 - 1)
  _check_integer("round", round, 0, 2**32 - 1)
  _check_integer("process_count", process_count, 1)
  _check_integer("process_index", process_index, 0, process_count - 1)
  ids = list(ids)
  caps = _one_a_client("local_steps", local_steps, ids)
  for cap in caps:
    if cap is not None:
      _check_integer("local_steps", cap, 1, otherwise=", or None")
  rates = _one_a_client("rates", 1.0 if rates is None else rates, ids)
  for rate in rates:
    is_number = isinstance(rate, int | float | np.number)
    if not is_number or not 0 <= rate < float("inf"):
      raise errors.ConfigError(
        f"rates: got {rate!r}, expected finite numbers of at least 0"
      )
  if max_examples is not None:
    _check_integer("max_examples", max_examples, 1, otherwise=", or None")
  if lanes != "auto":
    _check_integer("lanes", lanes, 1, otherwise=", or 'auto'")
    _check_lanes(lanes, process_count)
  if own_lanes is not None:
    _check_own_lanes(own_lanes, lanes, process_count)
  if len(set(ids)) < len(ids):
    repeated = next(i for i in ids if ids.count(i) > 1)
    raise errors.DataError(f"cohort: client {repeated!r} is there twice")
  sizes = [source.size(i) for i in ids]
  for client_id, size in zip(ids, sizes):
    if size < 1:
      raise errors.DataError(f"client {client_id!r}: has no examples")
  steps = [
    steps_per_client(n, batch_size, epochs, cap, max_examples)
    for n, cap in zip(sizes, caps)
  ]
  if lanes == "auto":
    lanes = auto_lanes(
      steps,
      jax.device_count(),
      jax.default_backend() == "cpu",
      len(source) if aligned else None,
    )
    # Runs give a number, and say it themselves.
    logging.getLogger(__name__).info(
      "lanes='auto' chose %d for %d clients", lanes, len(ids)
    )
    _check_lanes(lanes, process_count)
  rows = [source.index(i) for i in ids]
  if aligned:
    layout = align(rows, len(source), lanes)
    num_slots = len(source) // lanes
    slot_of = {client: row % num_slots for client, row in enumerate(rows)}
  else:
    layout = assign(steps, lanes)
    num_slots = bucket(max(max(map(len, layout)), 1), slot_buckets)
    slot_of = {c: slot for lane in layout for slot, c in enumerate(lane)}
  lane_steps = [sum(steps[c] for c in clients) for clients in layout]
  num_steps = bucket(max(max(lane_steps), 1), step_buckets)

  ends = sorted({e for c in layout for e in np.cumsum([steps[i] for i in c])})
  boundaries = np.full(num_steps + 1, ends[-1] if ends else 0, np.int32)
  boundaries[: len(ends) + 1] = [0, *ends]
  order = np.full(bucket(max(len(ids), 1), client_buckets), -1, np.int32)
  for lane, clients in enumerate(layout):
    for client in clients:
      order[client] = lane * num_slots + slot_of[client]

  if own_lanes is None:
    block = lanes // process_count
    own_lanes = range(process_index * block, (process_index + 1) * block)
  own = [layout[lane] for lane in own_lanes]
  shape, slots = (len(own), num_steps), (len(own), num_slots)
  arrays = {
    "slot": np.zeros(shape, np.int32),
    "start": np.zeros(shape, bool),
    "end": np.zeros(shape, bool),
    "id_hash": np.zeros((*slots, 2), np.uint32),
    "row": np.zeros(slots, np.int32),
    "num_examples": np.zeros(slots, np.int32),
    "num_steps": np.zeros(slots, np.int32),
    "weight": np.zeros(slots, np.float32),
    "rate": np.ones(slots, np.float32),
  }
  batches = _empty_batches(source, ids, (*shape, batch_size))
  for lane, clients in enumerate(own):
    at = 0
    for client in clients:
      client_id, count, slot = ids[client], steps[client], slot_of[client]
      examples = source.read(client_id)
      words = id_hash(client_id)
      chosen = _example_rows(
        min(sizes[client], max_examples or sizes[client]),
        sizes[client],
        epochs,
        batch_size,
        count,
        np.random.SeedSequence([seed, round, *map(int, words)])
        if shuffle
        else None,
      )
      for name, x in examples.items():
        if len(x) != sizes[client]:
          raise errors.DataError(
            f"client {client_id!r}, field {name!r}: {len(x)} examples, "
            f"expected {sizes[client]}"
          )
      _fill(batches, (lane, slice(at, at + count)), examples, chosen, client_id)
      arrays["slot"][lane, at:] = slot
      arrays["start"][lane, at] = True
      arrays["end"][lane, at + count - 1] = True
      arrays["id_hash"][lane, slot] = words
      arrays["row"][lane, slot] = rows[client]
      arrays["rate"][lane, slot] = rates[client]
      used = np.unique(chosen[chosen >= 0])
      held = examples.get(NUM_EXAMPLES)
      arrays["num_examples"][lane, slot] = (
        len(used) if held is None else np.sum(held[used])
      )
      arrays["num_steps"][lane, slot] = count
      arrays["weight"][lane, slot] = 1
      at += count
  return Cohort(
    batches=batches,
    boundaries=boundaries,
    num_segments=np.asarray(len(ends), np.int32),
    order=order,
    aligned=aligned,
    part=None if len(own) == lanes else LanePart(lanes, tuple(own_lanes)),
    **arrays,
  )


def _example_rows(
  used: int,
  size: int,
  epochs: int,
  batch_size: int,
  steps: int,
  shuffle_seed: np.random.SeedSequence | None,
) -> np.ndarray:
  """Which example is where: [steps, batch], -1 for padding."""
  rng = None if shuffle_seed is None else np.random.default_rng(shuffle_seed)
  per_epoch = -(-used // batch_size)
  epochs = min(epochs, -(-steps // per_epoch))  # Those that steps come from.
  rows = np.full((epochs * per_epoch, batch_size), -1, np.int64)
  for epoch in range(epochs):
    order = np.arange(size) if rng is None else rng.permutation(size)
    block = rows[epoch * per_epoch : (epoch + 1) * per_epoch]
    block.reshape(-1)[:used] = order[:used]
  return rows[:steps]


def _empty_batches(source, ids, shape) -> dict[str, np.ndarray]:
  """Zeros of the leaves' shapes, [lanes, steps, batch, ...]."""
  example = source.read(ids[0] if ids else source.ids[0])
  batches = {"mask": np.zeros(shape, np.float32)}
  for name, x in _leaves(example).items():
    x = np.asarray(x)
    if x.dtype.kind not in "biuf" and x.dtype.name != "bfloat16":
      raise errors.DataError(
        f"field {name!r}: dtype {x.dtype}, expected numbers (text must be "
        "tokenized first: fedfm.data.tokenize)"
      )
    if name == "mask":
      raise errors.DataError(
        "field 'mask': this name is kept for the mask of padded examples"
      )
    batches[name] = np.zeros((*shape, *x.shape[1:]), x.dtype)
  return batches


def _leaves(examples):
  """What goes into batches."""
  return {name: x for name, x in examples.items() if name != NUM_EXAMPLES}


def _fill(batches, where, examples, rows, client_id) -> None:
  """Copies a client's examples into its steps of one lane."""
  valid = rows >= 0
  batches["mask"][where] = valid
  examples = _leaves(examples)
  if set(examples) != set(batches) - {"mask"}:
    raise errors.DataError(
      f"client {client_id!r}: fields {sorted(examples)}, expected "
      f"{sorted(set(batches) - {'mask'})}"
    )
  for name, x in examples.items():
    x = np.asarray(x)
    target = batches[name]
    if x.shape[1:] != target.shape[3:] or x.dtype != target.dtype:
      raise errors.DataError(
        f"client {client_id!r}, field {name!r}: {x.dtype}{list(x.shape[1:])},"
        f" expected {target.dtype}{list(target.shape[3:])}"
      )
    picked = x[np.maximum(rows, 0)]
    picked[~valid] = 0
    target[where] = picked


def efficiency(cohort: Cohort) -> float:
  """Useful steps over steps run, of a cohort packed by one process.

  Args:
    cohort: From `pack`.

  Returns:
    A share in (0, 1]; 1 when all lanes end together.
  """
  run = int(cohort.boundaries[int(cohort.num_segments)]) * cohort.num_lanes
  return float(np.sum(cohort.num_steps)) / max(run, 1)
