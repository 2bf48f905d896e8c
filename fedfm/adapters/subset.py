"""Training some of the model's own parameters, chosen by name."""

from collections.abc import Sequence

from fedfm import errors
from fedfm.adapters import adapter as adapter_lib
from fedfm.adapters.adapter import Adapter
from fedfm.models.model import Model


def subset(model: Model, names: tuple[str, ...]) -> Adapter:
  """Trains the parameters whose path holds one of the names.

  Args:
    model: The model.
    names: Parts of paths, such as "norm" or "layers/up_proj".

  Returns:
    An `Adapter` whose trainable is {path: parameter}.

  Raises:
    ConfigError: No name, one that no path holds, or a quantised parameter.
  """
  if not names or isinstance(names, str):
    raise errors.ConfigError(
      f"names: got {names!r}, expected a tuple of parts of paths"
    )
  paths = list(adapter_lib.parameters(model.shapes))
  for name in names:
    if not any(name in path for path in paths):
      raise errors.ConfigError(
        f"names: no parameter holds {name!r}{errors.nearest(name, paths)}"
      )
  chosen = [p for p in paths if any(name in p for name in names)]
  return train_paths(model, chosen, "subset", {"names": tuple(names)})


def train_paths(
  model: Model, paths: Sequence[str], kind: str, config: dict
) -> Adapter:
  """Trains the parameters of these paths.

  Args:
    model: The model.
    paths: Whole paths.
    kind: As in `Adapter`.
    config: As in `Adapter`.

  Returns:
    An `Adapter` whose trainable is {path: parameter}.

  Raises:
    ConfigError: A parameter that is quantised.
  """
  adapter_lib.check_trained(model, paths, kind)

  def init(key, params):
    del key
    known = adapter_lib.parameters(params)
    return adapter_lib.own({path: known[path] for path in paths})

  def bind(params, trainable):
    return adapter_lib.replace(
      params, {path: lambda _, x=x: x for path, x in trainable.items()}
    )

  known = adapter_lib.axes_by_path(model)
  return adapter_lib.make_adapter(
    model,
    init=init,
    bind=bind,
    merge=bind,
    kind=kind,
    config=config,
    axes={path: known[path] for path in paths},
  )
