"""An adapter, and some of the model's own parameters trained beside it.

A classifier that is drawn anew has to be trained, whatever adapts the layers
below it (PEFT's `modules_to_save`).
"""

from collections.abc import Sequence

import jax

from fedfm import errors
from fedfm.adapters import adapter as adapter_lib
from fedfm.adapters.adapter import Adapter
from fedfm.adapters.subset import subset, train_paths
from fedfm.models.model import Model


def with_parameters(
  model: Model, adapter: Adapter, names: tuple[str, ...]
) -> Adapter:
  """Trains the parameters whose path holds one of the names, too.

  Args:
    model: The model.
    adapter: One whose trainable is {path: its weights there}, such as LoRA's.
    names: Parts of paths, such as "classifier".

  Returns:
    An `Adapter` of the same kind whose trainable is the adapter's with
    {path: parameter} beside it; `config["also"]` are the names, and
    `config["paths"]` the paths.

  Raises:
    ConfigError: A name that no path holds, a parameter that the adapter trains
      already, or one that is quantised.
  """
  return _beside(model, adapter, subset(model, names), names)


def with_paths(model: Model, adapter: Adapter, paths: Sequence[str]) -> Adapter:
  """As `with_parameters`, of whole paths."""
  other = train_paths(model, paths, "subset", {"names": tuple(paths)})
  return _beside(model, adapter, other, paths)


def _beside(
  model: Model, adapter: Adapter, other: Adapter, names: Sequence[str]
) -> Adapter:
  key = jax.eval_shape(jax.random.key, 0)
  first, second = (
    jax.eval_shape(a.init, key, model.shapes) for a in (adapter, other)
  )
  trained = first.keys() if isinstance(first, dict) else set()
  twice = sorted(trained & second.keys()) or (
    sorted(second) if adapter.kind == "full" else []
  )
  if twice:
    raise errors.ConfigError(
      f"also: {twice[0]} is trained by {adapter.kind!r} already"
    )

  def split(trainable):
    mine = {k: x for k, x in trainable.items() if k not in second}
    return mine, {path: trainable[path] for path in second}

  def init(key, params):
    return {**adapter.init(key, params), **other.init(key, params)}

  def bind(params, trainable, **kw):
    mine, rest = split(trainable)
    return other.bind(adapter.bind(params, mine, **kw), rest)

  def merge(params, trainable):
    mine, rest = split(trainable)
    return other.merge(adapter.merge(params, mine), rest)

  axes = None
  if adapter.axes is not None:
    axes = {**adapter.axes, **other.axes}
  return adapter_lib.make_adapter(
    model,
    init=init,
    bind=bind,
    merge=merge,
    kind=adapter.kind,
    config=adapter.config | {"also": tuple(names), "paths": tuple(second)},
    axes=axes,
  )
