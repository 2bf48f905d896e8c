"""What an adapter is: which weights clients train, and how they are applied."""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedfm import errors, sharding, trees
from fedfm.models import layers
from fedfm.models.model import Model
from fedfm.types import LossFn

PyTree = Any
HEADS = ("lm_head", "classifier")  # Output heads: of tokens, of classes.


class Adapter(NamedTuple):
  """Trainable weights beside, instead of, or among a model's parameters.

  Attributes:
    init: `init(key, params) -> trainable`, float32.
    apply: `apply(params, trainable, *args, **kw)`: `model.apply` with the
      trainable second.
    merge: `merge(params, trainable) -> params` that need no adapter; raises
      ConfigError where the adapter is more than weights.
    bind: `bind(params, trainable) -> params` for `model.apply`, whose adapted
      kernels carry their adapter with them; LoRA's takes `dropout_key` too.
    kind: "lora", "full", "head", ...
    config: What `init` was built with, for files and messages.
    axes: Tree like the trainable, a tuple of logical axes per leaf, which
      `bind` constrains it to; None is replicated.
  """

  init: Callable[[jax.Array, PyTree], PyTree]
  apply: Callable[..., Any]
  merge: Callable[[PyTree, PyTree], PyTree]
  bind: Callable[..., PyTree]
  kind: str
  config: dict[str, Any]
  axes: PyTree = None


def make_adapter(
  model: Model,
  *,
  init: Callable[[jax.Array, PyTree], PyTree],
  bind: Callable[..., PyTree],
  merge: Callable[[PyTree, PyTree], PyTree] | None,
  kind: str,
  config: Mapping[str, Any] | None = None,
  axes: PyTree = None,
) -> Adapter:
  """Puts an adapter together from what is its own.

  Args:
    model: The model.
    init: As in `Adapter`.
    bind: As in `Adapter`.
    merge: As in `Adapter`; None where the adapter is more than weights.
    kind: As in `Adapter`.
    config: As in `Adapter`.
    axes: As in `Adapter`.

  Returns:
    An `Adapter` that applies what `bind` gives.
  """

  def refuse(params, trainable):
    raise errors.ConfigError(
      f"adapter.kind: {kind!r} is not a change of weights and cannot be merged "
      "into the model; save it as an adapter"
    )

  def bind_in_place(params, trainable, **kw):
    return bind(params, sharding.constrain_tree(trainable, axes), **kw)

  def apply(params, trainable, *args, dropout_key=None, **kw):
    bound = bind_in_place(
      params,
      trainable,
      **({} if dropout_key is None else {"dropout_key": dropout_key}),
    )
    return model.apply(bound, *args, **kw)

  return Adapter(
    init=init,
    apply=apply,
    merge=merge or refuse,
    bind=bind_in_place,
    kind=kind,
    config=dict(config or {}),
    axes=axes,
  )


def trainable_dtype(dtype: Any) -> Any:
  """Trainables are float32, or wider where the parameter is."""
  return jnp.promote_types(dtype, jnp.float32)


def own(tree: PyTree) -> PyTree:
  """Copies to the trainable's dtype, never aliasing the base."""
  return jax.tree.map(
    lambda x: jnp.array(x, trainable_dtype(x.dtype), copy=True), tree
  )


def loss_apply(adapter: Adapter) -> Callable[..., Any]:
  """Swaps to the order of a loss: `apply(trainable, base, *args)`."""
  return lambda trainable, base, *args, **kw: adapter.apply(
    base, trainable, *args, **kw
  )


def train_loss(
  adapter: Adapter, make_loss: Callable[[Callable[..., Any]], LossFn]
) -> LossFn:
  """The loss to train with: with dropout, where the adapter has it.

  Args:
    adapter: What clients train.
    make_loss: `make_loss(apply) -> loss`, such as `losses.language_model`.

  Returns:
    `loss(trainable, base, batch, key)`, masks drawn from `key`. The loss to
    evaluate with is `make_loss(loss_apply(adapter))`.
  """
  if not adapter.config.get("dropout"):
    return make_loss(loss_apply(adapter))

  def loss(trainable, base, batch, key):
    apply = functools.partial(loss_apply(adapter), dropout_key=key)
    return make_loss(apply)(trainable, base, batch, key)

  return loss


def axes_by_path(model: Model) -> dict[str, sharding.LogicalAxes]:
  """Returns {path: logical axes}; a quantised kernel has the kernel's."""
  axes: dict[str, Any] = trees.by_path(
    model.axes, lambda x: sharding.is_axes(x) or layers.is_kernel(x)
  )
  return {
    path: jax.tree.leaves(x, is_leaf=sharding.is_axes)[0]
    for path, x in axes.items()
  }


def parameters(params: PyTree) -> dict[str, Any]:
  """Returns {path: parameter}; a kernel object is one parameter."""
  return trees.by_path(params, is_leaf=layers.is_kernel)


def replace(
  params: PyTree, changes: Mapping[str, Callable[[Any], Any]]
) -> PyTree:
  """Replaces parameters by path.

  Args:
    params: Parameters; a kernel object is one.
    changes: {path: parameter -> what to put there}.

  Returns:
    Parameters of the same structure, or with kernel objects in it.
  """

  def one(path, x):
    change = changes.get(trees.path_name(path))
    return x if change is None else change(x)

  return jax.tree_util.tree_map_with_path(one, params, is_leaf=layers.is_kernel)


def merge_kernels(
  bind: Callable[[PyTree, PyTree], PyTree], paths: Sequence[str]
) -> Callable[[PyTree, PyTree], PyTree]:
  """Makes `merge` of a `bind` that wraps kernels in objects with `array`.

  Args:
    bind: As in `Adapter`.
    paths: The kernels that it wraps.

  Returns:
    As `Adapter.merge`; merged kernels keep the dtype of the base's.
  """

  def merge(params, trainable):
    dtypes = {p: x.dtype for p, x in parameters(params).items() if p in paths}
    bound = bind(params, trainable)
    return replace(
      bound,
      {p: lambda x, d=dtypes[p]: layers.array(x).astype(d) for p in paths},
    )

  return merge


def check_trained(model: Model, paths: Sequence[str], kind: str) -> None:
  """Refuses to train weights that are quantised, or that are not there.

  Args:
    model: The model.
    paths: Parameters that are to be trained themselves.
    kind: The adapter, for the message.

  Raises:
    ConfigError: No such parameter, or one that is quantised.
  """
  known = parameters(model.shapes)
  for path in paths:
    if layers.is_kernel(known[path]):
      raise errors.ConfigError(
        f"adapter.kind: {kind!r} trains {path}, which is quantised; quantise "
        "nothing, or train an adapter beside it such as 'lora'"
      )


class Kernel(NamedTuple):
  """A kernel that an adapter may sit on, read as a stack of matrices.

  Attributes:
    path: Its path.
    lead: Dimensions of the stack, such as (layers,).
    rows: Inputs, over all its input dimensions.
    cols: Outputs, likewise.
    dtype: Of an adapter for it.
  """

  path: str
  lead: tuple[int, ...]
  rows: int
  cols: int
  dtype: Any


def target_kernels(
  model: Model, targets: Sequence[str], field: str = "targets"
) -> list[Kernel]:
  """Finds the kernels that targets name.

  Args:
    model: The model.
    targets: Last path components, such as "q_proj", or whole paths; of a Flax
      module, names of modules. "all-linear" is all but the output head.
    field: Their field's name, for messages.

  Returns:
    The kernels, in the order of the model's parameters.

  Raises:
    ConfigError: No target, or one that names no kernel.
  """
  if not targets or isinstance(targets, str):
    raise errors.ConfigError(
      f"{field}: got {targets!r}, expected a list of kernels' names"
    )
  shapes, kernels = parameters(model.shapes), model.kernels
  if kernels is None:
    kernels = {p: (1, 1) for p, x in shapes.items() if len(x.shape) >= 2}
  for target in targets:
    if not any(_matches(target, path) for path in kernels):
      _refuse_target(target, kernels, shapes, field)
  return [
    _kernel(path, shapes[path], kernels[path])
    for path in shapes
    if path in kernels and any(_matches(t, path) for t in targets)
  ]


def _refuse_target(target, kernels, shapes, field):
  for path, x in shapes.items():
    if _matches(target, path) and path not in kernels:
      raise errors.ConfigError(
        f"{field}: {target!r} is {path} {x.shape}, which no dense layer "
        "applies, so that it takes no adapter"
      )
  names = {_module(path).rsplit("/", 1)[-1] for path in kernels}
  raise errors.ConfigError(
    f"{field}: no kernel is named {target!r}"
    f"{errors.nearest(target, names | {'all-linear'})}"
  )


def _module(path: str) -> str:
  """Flax's kernels are all named "kernel": what counts is their module."""
  return path.removesuffix("/kernel")


def _matches(target: str, path: str) -> bool:
  if target == "all-linear":
    return path not in HEADS
  names = (path, _module(path))
  return any(n == target or n.endswith("/" + target) for n in names)


def _kernel(path: str, x: Any, dims: tuple[int, int]) -> Kernel:
  shape, (num_in, num_out) = tuple(x.shape), dims
  lead, rest = shape[: -num_in - num_out], shape[-num_in - num_out :]
  rows, cols = math.prod(rest[:num_in]), math.prod(rest[num_in:])
  return Kernel(path, lead, rows, cols, trainable_dtype(x.dtype))


def bias_of(path: str, known: Mapping[str, Any]) -> str | None:
  """Returns the path of the bias that goes with a kernel, if there is one.

  Examples:
    >>> bias_of("up/kernel", {"up/kernel": 0, "up/bias": 0})
    'up/bias'
  """
  is_flax = path.rsplit("/", 1)[-1] == "kernel"
  bias = path.removesuffix("kernel") + "bias" if is_flax else path + "_bias"
  return bias if bias in known else None


def loss_unembed(adapter: Adapter, model: Model) -> Callable[..., Any]:
  """The output head for `models.losses`: `(trainable, base) -> head`.

  The head maps hidden [..., width] to logits [..., vocab]. Its weights are
  gathered over `fsdp` here, once, and not for every chunk of tokens.

  Args:
    adapter: What clients train.
    model: Its model.

  Returns:
    `unembed` of `language_model`.

  Raises:
    ConfigError: A model without `unembed`.
  """
  if model.unembed is None:
    raise errors.ConfigError("model: has no unembed, its head is part of apply")

  def unembed(trainable, base):
    params = sharding.gathered(adapter.bind(base, trainable), model.axes)
    return functools.partial(model.unembed, params)

  return unembed
