"""Packing: lays the clients of a round out on lanes, on the host.

Clients are assigned longest first to the least loaded lane (LPT, Graham 1969),
so the longest lane is at most 4/3 of the best possible and in practice within a
percent of max(mean load, largest client).
"""

from collections.abc import Iterable, Sequence
import hashlib
import logging
from typing import Literal

import jax
import numpy as np

from fedfm import errors
from fedfm.data.source import ClientSource
from fedfm.types import Cohort

_LANES_PER_ACCELERATOR = 16


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


def assign(steps: Sequence[int], num_lanes: int) -> list[list[int]]:
  """Assigns clients to lanes, longest first to the least loaded.

  Args:
    steps: Local steps of each client.
    num_lanes: Number of lanes.

  Returns:
    For each lane, the indices of its clients in the order they run.

  Examples:
    >>> assign([1, 5, 2, 2], 2)
    [[1], [2, 3, 0]]
  """
  lanes: list[list[int]] = [[] for _ in range(num_lanes)]
  loads = np.zeros(num_lanes, np.int64)
  for client in np.argsort(-np.asarray(steps, np.int64), kind="stable"):
    lane = int(np.argmin(loads))
    lanes[lane].append(int(client))
    loads[lane] += steps[int(client)]
  return lanes


def auto_lanes(steps: Sequence[int], num_devices: int, on_cpu: bool) -> int:
  """Chooses the number of lanes for a cohort.

  On a CPU one lane a device is best (its caches hold one client's activations);
  an accelerator wants many, but no more than keep every lane busy: lanes beyond
  total / largest only wait for the largest client.

  Args:
    steps: Local steps of each client.
    num_devices: Devices that lanes are split over.
    on_cpu: Whether these are CPU devices.

  Returns:
    A multiple of `num_devices`.
  """
  if on_cpu or not len(steps):
    return num_devices
  useful = min(len(steps), sum(steps) // max(steps))
  per_device = min(_LANES_PER_ACCELERATOR, -(-useful // num_devices))
  return num_devices * max(1, per_device)


def bucket(size: int, allowed: Iterable[int] | None = None) -> int:
  """Rounds a buffer's size up, so that few distinct sizes are compiled.

  Args:
    size: The size needed.
    allowed: Sizes to choose from; a larger need, or None, gives a power of two.

  Returns:
    The smallest allowed size that holds `size`.

  Examples:
    >>> bucket(5), bucket(5, [4, 6, 12])
    (8, 6)
  """
  for candidate in sorted(allowed or ()):
    if size <= candidate:
      return candidate
  return 1 << max(0, int(size) - 1).bit_length()


def _check_integer(name, value, least, most=None, otherwise="") -> None:
  integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
  if not integer or value < least or (most is not None and value > most):
    allowed = f"at least {least}" if most is None else f"{least} to {most}"
    raise errors.ConfigError(
      f"{name}: got {value!r}, expected an integer of {allowed}{otherwise}"
    )


def _check_lanes(lanes, processes) -> None:
  if lanes % processes:
    raise errors.ConfigError(
      f"lanes: {processes} processes do not divide {lanes} lanes"
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
  local_steps: int | None = None,
  max_examples: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
  step_buckets: Iterable[int] | None = None,
  slot_buckets: Iterable[int] | None = None,
) -> Cohort:
  """Packs clients' examples into batches on lanes.

  Args:
    source: Where the examples are; numeric leaves only.
    ids: The cohort, each client once.
    batch_size: Examples a local step.
    epochs: Passes over each client's examples.
    lanes: Parallel tracks, or "auto".
    shuffle: Draw a new order of examples for every epoch, from (seed, round,
      client); otherwise the stored order.
    seed: Seed of the shuffle.
    round: Round of the shuffle.
    local_steps: Most steps a client takes, or None.
    max_examples: Most examples a client uses in an epoch, or None.
    process_index: This process; it reads only the clients of its own lanes.
    process_count: Processes; `lanes` must divide by it.
    step_buckets: Allowed lengths of the step axis; default powers of two.
    slot_buckets: Likewise for clients a lane.

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
  if local_steps is not None:
    _check_integer("local_steps", local_steps, 1, otherwise=", or None")
  if max_examples is not None:
    _check_integer("max_examples", max_examples, 1, otherwise=", or None")
  if lanes != "auto":
    _check_integer("lanes", lanes, 1, otherwise=", or 'auto'")
    _check_lanes(lanes, process_count)
  ids = list(ids)
  if len(set(ids)) < len(ids):
    repeated = next(i for i in ids if ids.count(i) > 1)
    raise errors.DataError(f"cohort: client {repeated!r} is there twice")
  sizes = [source.size(i) for i in ids]
  for client_id, size in zip(ids, sizes):
    if size < 1:
      raise errors.DataError(f"client {client_id!r}: has no examples")
  steps = [
    steps_per_client(n, batch_size, epochs, local_steps, max_examples)
    for n in sizes
  ]
  if lanes == "auto":
    lanes = auto_lanes(
      steps, jax.device_count(), jax.default_backend() == "cpu"
    )
    logging.getLogger(__name__).debug(
      "lanes='auto' chose %d for %d clients", lanes, len(ids)
    )
    _check_lanes(lanes, process_count)
  layout = assign(steps, lanes)
  lane_steps = [sum(steps[c] for c in clients) for clients in layout]
  num_steps = bucket(max(max(lane_steps), 1), step_buckets)
  num_slots = bucket(max(max(map(len, layout)), 1), slot_buckets)

  ends = sorted({e for c in layout for e in np.cumsum([steps[i] for i in c])})
  boundaries = np.full(num_steps + 1, ends[-1] if ends else 0, np.int32)
  boundaries[: len(ends) + 1] = [0, *ends]
  order = np.full(bucket(len(ids)) if ids else 1, -1, np.int32)
  for lane, clients in enumerate(layout):
    for slot, client in enumerate(clients):
      order[client] = lane * num_slots + slot

  per_process = lanes // process_count
  first = process_index * per_process
  own = layout[first : first + per_process]
  shape, slots = (per_process, num_steps), (per_process, num_slots)
  arrays = {
    "slot": np.zeros(shape, np.int32),
    "start": np.zeros(shape, bool),
    "end": np.zeros(shape, bool),
    "id_hash": np.zeros((*slots, 2), np.uint32),
    "row": np.zeros(slots, np.int32),
    "num_examples": np.zeros(slots, np.int32),
    "num_steps": np.zeros(slots, np.int32),
    "weight": np.zeros(slots, np.float32),
  }
  batches = _empty_batches(source, ids, (*shape, batch_size))
  for lane, clients in enumerate(own):
    at = 0
    for slot, client in enumerate(clients):
      client_id, count = ids[client], steps[client]
      examples = source.read(client_id)
      words = id_hash(client_id)
      rows = _example_rows(
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
      _fill(batches, (lane, slice(at, at + count)), examples, rows, client_id)
      arrays["slot"][lane, at:] = slot
      arrays["start"][lane, at] = True
      arrays["end"][lane, at + count - 1] = True
      arrays["id_hash"][lane, slot] = words
      arrays["row"][lane, slot] = source.index(client_id)
      arrays["num_examples"][lane, slot] = len(np.unique(rows[rows >= 0]))
      arrays["num_steps"][lane, slot] = count
      arrays["weight"][lane, slot] = 1
      at += count
  return Cohort(
    batches=batches,
    boundaries=boundaries,
    num_segments=np.asarray(len(ends), np.int32),
    order=order,
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
  for name, x in example.items():
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


def _fill(batches, where, examples, rows, client_id) -> None:
  """Copies a client's examples into its steps of one lane."""
  valid = rows >= 0
  batches["mask"][where] = valid
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
