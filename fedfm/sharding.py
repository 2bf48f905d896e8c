"""The mesh, and the one table from logical axes to mesh axes.

Model code names *logical* axes ("embed", "heads", ...) once per parameter; a
`ShardingRules` maps them to the mesh axes `clients`, `fsdp`, `tensor`.
"""

from collections.abc import Mapping
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np

from fedfm import errors, trees

MESH_AXES = ("clients", "fsdp", "tensor")
PyTree = Any
LogicalAxes = tuple[str | None, ...]


def make_mesh(
  axis_sizes: Mapping[str, int] | None = None, devices=None
) -> Mesh:
  """Makes the mesh `(clients, fsdp, tensor)`, clients outermost.

  Args:
    axis_sizes: Size of each axis; a missing axis is 1 and one of them may be -1
      (takes the devices that the others leave). Default: all on `clients`.
    devices: The devices to use, default all of `jax.devices()`.

  Returns:
    A `jax.sharding.Mesh` with Auto axes.

  Raises:
    ConfigError: Unknown axis, size 0 or below -1, or a product that does not
      divide or equal the number of devices.

  Examples:
    >>> make_mesh({"clients": 1}, jax.devices()[:1]).axis_names
    ('clients', 'fsdp', 'tensor')
  """
  axis_sizes = {"clients": -1} if axis_sizes is None else dict(axis_sizes)
  num_devices = len(jax.devices() if devices is None else devices)
  sizes = mesh_shape(axis_sizes, num_devices)
  return jax.make_mesh(
    sizes,
    MESH_AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES),
    devices=devices,
  )


def mesh_shape(
  axis_sizes: Mapping[str, int], num_devices: int
) -> tuple[int, int, int]:
  """Resolves -1 and checks sizes against the number of devices.

  Args:
    axis_sizes: As in `make_mesh`.
    num_devices: How many devices the mesh must cover.

  Returns:
    `(clients, fsdp, tensor)`.

  Raises:
    ConfigError: As in `make_mesh`.

  Examples:
    >>> mesh_shape({"clients": -1, "fsdp": 2}, 8)
    (4, 2, 1)
  """
  for name, size in axis_sizes.items():
    if name not in MESH_AXES:
      raise errors.ConfigError(
        f"mesh.{name}: unknown axis{errors.nearest(name, MESH_AXES)}"
      )
    if isinstance(size, bool) or not isinstance(size, int | np.integer):
      raise errors.ConfigError(
        f"mesh.{name}: got {size!r}, expected an integer"
      )
    if size == 0 or size < -1:
      raise errors.ConfigError(
        f"mesh.{name}: got {size}, expected a positive size or -1 (the rest)"
      )
  sizes = [int(axis_sizes.get(name, 1)) for name in MESH_AXES]
  if sizes.count(-1) > 1:
    raise errors.ConfigError("mesh: only one axis may be -1 (the rest)")
  fixed = math.prod(s for s in sizes if s != -1)
  if -1 in sizes:
    if num_devices % fixed:
      raise errors.ConfigError(
        f"mesh: {num_devices} devices do not divide by the fixed axes' "
        f"product {fixed}"
      )
    sizes[sizes.index(-1)] = num_devices // fixed
  elif fixed != num_devices:
    shape = " x ".join(f"{n}={s}" for n, s in zip(MESH_AXES, sizes))
    raise errors.ConfigError(
      f"mesh: {shape} needs {fixed} devices, but there are {num_devices}"
    )
  return sizes[0], sizes[1], sizes[2]


class ShardingRules(dict[str, str | None]):
  """Logical axis -> mesh axis, or None for replicated.

  Examples:
    >>> rules = ShardingRules(embed="fsdp", mlp="tensor")
    >>> rules.spec(("embed", "mlp")) == jax.P("fsdp", "tensor")
    True
  """

  def spec(self, axes: LogicalAxes) -> jax.P:
    """Maps logical axes, one per dimension, to a PartitionSpec.

    Args:
      axes: A logical name (or None) per dimension.

    Returns:
      The `PartitionSpec` of the same length.

    Raises:
      ConfigError: Unknown logical axis, or two that fall on one mesh axis.
    """
    mapped = []
    for axis in axes:
      if axis is not None and axis not in self:
        raise errors.ConfigError(
          f"sharding: unknown logical axis {axis!r}{errors.nearest(axis, self)}"
        )
      mapped.append(None if axis is None else self[axis])
    used = [m for m in mapped if m is not None]
    if len(used) != len(set(used)):
      raise errors.ConfigError(
        f"sharding: axes {axes} collide on one mesh axis: {mapped}"
      )
    return jax.P(*mapped)


# Parameters and activations. The embedding table keeps its width whole: width
# and batch both over fsdp would all-gather the table over `clients`.
DEFAULT_RULES = ShardingRules(
  layers=None,
  vocab="tensor",
  table_width=None,
  embed="fsdp",
  heads="tensor",
  kv_heads="tensor",
  mlp="tensor",
  norm=None,
  rank=None,
  batch="fsdp",
  sequence=None,
  width=None,
)


def is_axes(x: Any) -> bool:
  """Whether `x` is a tuple of logical axes (a leaf of an axes tree)."""
  return isinstance(x, tuple) and all(
    a is None or isinstance(a, str) for a in x
  )


def shardings(
  mesh: Mesh,
  axes: PyTree,
  shapes: PyTree,
  rules: ShardingRules = DEFAULT_RULES,
  prefix: tuple[str | None, ...] = (),
) -> PyTree:
  """Builds a `NamedSharding` per leaf and checks divisibility.

  Args:
    mesh: The mesh.
    axes: Tree of logical-axes tuples.
    shapes: Tree of the same structure whose leaves have `.shape`.
    rules: Logical to mesh axes.
    prefix: Mesh axes of leading dimensions that `axes` does not name, such as
      `("clients",)` for per-lane copies.

  Returns:
    A tree of `NamedSharding`.

  Raises:
    ConfigError: A dimension that its mesh axis does not divide.
  """

  def one(path, leaf_axes, leaf):
    spec = jax.P(*prefix, *rules.spec(leaf_axes))
    for dim, mesh_axis in zip(leaf.shape, spec):
      if mesh_axis is not None and dim % mesh.shape[mesh_axis]:
        raise errors.ConfigError(
          f"mesh.{mesh_axis}: {mesh.shape[mesh_axis]} does not divide "
          f"dimension {dim} of {jax.tree_util.keystr(path)} {leaf.shape}"
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=is_axes)


def shardings_like(
  mesh: Mesh, tree: PyTree, reference: PyTree, reference_shardings: PyTree
) -> PyTree:
  """Shards a tree that holds copies of another: optimizer moments, a trainable.

  A leaf whose path ends with that of a reference leaf of the same shape is
  sharded like it; every other leaf is replicated.

  Args:
    mesh: The mesh.
    tree: Arrays or shapes to find shardings for.
    reference: Arrays or shapes, such as a model's parameters.
    reference_shardings: A `NamedSharding` per leaf of `reference`.

  Returns:
    A tree like `tree` of `NamedSharding`.
  """
  known = {
    path: (leaf.shape, leaf_sharding)
    for path, leaf, leaf_sharding in zip(
      trees.paths(reference),
      jax.tree.leaves(reference),
      jax.tree.leaves(reference_shardings),
    )
  }

  def one(path, leaf):
    parts = path.split("/")
    for i in range(len(parts)):
      shape, found = known.get("/".join(parts[i:]), (None, None))
      if shape == leaf.shape:
        return found
    return NamedSharding(mesh, jax.P())

  leaves, treedef = jax.tree.flatten(tree)
  return treedef.unflatten(map(one, trees.paths(tree), leaves))


def constrain(
  x: jax.Array, *axes: str | None, rules: ShardingRules = DEFAULT_RULES
) -> jax.Array:
  """Constrains an activation's sharding under the mesh that is set.

  Args:
    x: The activation.
    *axes: A logical axis (or None) per dimension of `x`.
    rules: Logical to mesh axes.

  Returns:
    `x`, constrained; unchanged when no mesh is set (`jax.set_mesh`).
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, rules.spec(axes))
