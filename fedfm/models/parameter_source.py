"""Builds parameters out of the tensors of files, slice by slice.

Each process reads what its own devices hold, straight into the sharded arrays.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import functools
import logging
import math
import os
import re
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fedfm import errors, trees
from fedfm.models.families.family import Family

PyTree = Any
_logger = logging.getLogger(__name__)
# A larger stack of layers is built on the device, a layer at a time, so that
# the host never holds it.
_LARGE = 1 << 28  # Bytes.


class Tensor(Protocol):
  """A tensor in a file, such as `tensor_files.TensorEntry`."""

  @property
  def path(self) -> os.PathLike:
    """The file."""
    ...

  @property
  def name(self) -> str:
    """Its name there."""
    ...

  @property
  def shape(self) -> tuple[int, ...]:
    """Its shape there."""
    ...

  @property
  def dtype(self) -> str:
    """Name of its dtype, a float."""
    ...

  def read(self, index: tuple[slice, ...]) -> np.ndarray:
    """Copies one slice, with bounds in every dimension, out of the file."""
    ...


class ParameterSource(NamedTuple):
  """One of our parameters and the tensors it is read from.

  Attributes:
    tensors: One per layer, or just one.
    shape: Our shape, stacked over layers where `stacked`.
    dtype: Dtype to build it in.
    stacked: Whether it has a leading axis of layers.
    transpose: Whether the tensors are transposed.
    start: Where it begins in our last dimension of the tensors, which may hold
      other parameters too.
  """

  tensors: Sequence[Tensor]
  shape: tuple[int, ...]
  dtype: str
  stacked: bool
  transpose: bool
  start: int

  def read(self, index: tuple[slice, ...]) -> np.ndarray:
    """Reads our slice `index` from the files, refusing NaN and infinity.

    Args:
      index: A slice with bounds for each of our dimensions.

    Returns:
      The slice, in our layout and dtype.

    Raises:
      CheckpointError: It holds NaN or infinity.
    """
    own = list(index[1:] if self.stacked else index)
    if own:  # A scalar has no dimension that others could be beside it in.
      own[-1] = slice(own[-1].start + self.start, own[-1].stop + self.start)
    if self.transpose:
      own.reverse()
    tensors = self.tensors[index[0]] if self.stacked else self.tensors
    parts = []
    for tensor in tensors:
      part = tensor.read(tuple(own))
      with np.errstate(over="ignore"):  # Overflow is refused just below.
        part = (part.T if self.transpose else part).astype(self.dtype)
      if not np.isfinite(part).all():
        raise errors.CheckpointError(
          f"{tensor.path}: tensor {tensor.name} holds NaN or infinity as "
          f"{self.dtype}"
        )
      parts.append(part)
    return np.stack(parts) if self.stacked else np.asarray(parts[0])


def match(
  where: str | os.PathLike,
  family: Family,
  shapes: PyTree,
  tensors: Mapping[str, Tensor],
  new: Collection[str] = (),
) -> list[ParameterSource | None]:
  """Pairs our parameters with the tensors of files, each exactly once.

  Args:
    where: The files' folder, for messages.
    family: The table of names.
    shapes: Tree of our parameters' shapes.
    tensors: All tensors of the files, by name.
    new: Paths of parameters that the files need not have.

  Returns:
    A source per leaf of `shapes`, in leaf order; None for one of `new` that is
    not there.

  Raises:
    CheckpointError: A tensor is missing, left over, or of another shape.
  """
  wanted = dict(zip(trees.paths(shapes), jax.tree.leaves(shapes)))
  rows = [row for row in family.tensors if row.path in wanted]
  tensors = _as_now(family, tensors)
  bare = not any(name.startswith(family.prefix) for name in tensors)
  prefix = family.prefix if bare else ""
  used: set[str] = set()
  sources: dict[str, ParameterSource | None] = {}
  for row in rows:
    if row.path in new:
      there = tensors.get(row.name.removeprefix(prefix))
      shape = wanted[row.path].shape
      if there is None or there.shape != shape[:: -1 if row.transpose else 1]:
        sources[row.path] = None
        continue
    shape = wanted[row.path].shape
    stacked = "{i}" in row.name
    own = shape[1:] if stacked else shape
    before, whole = [], own
    if own:
      parts = [
        (r.path, wanted[r.path].shape[-1]) for r in rows if r.name == row.name
      ]
      at = parts.index((row.path, own[-1]))
      before = [size for _, size in parts[:at]]
      whole = (*own[:-1], sum(size for _, size in parts))
    whole = whole[::-1] if row.transpose else whole
    found = []
    for i in range(shape[0]) if stacked else (None,):
      name = row.name.format(i=i).removeprefix(prefix)
      found.append(_checked(where, tensors, name, whole))
      used.add(name)
    dtype = functools.reduce(
      lambda a, b: jnp.promote_types(a, b).name, (t.dtype for t in found)
    )
    sources[row.path] = ParameterSource(
      found, shape, dtype, stacked, row.transpose, sum(before)
    )
  missing = sorted(wanted.keys() - sources.keys())
  if missing:
    raise errors.CheckpointError(
      f"{where}: files of {family.architecture} have no {missing[0]}"
    )
  _refuse_extra(family, wanted, tensors, used)
  return [sources[path] for path in wanted]


def _as_now(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
  """Names tensors as the family's table does.

  A model without its head is read from files of one with a head too.
  """
  result = {}
  for name, tensor in tensors.items():
    new = name.removeprefix(family.prefix) if family.is_bare else name
    for old, now in family.renamed.items():
      if new.endswith(old):
        new = new.removesuffix(old) + now
    # What is there twice stays, and is refused.
    result[name if new in tensors else new] = tensor
  return result


def _checked(where, tensors, name: str, expected: tuple[int, ...]) -> Tensor:
  """Finds one tensor and checks its shape."""
  if name not in tensors:
    raise errors.CheckpointError(f"{where}: tensor {name} is missing")
  tensor = tensors[name]
  if tensor.shape != expected:
    hint = " (transposed?)" if tensor.shape == expected[::-1] else ""
    raise errors.CheckpointError(
      f"{tensor.path}: tensor {name} has shape {list(tensor.shape)}, expected "
      f"{list(expected)}{hint}"
    )
  return tensor


def _refuse_extra(family, wanted, tensors, used: set[str]) -> None:
  """Refuses tensors that no parameter is read from."""
  extra = [
    name
    for name in sorted(tensors.keys() - used)
    if not re.fullmatch(family.ignored, name.removeprefix(family.prefix))
  ]
  heads = [
    name
    for name in extra
    if family.is_bare and re.fullmatch(family.heads, tensors[name].name)
  ]
  if heads:
    _logger.warning(
      "%s: %s is of a head, which %s lacks: left out (%d such)",
      tensors[heads[0]].path,
      heads[0],
      family.architecture,
      len(heads),
    )
    extra = [name for name in extra if name not in heads]
  names = {row.path: row.name for row in family.tensors}
  head = names.get("lm_head")
  if "lm_head" not in wanted and head in extra:
    # Some files of tied models spell the head out; it must be the table.
    table = tensors.get(names["embed"])
    table = table or tensors[names["embed"].removeprefix(family.prefix)]
    if tensors[head].shape == table.shape and _equal(tensors[head], table):
      extra.remove(head)
  if extra:
    first = tensors[extra[0]]
    raise errors.CheckpointError(
      f"{first.path}: tensor {extra[0]} {first.shape} is not part of the model "
      f"({len(extra)} such)"
    )


def _equal(a: Tensor, b: Tensor, rows: int = 4096) -> bool:
  """Compares two matrices, some rows at a time."""
  for i in range(0, a.shape[0], rows):
    part = (slice(i, min(i + rows, a.shape[0])), slice(0, a.shape[1]))
    if not np.array_equal(a.read(part), b.read(part)):
      return False
  return True


def build(
  source: ParameterSource, place: jax.NamedSharding | None = None
) -> jax.Array:
  """Builds one parameter; what several devices share is read once.

  Args:
    source: Where it is read from.
    place: Where it goes; default the default device.

  Returns:
    The array.
  """
  shape = source.shape
  local = shape if place is None else place.shard_shape(shape)
  size = math.prod(local) * jnp.dtype(source.dtype).itemsize
  if source.stacked and size > _LARGE and local[0] == shape[0]:
    return _build_by_layer(source, place)
  return _from_slices(shape, place, source.read)


def _from_slices(
  shape: tuple[int, ...],
  place: Any,
  read_fn: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
  """Builds an array out of the slices that devices need."""
  if place is None:
    return jnp.asarray(read_fn(tuple(slice(0, n) for n in shape)))
  done: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

  def read(index):
    bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape))
    if bounds not in done:
      done[bounds] = read_fn(tuple(slice(*pair) for pair in bounds))
    return done[bounds]

  return jax.make_array_from_callback(shape, place, read)


def _build_by_layer(source: ParameterSource, place: Any) -> jax.Array:
  """Fills a stack on the devices, with one layer on the host at a time."""
  shape, layer_place = source.shape, None
  if place is not None:
    layer_place = jax.NamedSharding(place.mesh, jax.P(*place.spec[1:]))
  stack = jax.jit(lambda: jnp.zeros(shape, source.dtype), out_shardings=place)()
  update = jax.jit(
    lambda stack, layer, i: jax.lax.dynamic_update_index_in_dim(
      stack, layer, i, 0
    ),
    donate_argnums=0,
    out_shardings=place,
  )
  for i in range(shape[0]):
    layer = _from_slices(
      shape[1:],
      layer_place,
      lambda index, i=i: source.read((slice(i, i + 1), *index))[0],
    )
    stack = jax.block_until_ready(update(stack, layer, np.int32(i)))
  return stack
