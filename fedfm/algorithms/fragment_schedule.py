"""When fragments of a model are exchanged; see `streaming_diloco.py`."""

from typing import NamedTuple

from fedfm import errors


class Schedule(NamedTuple):
  """When fragments are exchanged.

  Attributes:
    order: The fragment of each round of a cycle.
    first: Inner steps of round 0.
    gaps: Inner steps of each round of a cycle, but for round 0.
  """

  order: tuple[int, ...]
  first: int
  gaps: tuple[int, ...]

  def local_steps(self, round_index: int) -> int:
    """Inner steps of a round."""
    return (
      self.gaps[round_index % len(self.gaps)] if round_index else self.first
    )


def schedule(
  inner_steps: int, num_fragments: int, offsets: tuple[int, ...] = ()
) -> Schedule:
  """Orders the exchanges of a cycle of H steps.

  Args:
    inner_steps: H, from one exchange of a fragment to its next.
    num_fragments: Fragments.
    offsets: t_p of each fragment, distinct and in [0, H); default even. An
      offset of 0 is first met at step H.

  Returns:
    A `Schedule`.

  Raises:
    ConfigError: Fewer steps than fragments, or bad offsets.

  Examples:
    >>> schedule(10, 2, (7, 3))
    Schedule(order=(1, 0), first=3, gaps=(6, 4))
    >>> schedule(10, 2).gaps
    (5, 5)
  """
  if inner_steps < num_fragments:
    raise errors.ConfigError(
      f"inner_steps: got {inner_steps}, expected at least one for each of "
      f"{num_fragments} fragments"
    )
  if not offsets:
    offsets = tuple(
      (p + 1) * inner_steps // num_fragments % inner_steps
      for p in range(num_fragments)
    )
  in_range = all(0 <= t < inner_steps for t in offsets)
  if len(offsets) != num_fragments or len(set(offsets)) < len(offsets):
    in_range = False
  if not in_range:
    raise errors.ConfigError(
      f"offsets: got {offsets}, expected {num_fragments} distinct numbers in "
      f"[0, {inner_steps})"
    )
  times = [t or inner_steps for t in offsets]
  order = sorted(range(num_fragments), key=times.__getitem__)
  times = sorted(times)
  before = [times[-1] - inner_steps, *times]
  gaps = tuple(t - b for t, b in zip(times, before))
  return Schedule(tuple(order), times[0], gaps)
