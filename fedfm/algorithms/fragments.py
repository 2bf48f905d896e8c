"""Fragments of a model: parts of its layers that are exchanged by turns.

A tensor under a path part `layers` is a stack of layers, of which a fragment
takes some rows; every other tensor belongs whole to one fragment, the largest
first to the fragment that is smallest so far. The fragment is a run-time
number: one program serves all of them, and what it exchanges is as large as the
largest fragment's share of each tensor.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedfm import errors, trees

PyTree = Any
PATTERNS = ("strided", "sequential")


@dataclasses.dataclass(frozen=True)
class Rows:
  """Which rows of a tensor belong to each fragment; a leaf of a tree.

  Attributes:
    table: [fragments, rows] int32; what a fragment lacks to the longest is
      filled up with a row that is not there.
    stacked: Whether rows are along the tensor's first axis; otherwise the whole
      tensor is one row.
  """

  table: np.ndarray
  stacked: bool

  def take(self, x: jax.Array, fragment: jax.Array) -> jax.Array:
    """Returns a fragment's rows [rows, ...], zeros where there are none."""
    x = x if self.stacked else x[None]
    rows = jnp.asarray(self.table)[fragment]
    return x.at[rows].get(mode="fill", fill_value=0)

  def put(
    self, x: jax.Array, part: jax.Array, fragment: jax.Array
  ) -> jax.Array:
    """Returns the tensor with a fragment's rows replaced."""
    rows = jnp.asarray(self.table)[fragment]
    new = (x if self.stacked else x[None]).at[rows].set(part, mode="drop")
    return new if self.stacked else new[0]

  def select(
    self, flags: jax.Array, on_true: jax.Array, on_false: jax.Array
  ) -> jax.Array:
    """Selects by a flag per fragment, [fragments]."""
    num_rows = on_true.shape[0] if self.stacked else 1
    fragments, _ = np.nonzero(self.table < num_rows)
    owner = np.zeros(num_rows, np.int32)
    owner[self.table[self.table < num_rows]] = fragments
    of_row = flags[owner]
    if not self.stacked:
      return jnp.where(of_row[0], on_true, on_false)
    shape = (num_rows,) + (1,) * (on_true.ndim - 1)
    return jnp.where(of_row.reshape(shape), on_true, on_false)

  def shape(self, x: Any, fragment: int) -> jax.ShapeDtypeStruct:
    """Shape of a fragment's rows, without those that are not there."""
    num_rows, rest = (x.shape[0], x.shape[1:]) if self.stacked else (1, x.shape)
    count = int(np.sum(self.table[fragment] < num_rows))
    return jax.ShapeDtypeStruct((count, *rest), x.dtype)


@dataclasses.dataclass(frozen=True)
class Own:
  """A number of which each fragment has its own; a leaf like `Rows`."""

  def take(self, x: jax.Array, fragment: jax.Array) -> jax.Array:
    """Returns the fragment's number."""
    return x[fragment]

  def put(
    self, x: jax.Array, part: jax.Array, fragment: jax.Array
  ) -> jax.Array:
    """Returns the numbers with one replaced."""
    return x.at[fragment].set(part)


def layer_fragments(
  num_layers: int, num_fragments: int, pattern: str
) -> tuple[int, ...]:
  """Says which fragment each layer is in.

  Args:
    num_layers: Layers.
    num_fragments: Fragments.
    pattern: "strided" (every so many layers) or "sequential" (neighbours).

  Returns:
    A fragment per layer.

  Examples:
    >>> layer_fragments(6, 3, "strided"), layer_fragments(6, 3, "sequential")
    ((0, 1, 2, 0, 1, 2), (0, 0, 1, 1, 2, 2))
  """
  layers = range(num_layers)
  if pattern == "strided":
    return tuple(layer % num_fragments for layer in layers)
  return tuple(layer * num_fragments // num_layers for layer in layers)


def split(
  trainable: PyTree,
  num_fragments: int,
  pattern: str = "strided",
  of_layer: Sequence[int] = (),
) -> PyTree:
  """Splits a trainable into fragments.

  Args:
    trainable: Arrays or shapes.
    num_fragments: How many fragments.
    pattern: As in `layer_fragments`.
    of_layer: The fragment of each layer, in place of a pattern.

  Returns:
    A tree like `trainable` of `Rows`.

  Raises:
    ConfigError: Layers that the fragments do not cover, or a fragment with
      nothing in it.
  """
  leaves, treedef = jax.tree.flatten(trainable)
  stacked = ["layers" in path.split("/") for path in trees.paths(trainable)]
  lengths = {x.shape[0] for x, s in zip(leaves, stacked) if s}
  if len(lengths) > 1:
    raise errors.ConfigError(
      f"layers: got stacks of {sorted(lengths)} layers, expected one length"
    )
  num_layers = lengths.pop() if lengths else 0
  of_layer = tuple(of_layer) or layer_fragments(
    num_layers, num_fragments, pattern
  )
  if len(of_layer) != num_layers:
    raise errors.ConfigError(
      f"layer_fragments: got {len(of_layer)} numbers, expected one for each of "
      f"the {num_layers} layers"
    )
  if num_layers and set(of_layer) != set(range(num_fragments)):
    raise errors.ConfigError(
      f"num_fragments: got {num_fragments} for {num_layers} layers, in the "
      f"fragments {of_layer}: expected a layer in each of 0 to "
      f"{num_fragments - 1}"
    )
  rows_of = [
    [layer for layer, f in enumerate(of_layer) if f == fragment]
    for fragment in range(num_fragments)
  ]
  loads = [
    len(rows)
    * sum(math.prod(x.shape[1:]) for x, s in zip(leaves, stacked) if s)
    for rows in rows_of
  ]
  tables = [_table(rows_of, num_layers)] * len(leaves)
  for index in sorted(range(len(leaves)), key=lambda i: -leaves[i].size):
    if not stacked[index]:
      owner = int(np.argmin(loads))
      loads[owner] += leaves[index].size
      own = [[0] if f == owner else [] for f in range(num_fragments)]
      tables[index] = _table(own, 1)
  if not all(loads):
    raise errors.ConfigError(
      f"num_fragments: got {num_fragments} for a trainable without layers, of "
      f"{len(leaves)} tensors: expected at most as many"
    )
  return treedef.unflatten(
    [Rows(table, s) for table, s in zip(tables, stacked)]
  )


def _table(rows_of: list[list[int]], num_rows: int) -> np.ndarray:
  longest = max(1, *map(len, rows_of))
  table = np.full((len(rows_of), longest), num_rows, np.int32)
  for fragment, rows in enumerate(rows_of):
    table[fragment, : len(rows)] = rows
  return table


def take(rows: PyTree, tree: PyTree, fragment: jax.Array) -> PyTree:
  """Returns a fragment of a tree, each tensor [rows, ...]."""
  return jax.tree.map(lambda r, x: r.take(x, fragment), rows, tree)


def put(rows: PyTree, tree: PyTree, part: PyTree, fragment: jax.Array):
  """Returns a tree with one fragment replaced."""
  return jax.tree.map(lambda r, x, y: r.put(x, y, fragment), rows, tree, part)


def optimizer_rows(
  optimizer: optax.GradientTransformation, rows: PyTree, trainable: PyTree
) -> tuple[PyTree, PyTree]:
  """An optimizer's state for every fragment, in one tree.

  What is shaped like the trainable is split as it is; of everything else, such
  as counts, each fragment has its own.

  Args:
    optimizer: The optimizer.
    rows: From `split`.
    trainable: What it optimizes.

  Returns:
    The state, and its `Rows`.
  """
  num_fragments = len(jax.tree.leaves(rows)[0].table)
  state = optimizer.init(trainable)
  state_rows = optax.tree_map_params(
    optimizer.init,
    lambda _, r: r,
    state,
    rows,
    transform_non_params=lambda _: Own(),
  )
  state = jax.tree.map(
    lambda r, x: jnp.stack([x] * num_fragments) if isinstance(r, Own) else x,
    state_rows,
    state,
  )
  return state, state_rows
