"""Training some of the model's own weights, or all of them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import errors, trees
from fedfm.adapters.adapter import Adapter, trainable_dtype
from fedfm.models.model import Model

PyTree = Any


def _own(tree: PyTree) -> PyTree:
  """Copies to the trainable's dtype, never aliasing the base."""
  return jax.tree.map(
    lambda x: jnp.array(x, trainable_dtype(x.dtype), copy=True), tree
  )


def _adapter(
  model: Model,
  init: Callable[[jax.Array, PyTree], PyTree],
  bind: Callable[[PyTree, PyTree], PyTree],
  kind: str,
) -> Adapter:
  return Adapter(
    init=init,
    apply=lambda params, trainable, *args, **kw: model.apply(
      bind(params, trainable), *args, **kw
    ),
    merge=bind,
    bind=bind,
    kind=kind,
    config={},
  )


def full(model: Model) -> Adapter:
  """Trains all weights; the base is not read and may be None in `apply`.

  Args:
    model: The model.

  Returns:
    An `Adapter` whose trainable is a float32 copy of the parameters.
  """
  return _adapter(
    model,
    init=lambda key, params: _own(params),
    bind=lambda params, trainable: trainable,
    kind="full",
  )


def head(model: Model) -> Adapter:
  """Trains the final norm and the output head; tied heads are untied first.

  Args:
    model: A decoder.

  Returns:
    An `Adapter` whose trainable is {"final_norm", "lm_head"}.

  Raises:
    ConfigError: The model has no `final_norm` and `embed` or `lm_head`.
  """
  names = set(model.shapes) if isinstance(model.shapes, dict) else set()
  if "final_norm" not in names or not names & {"embed", "lm_head"}:
    raise errors.ConfigError(
      "adapter: 'head' needs parameters 'final_norm' and 'lm_head' or "
      f"'embed', got {sorted(names)}"
    )

  def init(key, params):
    del key
    lm_head = params["lm_head"] if "lm_head" in params else params["embed"].T
    return _own({"final_norm": params["final_norm"], "lm_head": lm_head})

  return _adapter(model, init, lambda p, t: {**p, **t}, "head")


def subset(model: Model, names: tuple[str, ...]) -> Adapter:
  """Trains the parameters whose path holds one of the names.

  Args:
    model: The model.
    names: Parts of paths, such as "norm" or "layers/up_proj".

  Returns:
    An `Adapter` whose trainable is {path: parameter}.

  Raises:
    ConfigError: No name, or one that no path holds.
  """
  if not names or isinstance(names, str):
    raise errors.ConfigError(
      f"names: got {names!r}, expected a tuple of parts of paths"
    )
  paths = trees.paths(model.shapes)
  for name in names:
    if not any(name in path for path in paths):
      raise errors.ConfigError(
        f"names: no parameter holds {name!r}{errors.nearest(name, paths)}"
      )
  chosen = [p for p in paths if any(name in p for name in names)]

  def init(key, params):
    del key
    leaves = dict(zip(trees.paths(params), jax.tree.leaves(params)))
    return _own({path: leaves[path] for path in chosen})

  def bind(params, trainable):
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(
      [trainable.get(p, x) for p, x in zip(trees.paths(params), leaves)]
    )

  return _adapter(model, init, bind, "subset")
