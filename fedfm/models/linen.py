"""Makes a `Model` of a user's own flax.linen module."""

import functools
from typing import Any

from flax import linen as nn
import jax

from fedfm import errors
from fedfm.models import flax_kernels, layers
from fedfm.models.model import Model

PyTree = Any


def from_linen(module: nn.Module, example_input: Any) -> Model:
  """Wraps a linen module; its parameters become a plain dict.

  Names given with `nn.with_partitioning` or `nn.with_logical_partitioning`
  become logical axes; parameters without them are replicated. The kernels of
  its Dense and DenseGeneral layers take adapters (`fedfm.adapters`), which name
  them by their layer, such as "up" or "block_0/attention/query".

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
  kernels: dict[str, tuple[int, int]] = {}
  with (
    jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())),
    nn.intercept_methods(functools.partial(_note_kernel, kernels)),
  ):
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
    with nn.intercept_methods(_apply_kernel):
      return module.apply({"params": params}, *args, **kwargs)

  return Model(
    init=init,
    apply=apply,
    axes=jax.tree_util.tree_map_with_path(axes_of, boxed, is_leaf=_is_box),
    shapes=_unbox(boxed),
    config=module,
    kernels=kernels,
  )


def _is_dense(context: nn.module.InterceptorContext) -> bool:
  """Whether this is the call of a layer whose kernel may be an object."""
  return (
    context.method_name == "__call__"
    and type(context.module) in (nn.Dense, nn.DenseGeneral)
    and not getattr(context.module, "batch_dims", ())
  )


def _note_kernel(kernels, next_fun, args, kwargs, context):
  """Notes the kernel of each dense layer that is initialised."""
  if _is_dense(context):
    path = "/".join((*context.module.path, "kernel"))
    axis, features = _dimensions(context.module)
    kernels[path] = len(axis), len(features)
  return next_fun(*args, **kwargs)


def _apply_kernel(next_fun, args, kwargs, context):
  """Calls a dense layer whose kernel may be an object."""
  module = context.module
  if not _is_dense(context) or not module.has_variable("params", "kernel"):
    return next_fun(*args, **kwargs)
  kernel = module.get_variable("params", "kernel")
  if not layers.is_kernel(kernel):
    return next_fun(*args, **kwargs)
  axis, features = _dimensions(module)
  product = module.dot_general or jax.lax.dot_general
  if module.dot_general_cls is not None:
    product = module.dot_general_cls()
  return flax_kernels.apply_kernel(
    kernel,
    *args,
    **kwargs,
    bias=module.get_variable("params", "bias") if module.use_bias else None,
    axis=axis,
    features=features,
    promote=functools.partial(module.promote_dtype, dtype=module.dtype),
    product=functools.partial(product, precision=module.precision),
  )


def _dimensions(module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The axes that a dense layer contracts, and its features."""
  axis, features = getattr(module, "axis", -1), module.features
  return _as_tuple(axis), _as_tuple(features)


def _as_tuple(x: Any) -> tuple[int, ...]:
  return (x,) if isinstance(x, int) else tuple(x)


def _is_box(x: Any) -> bool:
  return isinstance(x, nn.Partitioned)


def _unbox(tree: PyTree) -> PyTree:
  """Takes values out of boxes; flax's own also constrains their sharding."""
  return jax.tree.map(
    lambda x: x.value if _is_box(x) else x, tree, is_leaf=_is_box
  )
