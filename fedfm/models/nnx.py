"""Makes a `Model` of a user's own flax.nnx module."""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from fedfm import errors
from fedfm.models import flax_kernels, layers
from fedfm.models.model import Model

PyTree = Any


def from_nnx(make: Callable[[nnx.Rngs], nnx.Module]) -> Model:
  """Wraps an nnx module; its parameters become a plain dict.

  Names given with `nnx.with_partitioning` become logical axes; parameters
  without them are replicated. The kernels of its Linear and LinearGeneral
  layers take adapters (`fedfm.adapters`), which name them by their layer, such
  as "up" or "blocks/0/attention/query".

  Args:
    make: `make(rngs) -> module`, such as the module's class; all its state must
      be of `nnx.Param` (give dropout its keys when it is called).

  Returns:
    A `Model`: `init(key)`, and `apply(params, *args, **kwargs)`, which calls
    the module.

  Raises:
    ConfigError: The module has other state.

  Examples:
    >>> model = from_nnx(lambda rngs: nnx.Linear(2, 3, rngs=rngs))
    >>> model.axes
    {'bias': (None,), 'kernel': (None, None)}
  """
  with nnx.use_eager_sharding(False):
    module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
  graphdef, state, others = nnx.split(module, nnx.Param, ...)
  if nnx.to_flat_state(others):
    kinds = {type(v).__name__ for _, v in nnx.to_flat_state(others)}
    raise errors.ConfigError(
      f"model: {type(module).__name__} keeps state in {', '.join(kinds)}; only "
      "Param is supported"
    )
  shapes = nnx.to_pure_dict(state)
  kernels: dict[str, tuple[int, int]] = {}
  for path, found in nnx.iter_modules(module):
    layer: Any = found
    if _is_dense(layer):
      axis, features = _dimensions(layer)
      # Of layers stacked for `nnx.scan`, a layer sees its own slice only.
      if layer.kernel.ndim == len(axis) + len(features):
        name = "/".join(map(str, (*path, "kernel")))
        kernels[name] = len(axis), len(features)

  def init(key: jax.Array) -> PyTree:
    with nnx.use_eager_sharding(False):
      return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))

  def apply(params: PyTree, *args: Any, **kwargs: Any) -> Any:
    plain = jax.tree.map(_placeholder, params, is_leaf=layers.is_kernel)
    filled = jax.tree.map(lambda x: x, state)  # A copy: it is filled in place.
    nnx.replace_by_pure_dict(filled, plain)
    called = nnx.merge(graphdef, filled)
    for path, layer in nnx.iter_modules(called):
      kernel = functools.reduce(lambda tree, k: tree.get(k, {}), path, params)
      if _is_dense(layer) and layers.is_kernel(kernel.get("kernel")):
        _put_kernel(layer, kernel["kernel"])
    return called(*args, **kwargs)

  return Model(
    init=init,
    apply=apply,
    axes=_axes(state),
    shapes=shapes,
    config=module,
    kernels=kernels,
  )


def _is_dense(layer: Any) -> bool:
  """Whether this is a layer whose kernel may be an object."""
  return type(layer) in (nnx.Linear, nnx.LinearGeneral) and not getattr(
    layer, "batch_axis", ()
  )


def _dimensions(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The axes that a dense layer contracts, and its features."""
  if isinstance(layer, nnx.Linear):
    return (-1,), (layer.out_features,)
  return layer.axis, layer.out_features


def _placeholder(x: Any) -> Any:
  """What a layer holds while its kernel is an object; it is not read."""
  if not layers.is_kernel(x):
    return x
  base = flax_kernels.base_of(x)
  return jnp.broadcast_to(jnp.zeros((), base.dtype), base.shape)


def _put_kernel(layer: Any, kernel: Any) -> None:
  """Makes a layer, of this call only, apply a kernel object."""
  axis, features = _dimensions(layer)
  bias = None if layer.bias is None else layer.bias[...]
  promote, product = layer.promote_dtype, layer.dot_general
  if getattr(layer, "dot_general_cls", None) is not None:
    product = layer.dot_general_cls()
  options = {"precision": layer.precision}
  if layer.preferred_element_type is not None:
    options["preferred_element_type"] = layer.preferred_element_type
  product = functools.partial(product or jax.lax.dot_general, **options)

  def dot_general(x, _, dims, **unused):
    del dims, unused
    return flax_kernels.apply_kernel(
      kernel,
      x,
      bias,
      axis=axis,
      features=features,
      promote=lambda *xs: promote(xs, dtype=layer.dtype),
      product=product,
    )

  # The object adds the bias itself; the promotion of x sees it all the same.
  layer.dot_general, layer.bias, layer.use_bias = dot_general, None, False
  if isinstance(layer, nnx.LinearGeneral):
    layer.dot_general_cls = None


def _axes(state: Any) -> PyTree:
  """Logical axes of every parameter, from its metadata."""

  def one(variable: Any) -> tuple[str | None, ...]:
    names = variable.get_metadata().get("out_sharding")
    return (None,) * len(variable.shape) if names is None else tuple(names)

  flat = [(path, one(v)) for path, v in nnx.to_flat_state(state)]
  tree: dict[Any, Any] = {}
  for (*parents, last), axes in flat:
    group = tree
    for key in parents:
      group = group.setdefault(key, {})
    group[last] = axes
  return tree
