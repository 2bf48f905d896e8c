"""Makes a `Model` of a user's own flax.linen module."""

from typing import Any

from flax import linen as nn
import jax

from fedfm import errors
from fedfm.models.model import Model

PyTree = Any


def from_linen(module: nn.Module, example_input: Any) -> Model:
  """Wraps a linen module; its parameters become a plain dict.

  Names given with `nn.with_partitioning` or `nn.with_logical_partitioning`
  become logical axes; parameters without them are replicated.

  Args:
    module: The module; all its state must be in the collection "params".
    example_input: What `module(...)` takes, or a tuple of several; only shapes
      and dtypes matter.

  Returns:
    A `Model`: `init(key)`, and `apply(params, *args, **kwargs)`, which is
    `module.apply` (so `rngs=` and `method=` go).

  Raises:
    ConfigError: The module has other collections, or one parameter's dimension
      has several partition names.

  Examples:
    >>> model = from_linen(nn.Dense(3), jax.numpy.zeros((1, 2)))
    >>> model.axes
    {'bias': (None,), 'kernel': (None, None)}
  """
  inputs = (
    example_input if isinstance(example_input, tuple) else (example_input,)
  )
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
    boxed = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  others = sorted(set(boxed) - {"params"})
  if others:
    raise errors.ConfigError(
      f"model: {type(module).__name__} keeps state in {', '.join(others)}; "
      "only the collection params is supported"
    )
  boxed = boxed.get("params", {})

  def axes_of(path, leaf) -> tuple[str | None, ...]:
    if not isinstance(leaf, nn.Partitioned):
      return (None,) * leaf.ndim
    for name in leaf.names:
      if not (name is None or isinstance(name, str)):
        raise errors.ConfigError(
          f"model: parameter {jax.tree_util.keystr(path)} is partitioned over"
          f" {name}, expected one name a dimension"
        )
    return tuple(leaf.names)

  def init(key: jax.Array) -> PyTree:
    # Without a mesh: flax would read the names as mesh axes.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
      return _unbox(module.init(key, *inputs).get("params", {}))

  def apply(params: PyTree, *args: Any, **kwargs: Any) -> Any:
    return module.apply({"params": params}, *args, **kwargs)

  return Model(
    init=init,
    apply=apply,
    axes=jax.tree_util.tree_map_with_path(axes_of, boxed, is_leaf=_is_box),
    shapes=_unbox(boxed),
    config=module,
  )


def _is_box(x: Any) -> bool:
  return isinstance(x, nn.Partitioned)


def _unbox(tree: PyTree) -> PyTree:
  """Takes values out of boxes; flax's own also constrains their sharding."""
  return jax.tree.map(
    lambda x: x.value if _is_box(x) else x, tree, is_leaf=_is_box
  )
