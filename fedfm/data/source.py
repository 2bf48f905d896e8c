"""Client populations: who the clients are and how to read one's examples."""

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple, overload

import numpy as np

from fedfm import errors

Examples = dict[str, np.ndarray]


class KnownIds(Sequence[str]):
  """Names that are unique and valid, and find their own rows."""

  @abc.abstractmethod
  def name(self, row: int) -> str:
    """Returns the name in a row, 0 to one less than their number."""

  @overload
  def __getitem__(self, row: int) -> str: ...

  @overload
  def __getitem__(self, row: slice) -> list[str]: ...

  def __getitem__(self, row):
    rows = range(len(self))[row]  # Raises IndexError; counts from the end.
    return self.name(rows) if isinstance(rows, int) else [*map(self.name, rows)]

  @abc.abstractmethod
  def row(self, client_id: Any) -> int | None:
    """Returns the row of a client, or None for another name."""


@dataclasses.dataclass(frozen=True, eq=False)
class ClientSource:
  """A population of clients whose examples are read one client at a time.

  Nothing but the ids is held here: `size_fn` and `read_fn` are called with a
  known id, and may generate, parse or cache as they like.

  Attributes:
    ids: The clients' names, unique; a client's position is its row. Those of
      an `id_file` stay on disk.
    size_fn: Client id -> number of examples, cheap.
    read_fn: Client id -> {field: array [examples, ...]}.

  Raises:
    DataError: No clients, or an id that is repeated, empty, not a string or not
      encodable as UTF-8.
  """

  ids: Sequence[str]
  size_fn: Callable[[str], int] = dataclasses.field(repr=False)
  read_fn: Callable[[str], Examples] = dataclasses.field(repr=False)
  _row: Callable[[Any], int | None] = dataclasses.field(init=False, repr=False)

  def __post_init__(self):
    if isinstance(self.ids, KnownIds):
      object.__setattr__(self, "_row", self.ids.row)
      return
    ids = tuple(self.ids)
    if not ids:
      raise errors.DataError("client ids: got none, expected at least 1 client")
    for client_id in ids:
      check_id(client_id)
    rows = {client_id: row for row, client_id in enumerate(ids)}
    if len(rows) < len(ids):
      repeated = next(c for row, c in enumerate(ids) if rows[c] != row)
      raise errors.DataError(
        f"client ids: {repeated!r} is repeated, expected unique ids"
      )
    object.__setattr__(self, "ids", ids)
    object.__setattr__(self, "_row", rows.get)

  def __len__(self) -> int:
    """Returns the number of clients."""
    return len(self.ids)

  def index(self, client_id: str) -> int:
    """Returns the client's position in `ids`; DataError if unknown."""
    row = self._row(client_id) if isinstance(client_id, str) else None
    if row is None:
      # Nearest names of a large population would take seconds to find.
      hint = errors.nearest(str(client_id), self.ids) if len(self) <= 50 else ""
      raise errors.DataError(
        f"client id {client_id!r} is not one of the source's {len(self)}"
        f" clients{hint}"
      )
    return row

  def size(self, client_id: str) -> int:
    """Returns the client's number of examples; DataError if unknown."""
    self.index(client_id)
    return self.size_fn(client_id)

  def read(self, client_id: str) -> Examples:
    """Returns {field: array [examples, ...]}; DataError if unknown."""
    self.index(client_id)
    return self.read_fn(client_id)


class FederatedData(NamedTuple):
  """The clients to train on, and the populations to evaluate on by name."""

  train: ClientSource
  evals: Mapping[str, ClientSource]


def check_id(client_id: Any) -> None:
  """Raises DataError unless `client_id` is a non-empty, encodable string."""
  if not isinstance(client_id, str) or not client_id:
    raise errors.DataError(
      f"client id: got {client_id!r}, expected a non-empty string"
    )
  try:
    client_id.encode()
  except UnicodeEncodeError:
    raise errors.DataError(
      f"client id {client_id!r} holds a lone surrogate, expected text that"
      " UTF-8 can encode"
    ) from None


def columns(arrays: Mapping[str, Any], owner: str) -> Examples:
  """Checks the fields of one client and makes them read-only arrays.

  Args:
    arrays: {field: [examples, ...]}, numbers or text.
    owner: Whose fields these are, for the messages.

  Returns:
    The same as arrays that cannot be written to; text becomes object arrays.

  Raises:
    DataError: No field, no example, a field of no examples axis, lengths that
      differ between fields, NaN or infinity, or values that are neither numbers
      nor text.

  Examples:
    >>> columns({"x": [1.0, 2.0]}, "client 'a'")["x"].shape
    (2,)
  """
  if not isinstance(arrays, Mapping) or not arrays:
    raise errors.DataError(
      f"{owner}: got {type(arrays).__name__} without fields, expected"
      " {name: array [examples, ...]}"
    )
  result = {}
  for name, value in arrays.items():
    if not isinstance(name, str) or not name:
      raise errors.DataError(
        f"{owner}: field name {name!r}, expected a non-empty string"
      )
    result[name] = _column(value, f"{owner}: field {name!r}")
  lengths = {name: len(x) for name, x in result.items()}
  if len(set(lengths.values())) > 1:
    raise errors.DataError(
      f"{owner}: fields differ in their number of examples: {lengths}"
    )
  if not next(iter(lengths.values())):
    raise errors.DataError(f"{owner}: got 0 examples, expected at least 1")
  return result


def _column(value: Any, where: str) -> np.ndarray:
  """Makes one read-only array [examples, ...] of finite numbers or of text."""
  try:
    x = np.asarray(value).view()
    if x.dtype.kind in "US":
      # Not by way of numpy's own strings, which drop NULs at the end.
      x = np.asarray(value, dtype=object).view()
  except ValueError:
    raise errors.DataError(
      f"{where}: examples differ in shape, expected one shape for all"
    ) from None
  if not x.ndim:
    raise errors.DataError(f"{where}: got a scalar, expected [examples, ...]")
  if x.dtype.kind == "O":
    if not all(isinstance(item, str | bytes) for item in x.flat):
      raise errors.DataError(
        f"{where}: got objects, expected numbers or strings"
      )
  elif x.dtype.kind not in "biu":
    try:
      finite = np.isfinite(x)  # Also knows ml_dtypes such as bfloat16.
    except TypeError:
      raise errors.DataError(
        f"{where}: got dtype {x.dtype}, expected numbers or strings"
      ) from None
    if not finite.all():
      row = int(np.argwhere(~finite)[0][0])
      raise errors.DataError(
        f"{where}: example {row} holds NaN or infinity, expected finite numbers"
      )
  x.flags.writeable = False
  return x


def from_arrays(data: Mapping[str, Mapping[str, Any]]) -> ClientSource:
  """Makes a source of clients that are held in memory.

  Args:
    data: {client_id: {field: array [examples, ...]}}; the clients agree in
      their fields, dtypes and shapes of one example. Whole numbers of 64 bits
      become 32, which is what models compute with.

  Returns:
    A `ClientSource` in the mapping's order; reads are views, not copies.

  Raises:
    DataError: As in `columns`, clients that disagree, or a whole number of
      more than 32 bits; names client and field.

  Examples:
    >>> source = from_arrays({"ann": {"x": np.zeros([3, 2])}})
    >>> source.ids, source.size("ann"), source.read("ann")["x"].shape
    (('ann',), 3, (3, 2))
  """
  if not isinstance(data, Mapping):
    raise errors.DataError(
      f"clients: got {type(data).__name__}, expected {{client_id: {{field: "
      "array}}"
    )
  clients: dict[str, Examples] = {}
  first_id, expected = None, {}
  for client_id, arrays in data.items():
    check_id(client_id)
    owner = f"client {client_id!r}"
    clients[client_id] = narrowed(columns(arrays, owner), owner)
    spec = {k: (x.dtype, x.shape[1:]) for k, x in clients[client_id].items()}
    if first_id is None:
      first_id, expected = client_id, spec
    _check_same_spec(client_id, spec, first_id, expected)
  return ClientSource(
    ids=tuple(clients),
    size_fn=lambda client_id: _num_examples(clients[client_id]),
    read_fn=lambda client_id: dict(clients[client_id]),
  )


def narrowed(examples: Examples, owner: str) -> Examples:
  """Makes whole numbers of 64 bits 32, as a device would, but checked.

  Args:
    examples: The fields of one client.
    owner: Whose fields these are, for the messages.

  Returns:
    The same; what is narrowed is a copy.

  Raises:
    DataError: A number that 32 bits do not hold.
  """
  return {
    name: _narrowed(x, f"{owner}: field {name!r}")
    for name, x in examples.items()
  }


def _narrowed(x: np.ndarray, where: str) -> np.ndarray:
  narrow = {"int64": np.int32, "uint64": np.uint32}.get(x.dtype.name)
  if narrow is None:
    return x
  low, high = np.iinfo(narrow).min, np.iinfo(narrow).max
  if x.min(initial=0) < low or x.max(initial=0) > high:
    raise errors.DataError(
      f"{where}: numbers lie in [{x.min()}, {x.max()}], expected what "
      f"{np.dtype(narrow)} holds, [{low}, {high}]"
    )
  x = x.astype(narrow)
  x.flags.writeable = False
  return x


def _check_same_spec(client_id, spec, first_id, expected) -> None:
  """Raises DataError unless two clients agree in fields, dtypes and shapes."""
  if spec.keys() != expected.keys():
    raise errors.DataError(
      f"client {client_id!r}: fields {sorted(spec)}, expected those of"
      f" client {first_id!r}: {sorted(expected)}"
    )
  for name, (dtype, shape) in spec.items():
    if (dtype, shape) != expected[name]:
      raise errors.DataError(
        f"client {client_id!r}: field {name!r} is {dtype} of shape"
        f" {list(shape)} per example, expected {expected[name][0]} of shape"
        f" {list(expected[name][1])} as client {first_id!r} has"
      )


def _num_examples(examples: Examples) -> int:
  return len(next(iter(examples.values())))


def subset(source: ClientSource, ids: Iterable[str]) -> ClientSource:
  """Returns the source with only the clients `ids`, in that order.

  Args:
    source: The larger population.
    ids: Which of its clients to keep.

  Returns:
    A `ClientSource` that reads from `source`.

  Raises:
    DataError: An id that `source` does not have, or a repeated one.

  Examples:
    >>> source = from_arrays({c: {"x": [1]} for c in "abc"})
    >>> subset(source, ["c", "a"]).ids
    ('c', 'a')
  """
  ids = tuple(ids)
  for client_id in ids:
    source.index(client_id)
  return ClientSource(ids, source.size_fn, source.read_fn)


def spread(source: ClientSource, num_examples: int) -> ClientSource:
  """Keeps at most `num_examples` of each client, evenly spaced over all.

  Args:
    source: The clients.
    num_examples: Examples that a client keeps at most.

  Returns:
    A `ClientSource` of the same clients, each from its first example to its
    last.

  Raises:
    ConfigError: `num_examples` below 1.

  Examples:
    >>> source = from_arrays({"a": {"x": np.arange(10)}, "b": {"x": [7]}})
    >>> few = spread(source, 4)
    >>> few.read("a")["x"].tolist(), few.read("b")["x"].tolist()
    ([0, 3, 6, 9], [7])
  """
  if num_examples < 1:
    raise errors.ConfigError(
      f"num_examples: got {num_examples}, expected at least 1"
    )

  def size(client_id: str) -> int:
    return min(num_examples, source.size(client_id))

  def read(client_id: str) -> Examples:
    rows = np.linspace(0, source.size(client_id) - 1, size(client_id))
    rows = np.round(rows).astype(np.int64)
    return {name: x[rows] for name, x in source.read(client_id).items()}

  return ClientSource(source.ids, size, read)


def union(sources: Mapping[str, ClientSource]) -> ClientSource:
  """Puts several populations side by side, as "<population>/<client id>".

  Args:
    sources: Population name -> its clients, all of the same fields.

  Returns:
    All clients, in the order of the populations.

  Raises:
    DataError: No population.

  Examples:
    >>> one = from_arrays({"a": {"x": [1.0]}})
    >>> union({"seen": one, "unseen": one}).ids
    ('seen/a', 'unseen/a')
  """
  owners = {
    f"{name}/{client_id}": (source, client_id)
    for name, source in sources.items()
    for client_id in source.ids
  }

  def size(key: str) -> int:
    source, client_id = owners[key]
    return source.size(client_id)

  def read(key: str) -> Examples:
    source, client_id = owners[key]
    return source.read(client_id)

  return ClientSource(tuple(owners), size, read)
