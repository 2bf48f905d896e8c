"""Checks of what algorithms are given, each in one line."""

import math
from typing import Annotated, Any

from fedfm import errors
from fedfm.privacy import Mechanism
from fedfm.types import Aggregator

# Annotates what an algorithm has no place for, and refuses by `check_absent`;
# of its field in a config only the default is taken.
Absent = Annotated[Any, "None or ()"]


def check_seed(seed: int) -> int:
  """Checks that a seed fits the 32 bits that a key takes.

  Args:
    seed: The seed.

  Returns:
    `seed`.

  Raises:
    ConfigError: Out of [0, 2**32); a key would silently wrap around.
  """
  if isinstance(seed, bool) or not isinstance(seed, int):
    raise errors.ConfigError(f"seed: got {seed!r}, expected an integer")
  if not 0 <= seed < 2**32:
    raise errors.ConfigError(f"seed: got {seed}, expected 0 <= seed < 2**32")
  return seed


def check_num_clients(num_clients: int | None) -> int:
  """Checks the size of the population, where an algorithm needs it.

  Args:
    num_clients: The size, or None.

  Returns:
    `num_clients`.

  Raises:
    ConfigError: None, or below 1.
  """
  if num_clients is None or num_clients < 1:
    raise errors.ConfigError(
      f"num_clients: got {num_clients}, but this algorithm remembers its "
      "clients: expected the size of the population"
    )
  return num_clients


def check_number(
  name: str,
  value: float,
  least: float = 0.0,
  *,
  most: float = math.inf,
  open_at: tuple[float, ...] = (math.inf,),
) -> float:
  """Checks an option of an algorithm.

  Args:
    name: The option's name, for the message.
    value: The number.
    least: The least that it may be.
    most: The most that it may be.
    open_at: Ends of the range that it may not be.

  Returns:
    `value`.

  Raises:
    ConfigError: Out of range, or not a number.

  Examples:
    >>> check_number("decay", 0.5, most=1, open_at=(1,))
    0.5
  """
  if not least <= value <= most or value in open_at:
    ends = "(" if least in open_at else "[", ")" if most in open_at else "]"
    raise errors.ConfigError(
      f"{name}: got {value}, expected a number in "
      f"{ends[0]}{least:g}, {most:g}{ends[1]}"
    )
  return value


def check_mechanism(
  mechanism: Mechanism, aggregator: Aggregator | None
) -> Aggregator:
  """Checks that nothing else aggregates beside a private mechanism.

  Args:
    mechanism: The mechanism.
    aggregator: What the algorithm or its user asks for.

  Returns:
    The mechanism's aggregator.

  Raises:
    ConfigError: An aggregator, which would see what the mechanism is to hide.
  """
  if aggregator is not None:
    raise errors.ConfigError(
      "mechanism: got one beside an aggregator, expected an algorithm that "
      "takes the mean of the clients' deltas"
    )
  return mechanism.aggregator


def check_absent(why: str, **given: Any) -> None:
  """Refuses what an algorithm has no place for.

  Args:
    why: The reason, for the message.
    **given: Arguments by name; None and () are nothing.

  Raises:
    ConfigError: One is given.

  Examples:
    >>> check_absent("it has no server", server_optimizer=None, transforms=())
  """
  for name, value in given.items():
    if value is None or (isinstance(value, tuple | list) and not value):
      continue
    got = repr(value) if isinstance(value, str | int | float) else "one"
    nothing = "()" if name == "transforms" else "None"
    raise errors.ConfigError(
      f"{name}: got {got}, but {why}: expected {nothing}"
    )
