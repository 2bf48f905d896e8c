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

  Of several TPU slices, each holds a part of `clients` and whole the others:
  only what crosses clients crosses the slow network between slices.

  Args:
    axis_sizes: Size of each axis; a missing axis is 1 and one of them may be -1
      (takes the devices that the others leave). Default: all on `clients`.
    devices: The devices to use, default all of `jax.devices()`.

  Returns:
    A `jax.sharding.Mesh` with Auto axes.

  Raises:
    ConfigError: Unknown axis, size 0 or below -1, a product that does not
      divide or equal the number of devices, `clients` that the slices do not
      divide, or sizes that do not lie on the chips' torus.

  Examples:
    >>> make_mesh({"clients": 1}, jax.devices()[:1]).axis_names
    ('clients', 'fsdp', 'tensor')
  """
  axis_sizes = {"clients": -1} if axis_sizes is None else dict(axis_sizes)
  devices = list(jax.devices() if devices is None else devices)
  sizes = mesh_shape(axis_sizes, len(devices))
  by_slice: dict[int, list[jax.Device]] = {}
  for device in devices:
    on_tpu = device.platform == "tpu"
    index = getattr(device, "slice_index", None) if on_tpu else None
    by_slice.setdefault(index or 0, []).append(device)
  clients, *inside = sizes
  if clients % len(by_slice):
    raise errors.ConfigError(
      f"mesh.clients: {len(by_slice)} slices do not divide {clients}; the "
      "other axes stay within a slice"
    )
  auto = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
  shape = (clients // len(by_slice), *inside)
  try:
    meshes = [
      jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=by_slice[index])
      for index in sorted(by_slice)
    ]
  except NotImplementedError:
    named = " x ".join(f"{n}={s}" for n, s in zip(MESH_AXES, shape))
    raise errors.ConfigError(
      f"mesh: {named} does not lie on this torus of chips, expected sizes that "
      "are products of some of its own"
    ) from None
  grid = np.concatenate([mesh.devices for mesh in meshes])
  return Mesh(grid, MESH_AXES, axis_types=auto)


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


MeshAxis = str | tuple[str, ...] | None


class ShardingRules(dict[str, MeshAxis]):
  """Logical axis -> mesh axis, or None for replicated.

  A tuple splits a dimension over several mesh axes, the first outermost; those
  that do not divide it are left out.

  Examples:
    >>> rules = ShardingRules(embed="fsdp", mlp="tensor")
    >>> rules.spec(("embed", "mlp")) == jax.P("fsdp", "tensor")
    True
  """

  def spec(
    self,
    axes: LogicalAxes,
    shape: tuple[int, ...] | None = None,
    sizes: Mapping[str, int] | None = None,
  ) -> jax.P:
    """Maps logical axes, one per dimension, to a PartitionSpec.

    Args:
      axes: A logical name (or None) per dimension.
      shape: The dimensions, to leave out what does not divide them; only rules
        that are tuples read it.
      sizes: Size of each mesh axis; goes with `shape`.

    Returns:
      The `PartitionSpec` of the same length.

    Raises:
      ConfigError: Unknown logical axis, or two that fall on one mesh axis.
    """
    mapped: list[MeshAxis] = []
    for i, axis in enumerate(axes):
      if axis is not None and axis not in self:
        raise errors.ConfigError(
          f"sharding: unknown logical axis {axis!r}{errors.nearest(axis, self)}"
        )
      mesh_axis = None if axis is None else self[axis]
      if isinstance(mesh_axis, tuple) and shape is not None:
        mesh_axis = _dividing(mesh_axis, shape[i], sizes or {})
      mapped.append(mesh_axis)
    used = [name for m in mapped for name in _names(m)]
    if len(used) != len(set(used)):
      raise errors.ConfigError(
        f"sharding: axes {axes} collide on one mesh axis: {mapped}"
      )
    return jax.P(*mapped)


def _names(mesh_axis: MeshAxis) -> tuple[str, ...]:
  """The mesh axes of one dimension."""
  if mesh_axis is None:
    return ()
  return (mesh_axis,) if isinstance(mesh_axis, str) else mesh_axis


def _dividing(
  mesh_axes: tuple[str, ...], dim: int, sizes: Mapping[str, int]
) -> MeshAxis:
  """The axes of a tuple whose product still divides the dimension."""
  kept, product = [], 1
  for name in mesh_axes:
    if dim % (product * sizes[name]) == 0:
      kept, product = [*kept, name], product * sizes[name]
  return tuple(kept) or None


# Parameters and activations. A table is stored with its width over `fsdp` and
# gathered before it is read (`gathered`): width and batch both over `fsdp`
# would all-gather it over `clients`. `factor` is the side of a low-rank factor
# that its kernel has over `tensor`.
DEFAULT_RULES = ShardingRules(
  layers=None,
  vocab="tensor",
  table_width="fsdp",
  embed="fsdp",
  heads="tensor",
  kv_heads="tensor",
  mlp="tensor",
  norm=None,
  rank=None,
  factor=("tensor", "fsdp"),
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
    own = rules.spec(leaf_axes, leaf.shape[len(prefix) :], mesh.shape)
    spec = jax.P(*prefix, *own)
    for dim, mesh_axis in zip(leaf.shape, spec):
      size = math.prod(mesh.shape[name] for name in _names(mesh_axis))
      if dim % size:
        raise errors.ConfigError(
          f"mesh.{mesh_axis}: {size} does not divide "
          f"dimension {dim} of {jax.tree_util.keystr(path)} {leaf.shape}"
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=is_axes)


def shardings_like(
  mesh: Mesh, tree: PyTree, reference: PyTree, reference_shardings: PyTree
) -> PyTree:
  """Shards a tree that holds copies of another: optimizer moments, a trainable.

  A leaf whose path ends with that of a reference leaf of the same shape is
  sharded like it, and so is one that has a dimension more in front, such as a
  history; every other leaf is replicated.

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
      if found is not None and shape == leaf.shape:
        return found
      if found is not None and shape == leaf.shape[1:]:
        return NamedSharding(mesh, jax.P(None, *found.spec))
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
  # Within a shard_map a device sees its own part, with nothing left to split.
  auto = jax.sharding.AxisType.Auto in mesh.axis_types
  if mesh.empty or mesh.size == 1 or not auto:
    return x
  spec = rules.spec(axes, x.shape, mesh.shape)
  return jax.lax.with_sharding_constraint(x, spec)


def replicated(tree: PyTree) -> PyTree:
  """Constrains small results to be whole on every device, to be fetched.

  Args:
    tree: Arrays.

  Returns:
    A tree like `tree`; the same where no mesh is set.
  """
  return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


def constrain_tree(
  tree: PyTree, axes: PyTree, rules: ShardingRules = DEFAULT_RULES
) -> PyTree:
  """Constrains parameters, and by it their gradients, to where they are stored.

  Args:
    tree: Arrays.
    axes: Tree of logical axes; leaves are matched by path, and those without
      axes, or with axes that the rules do not know, are left as they come.
    rules: Logical to mesh axes.

  Returns:
    A tree like `tree`; the same where no mesh is set.
  """
  known = _axes_by_path(axes)
  leaves, treedef = jax.tree.flatten(tree)
  constrained = []
  for path, x in zip(trees.paths(tree), leaves):
    leaf_axes = known.get(path)
    if leaf_axes is not None and all(a in rules for a in leaf_axes if a):
      x = constrain(x, *leaf_axes, rules=rules)
    constrained.append(x)
  return treedef.unflatten(constrained)


def gathered(
  tree: PyTree, axes: PyTree, rules: ShardingRules = DEFAULT_RULES
) -> PyTree:
  """Constrains parameters to be whole over `fsdp`, to be read many times.

  Args:
    tree: Arrays; what is not read afterwards costs nothing.
    axes: As in `constrain_tree`.
    rules: Where they are stored.

  Returns:
    A tree like `tree`, split over `tensor` only.
  """
  kept = ShardingRules(
    {k: "tensor" if "tensor" in _names(v) else None for k, v in rules.items()}
  )
  return constrain_tree(tree, axes, kept)


def _axes_by_path(axes: PyTree) -> dict[str, LogicalAxes]:
  flat, _ = jax.tree_util.tree_flatten_with_path(axes, is_leaf=is_axes)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in flat
  }
