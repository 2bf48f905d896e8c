"""Packs the next cohort in a thread while the device runs this one."""

from collections.abc import Callable, Generator
import concurrent.futures
from typing import TypeVar

T = TypeVar("T")


def prefetch(
  make: Callable[[int], T], first: int, last: int
) -> Generator[tuple[int, T]]:
  """Yields `(i, make(i))` for i in [first, last), made one ahead in a thread.

  Args:
    make: Called in order, in one thread; what it raises is raised here.
    first: First index.
    last: One past the last index.

  Yields:
    The index and what was made of it.
  """
  with concurrent.futures.ThreadPoolExecutor(max_workers=1) as pool:
    pending = pool.submit(make, first) if first < last else None
    for index in range(first, last):
      assert pending is not None  # There is an index, so one was made.
      value = pending.result()
      if index + 1 < last:
        pending = pool.submit(make, index + 1)
      yield index, value
