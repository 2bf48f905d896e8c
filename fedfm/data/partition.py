"""Splits one data set over clients; every example goes to exactly one."""

from collections.abc import Mapping, Sequence
import numbers
from typing import Any

import numpy as np

from fedfm import errors
from fedfm.data import layout, sampling, source


def iid(
  arrays: Mapping[str, Any],
  num_clients: int,
  seed: int = 0,
  sizes: Sequence[int] | None = None,
) -> source.ClientSource:
  """Deals the examples out at random, sizes differing by at most 1.

  Args:
    arrays: {field: array [examples, ...]}.
    num_clients: How many clients.
    seed: In [0, 2**32).
    sizes: Examples of each client, at least 1, all examples in sum; default as
      even as can be.

  Returns:
    A `ClientSource` with ids such as `client_00007`.

  Raises:
    ConfigError: More clients than examples, sizes that do not add up, or a bad
      seed.
    DataError: Malformed arrays.

  Examples:
    >>> iid({"x": np.arange(10)}, num_clients=4).ids[-1]
    'client_00003'
  """
  arrays, num_examples = _check(arrays, num_clients)
  order = sampling.generator("iid", seed).permutation(num_examples)
  if sizes is not None:
    fits = len(sizes) == num_clients and sum(sizes) == num_examples
    if not fits or min(sizes) < 1:
      raise errors.ConfigError(
        f"sizes: got {len(sizes)} sizes of {sum(sizes)} examples in sum, "
        f"expected {num_clients} of {num_examples}, each at least 1"
      )
    return _numbered(arrays, np.split(order, np.cumsum(sizes)[:-1]))
  return _numbered(arrays, np.array_split(order, num_clients))


def merged(
  clients: source.ClientSource, num_clients: int
) -> source.ClientSource:
  """Joins whole clients into fewer, of sizes as even as that allows.

  Replicas of a federated pre-training hold the data of many; they differ as
  their members do. Largest first, each to the smallest so far.

  Args:
    clients: The members, numeric.
    num_clients: How many to make.

  Returns:
    A `ClientSource` with ids such as `client_00007`.

  Raises:
    ConfigError: More clients than there are members.
  """
  _check_count("num_clients", num_clients)
  if num_clients > len(clients):
    raise errors.ConfigError(
      f"num_clients: got {num_clients}, but there are {len(clients)} to merge"
    )
  sizes = [clients.size(i) for i in clients.ids]
  members = layout.assign(sizes, num_clients)
  ids = [f"client_{i:05d}" for i in range(num_clients)]
  of = {i: [clients.ids[m] for m in own] for i, own in zip(ids, members)}

  def read(client_id: str) -> source.Examples:
    parts = [clients.read(m) for m in of[client_id]]
    return {k: np.concatenate([x[k] for x in parts]) for k in parts[0]}

  return source.ClientSource(
    ids, lambda i: sum(clients.size(m) for m in of[i]), read
  )


def dirichlet(
  arrays: Mapping[str, Any],
  num_clients: int,
  alpha: float,
  label_key: str = "label",
  seed: int = 0,
  min_examples: int = 1,
) -> source.ClientSource:
  """Skews the clients' labels as in Hsu et al. 2019 (arXiv 1909.06335).

  Each client draws its own mixture of labels q from Dirichlet(alpha * p), p
  the label shares of all the data, and takes its examples from that mixture
  without replacement, an example of label c that is left weighing q[c] / p[c].
  Clients have the same number of examples, up to 1. This is not the variant
  that splits each label by a Dirichlet over clients (Yurochkin et al. 2019),
  where sizes vary and alpha means something else.

  Args:
    arrays: {field: array [examples, ...]}.
    num_clients: How many clients.
    alpha: Concentration, above 0: near 0 a client has one label, at infinity
      the split is iid. A client's share of a label has variance
      p (1 - p) / (alpha + 1), to which drawing n examples adds
      p (1 - p) alpha / (alpha + 1) / n.
    label_key: The field of the labels, [examples].
    seed: In [0, 2**32).
    min_examples: The smallest client allowed.

  Returns:
    A `ClientSource` with ids such as `client_00007`.

  Raises:
    ConfigError: Alpha not above 0, fewer than `num_clients * min_examples`
      examples, no such label field, or a bad seed.
    DataError: Malformed arrays.
  """
  arrays, num_examples = _check(arrays, num_clients, min_examples)
  if (
    not isinstance(alpha, numbers.Real)
    or isinstance(alpha, bool)
    or not alpha > 0
  ):
    raise errors.ConfigError(f"alpha: got {alpha!r}, expected a number above 0")
  labels = _labels(arrays, label_key)
  rng = sampling.generator("dirichlet", seed)
  by_label = _shuffled_by_label(labels, rng)
  left = np.array([len(x) for x in by_label])
  shares = left / num_examples
  sizes = [len(x) for x in np.array_split(np.arange(num_examples), num_clients)]
  parts = [np.empty(0, np.int64)] * num_clients
  # In random order, so that the leftovers do not go to the highest numbers.
  for client in rng.permutation(num_clients):
    mixture = _draw_mixture(rng, alpha, shares)
    counts = _draw_counts(rng, mixture / shares, sizes[client], left)
    # Taking from the end of a shuffled list is drawing without replacement.
    taken = [
      examples[have - count : have]
      for examples, have, count in zip(by_label, left, counts, strict=True)
    ]
    left = left - counts
    parts[client] = rng.permutation(np.concatenate(taken))
  return _numbered(arrays, parts)


def _draw_mixture(rng, alpha: float, shares: np.ndarray) -> np.ndarray:
  """Draws label probabilities; robust where numpy's Dirichlet underflows."""
  if np.isinf(alpha):
    return shares
  # Gamma(a) = Gamma(a + 1) * U^(1/a), in logarithms: a tiny alpha would give
  # only zeros.
  concentration = np.maximum(alpha * shares, np.finfo(float).tiny)
  log_gamma = (
    np.log(rng.standard_gamma(concentration + 1))
    + np.log1p(-rng.random(len(shares))) / concentration
  )
  finite = np.maximum(log_gamma, -np.finfo(float).max)
  mixture = np.exp(finite - finite.max())
  return mixture / mixture.sum()


def _draw_counts(rng, weights, num_examples: int, left) -> np.ndarray:
  """Draws how many of each label a client takes, no more than are left.

  Weighing by what is left keeps the pool's label shares near those of all the
  data. Drawing from the mixture until a label runs out leaves the last clients
  with far more skew than alpha says (1.4 to 1.8 times the variance at large
  alpha, tried with 50 and 100 clients).
  """
  counts = np.zeros_like(left)
  while (missing := num_examples - counts.sum()) > 0:
    available = left - counts
    probabilities = weights * available
    if not probabilities.sum() > 0:
      probabilities = available.astype(float)
    drawn = rng.multinomial(missing, probabilities / probabilities.sum())
    counts += np.minimum(drawn, available)
  return counts


def shards(
  arrays: Mapping[str, Any],
  num_clients: int,
  shards_per_client: int = 2,
  label_key: str = "label",
  seed: int = 0,
) -> source.ClientSource:
  """Deals out shards of the data sorted by label (arXiv 1602.05629).

  McMahan et al. 2017: sort by label, cut into `num_clients *
  shards_per_client` shards of the same size (up to 1), give each client as
  many at random. A client has few labels: one a shard, or more where a shard
  spans the boundary between labels.

  Args:
    arrays: {field: array [examples, ...]}.
    num_clients: How many clients.
    shards_per_client: How many shards each gets.
    label_key: The field of the labels, [examples].
    seed: In [0, 2**32).

  Returns:
    A `ClientSource` with ids such as `client_00007`.

  Raises:
    ConfigError: More shards than examples, no such label field, or a bad seed.
    DataError: Malformed arrays.
  """
  _check_count("shards_per_client", shards_per_client)
  arrays, num_examples = _check(arrays, num_clients)
  num_shards = num_clients * shards_per_client
  if num_shards > num_examples:
    raise errors.ConfigError(
      f"num_clients: got {num_clients} with {shards_per_client} shards each,"
      f" so {num_shards} shards, but the data has only {num_examples}"
      " examples"
    )
  rng = sampling.generator("shards", seed)
  by_label = _shuffled_by_label(_labels(arrays, label_key), rng)
  pieces = np.array_split(np.concatenate(by_label), num_shards)
  dealt = rng.permutation(num_shards).reshape(num_clients, shards_per_client)
  parts = [
    rng.permutation(np.concatenate([pieces[i] for i in mine])) for mine in dealt
  ]
  return _numbered(arrays, parts)


def by_key(arrays: Mapping[str, Any], key: str) -> source.ClientSource:
  """Makes a client of each value of a field, the natural partition.

  Args:
    arrays: {field: array [examples, ...]}.
    key: The field that says whose an example is, [examples], integers or
      strings; it is left out of what is read.

  Returns:
    A `ClientSource` whose ids are the field's values, sorted; integers become
    ids such as `client_00007`.

  Raises:
    ConfigError: No such field, or a field of another kind.
    DataError: Malformed arrays, or no other field.

  Examples:
    >>> by_key({"x": [1, 2, 3], "user": ["b", "a", "b"]}, "user").ids
    ('a', 'b')
  """
  arrays, _ = _check(arrays, 1)
  owners = _labels(arrays, key, "key")
  if owners.dtype.kind == "O":
    owners = np.array([_as_id(x) for x in owners], object)
  elif owners.dtype.kind not in "iu":
    raise errors.ConfigError(
      f"key: field {key!r} is {owners.dtype}, expected integers or strings"
    )
  values, client = np.unique(owners, return_inverse=True)
  order = np.argsort(client, kind="stable")
  parts = np.split(order, np.cumsum(np.bincount(client))[:-1])
  features = {name: x for name, x in arrays.items() if name != key}
  if not features:
    raise errors.DataError(
      f"arrays: field {key!r} is the only one, expected examples beside it"
    )
  if owners.dtype.kind == "O":
    return _source(features, list(values), parts)
  width = max(5, *(len(str(v)) for v in values))
  return _source(features, [f"client_{v:0{width}d}" for v in values], parts)


def _as_id(owner: str | bytes) -> str:
  if isinstance(owner, str):
    return owner
  try:
    return owner.decode()
  except UnicodeDecodeError:
    raise errors.DataError(f"client id {owner!r} is not UTF-8") from None


def _check_count(name: str, value: int) -> None:
  if (
    not isinstance(value, numbers.Integral)
    or isinstance(value, bool)
    or value < 1
  ):
    raise errors.ConfigError(
      f"{name}: got {value!r}, expected an integer of at least 1"
    )


def _check(
  arrays: Mapping[str, Any], num_clients: int, min_examples: int = 1
) -> tuple[source.Examples, int]:
  """Returns checked arrays and their number of examples."""
  _check_count("num_clients", num_clients)
  _check_count("min_examples", min_examples)
  arrays = source.columns(arrays, "arrays")
  num_examples = len(next(iter(arrays.values())))
  if num_clients * min_examples > num_examples:
    raise errors.ConfigError(
      f"num_clients: got {num_clients} of at least {min_examples} examples,"
      f" but the data has only {num_examples}"
    )
  return arrays, num_examples


def _labels(
  arrays: source.Examples, key: str, argument: str = "label_key"
) -> np.ndarray:
  if key not in arrays:
    raise errors.ConfigError(
      f"{argument}: no field {key!r}{errors.nearest(str(key), arrays)}"
    )
  if arrays[key].ndim != 1:
    raise errors.ConfigError(
      f"{argument}: field {key!r} has shape {list(arrays[key].shape)},"
      " expected [examples]"
    )
  return arrays[key]


def _shuffled_by_label(labels: np.ndarray, rng) -> list[np.ndarray]:
  """Returns each label's example indices in random order, by label."""
  _, label = np.unique(labels, return_inverse=True)
  order = rng.permutation(len(labels))
  order = order[np.argsort(label[order], kind="stable")]
  return np.split(order, np.cumsum(np.bincount(label))[:-1])


def _numbered(
  arrays: source.Examples, parts: Sequence[np.ndarray]
) -> source.ClientSource:
  width = max(5, len(str(len(parts) - 1)))
  ids = [f"client_{i:0{width}d}" for i in range(len(parts))]
  return _source(arrays, ids, parts)


def _source(
  arrays: source.Examples, ids: Sequence[str], parts: Sequence[np.ndarray]
) -> source.ClientSource:
  arrays = source.narrowed(arrays, "arrays")
  examples = dict(zip(ids, parts, strict=True))
  return source.ClientSource(
    ids=ids,
    size_fn=lambda client_id: len(examples[client_id]),
    read_fn=lambda client_id: {
      name: x[examples[client_id]] for name, x in arrays.items()
    },
  )
