"""Where clients run: which lane, in which order, in buffers of which size.

Clients are assigned longest first to the least loaded lane (LPT, Graham 1969),
so the longest lane is at most 4/3 of the best possible and in practice within a
percent of max(mean load, largest client).
"""

from collections.abc import Iterable, Sequence

import numpy as np

from fedfm import errors

LANES_PER_ACCELERATOR = 16


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


def align(
  rows: Sequence[int], num_rows: int, num_lanes: int
) -> list[list[int]]:
  """Puts the client of store row r on lane r // slots, slot r % slots.

  For replicas, whose states are as large as the model: a state stays where its
  row of the client store is. `slots` is `num_rows / num_lanes`.

  Args:
    rows: The clients' rows in the client store.
    num_rows: Rows of the store.
    num_lanes: Number of lanes.

  Returns:
    For each lane, the indices of its clients in the order they run.

  Raises:
    ConfigError: Rows that are no multiple of the lanes.

  Examples:
    >>> align([3, 0, 1], 4, 2)
    [[1, 2], [0]]
  """
  if num_rows % num_lanes:
    raise errors.ConfigError(
      f"lanes: got {num_lanes}, expected a divisor of the {num_rows} clients, "
      "which stay on their lanes"
    )
  slots = num_rows // num_lanes
  lanes: list[list[int]] = [[] for _ in range(num_lanes)]
  for client in np.argsort(np.asarray(rows, np.int64), kind="stable"):
    lanes[rows[int(client)] // slots].append(int(client))
  return lanes


def auto_lanes(
  steps: Sequence[int],
  num_devices: int,
  on_cpu: bool,
  num_rows: int | None = None,
) -> int:
  """Chooses the number of lanes for a cohort.

  On a CPU one lane a device is best (its caches hold one client's activations);
  an accelerator wants many, but no more than keep every lane busy: lanes beyond
  total / largest only wait for the largest client.

  Args:
    steps: Local steps of each client.
    num_devices: Devices that lanes are split over.
    on_cpu: Whether these are CPU devices.
    num_rows: For an aligned layout, the rows that the lanes must divide.

  Returns:
    A multiple of `num_devices`; one that divides `num_rows` where there is one.
  """
  if on_cpu or not len(steps):
    return num_devices
  useful = -(-busy_lanes(steps) // num_devices)
  per_device = max(1, min(LANES_PER_ACCELERATOR, useful))
  while num_rows and num_rows % (num_devices * per_device) and per_device > 1:
    per_device -= 1
  return num_devices * per_device


def busy_lanes(steps: Sequence[int]) -> int:
  """Lanes that a cohort can keep busy, until its largest client is done.

  Args:
    steps: Local steps of each client, at least one of them.

  Returns:
    The number of lanes.

  Examples:
    >>> busy_lanes([6, 2, 2, 3])
    2
  """
  return min(len(steps), sum(steps) // max(steps))


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


def needed_sizes(
  steps: Sequence[int], num_lanes: int, num_rows: int | None = None
) -> tuple[int, int]:
  """Says what a cohort needs of its buffers.

  Args:
    steps: Local steps of each client.
    num_lanes: Number of lanes.
    num_rows: As in `plan_buckets`.

  Returns:
    Steps of the longest lane, and the most clients of a lane, each at least 1.

  Examples:
    >>> needed_sizes([1, 5, 2, 2], 2)
    (5, 3)
  """
  if num_rows:
    lanes = align(range(num_rows), num_rows, num_lanes)
  else:
    lanes = assign(steps, num_lanes)
  longest = max(sum(steps[c] for c in lane) for lane in lanes)
  return max(longest, 1), max(1, *map(len, lanes))


def plan_buckets(
  cohorts: Iterable[Sequence[int]],
  num_lanes: int,
  num_rows: int | None = None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Plans the padded sizes of many cohorts, so that few programs are compiled.

  Args:
    cohorts: For each cohort, the local steps of its clients.
    num_lanes: Number of lanes.
    num_rows: For an aligned layout, the rows of the store; a cohort then has
      the steps of every row, 0 for a client that sits out.

  Returns:
    Allowed lengths of the step axis (the largest needed, and a quarter of it),
    and allowed clients a lane (the largest needed), for `pack`.

  Examples:
    >>> plan_buckets([[1, 5, 2, 2], [3, 1]], 2)
    ((2, 5), (3,))
    >>> plan_buckets([[1, 5, 2, 0]], 2, num_rows=4)
    ((2, 6), (2,))
  """
  longest, most = 1, 1
  for steps in cohorts:
    needed = needed_sizes(steps, num_lanes, num_rows)
    longest, most = max(longest, needed[0]), max(most, needed[1])
  return tuple(sorted({-(-longest // 4), longest})), (most,)
