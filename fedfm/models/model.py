"""What a model is: pure functions, and parameters declared once.

A `ParamSpec` names a parameter's shape, logical axes and initializer; init,
shardings, abstract values and counts all derive from it.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedfm import trees

PyTree = Any


class Model(NamedTuple):
  """A model as pure functions.

  Attributes:
    init: `init(key) -> params`.
    apply: `apply(params, tokens, ...) -> logits [batch, seq, vocab]`.
    axes: Tree like `params`, a tuple of logical axes per leaf.
    shapes: Tree like `params` of `jax.ShapeDtypeStruct`.
    config: The model's own typed config.
    unembed: `unembed(params, hidden) -> logits`, for losses that compute logits
      in chunks; None where a model has no such split.
    init_cache: `init_cache(batch, length) -> cache` for generation, or None.
    kernels: Paths of the parameters that `layers.dense` applies, and so may be
      kernel objects -> how many of their last dimensions are a product's inputs
      and outputs, (1, 1) for a matrix. None where a model does not say: then
      adapters take its word that what they are put on is applied so.
  """

  init: Callable[..., PyTree]
  apply: Callable[..., Any]
  axes: PyTree
  shapes: PyTree = None
  config: Any = None
  unembed: Callable[..., jax.Array] | None = None
  init_cache: Callable[..., PyTree] | None = None
  kernels: Mapping[str, tuple[int, int]] | None = None


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """One parameter: shape, logical axes (one per dimension), initializer.

  Attributes:
    shape: The shape.
    axes: Logical axes, one per dimension.
    stddev: Standard deviation of a normal initializer; None fills with `fill`.
    fill: Constant used when `stddev` is None.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  stddev: float | None = None
  fill: float = 0.0

  def __post_init__(self):
    if len(self.shape) != len(self.axes):
      raise ValueError(f"{self.shape} has {len(self.axes)} axes: {self.axes}")


def _is_spec(x: Any) -> bool:
  return isinstance(x, ParamSpec)


def init_params(specs: PyTree, key: jax.Array, dtype: Any) -> PyTree:
  """Draws every parameter; a leaf's values depend only on `key` and its index.

  Args:
    specs: Tree of `ParamSpec`.
    key: A typed PRNG key.
    dtype: Dtype of all parameters.

  Returns:
    A tree of arrays.
  """
  leaves, treedef = jax.tree.flatten(specs, is_leaf=_is_spec)

  def draw(index: int, spec: ParamSpec) -> jax.Array:
    if spec.stddev is None:
      return jnp.full(spec.shape, spec.fill, dtype)
    noise = jax.random.normal(jax.random.fold_in(key, index), spec.shape)
    return (spec.stddev * noise).astype(dtype)

  return treedef.unflatten([draw(i, s) for i, s in enumerate(leaves)])


def from_specs(
  specs: PyTree,
  apply: Callable[..., Any],
  config: Any,
  kernels: Collection[str],
  **others: Any,
) -> Model:
  """Puts a model together from its declared parameters.

  Args:
    specs: Tree of `ParamSpec`.
    apply: As in `Model`.
    config: As in `Model`; its `param_dtype` is the dtype of all parameters.
    kernels: Last components of the paths of the matrices that `layers.dense`
      applies.
    **others: `unembed` and `init_cache` of `Model`.

  Returns:
    A `Model`.
  """
  dtype = jnp.dtype(config.param_dtype)
  shapes = shapes_of(specs, dtype)
  return Model(
    init=lambda key: init_params(specs, key, dtype),
    apply=apply,
    axes=axes_of(specs),
    shapes=shapes,
    config=config,
    kernels={
      path: (1, 1)
      for path in trees.paths(shapes)
      if path.rsplit("/", 1)[-1] in kernels
    },
    **others,
  )


def axes_of(specs: PyTree) -> PyTree:
  """Returns the tree of logical axes."""
  return jax.tree.map(lambda s: s.axes, specs, is_leaf=_is_spec)


def shapes_of(specs: PyTree, dtype: Any) -> PyTree:
  """Returns the tree of `jax.ShapeDtypeStruct`."""
  return jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, dtype), specs, is_leaf=_is_spec
  )


def num_params(specs: PyTree) -> int:
  """Returns the number of scalars that `specs` declares."""
  return sum(
    math.prod(s.shape) for s in jax.tree.leaves(specs, is_leaf=_is_spec)
  )
