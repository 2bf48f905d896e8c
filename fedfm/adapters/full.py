"""Training all of the model's weights."""

from fedfm.adapters import adapter as adapter_lib
from fedfm.adapters.adapter import Adapter
from fedfm.models.model import Model


def full(model: Model) -> Adapter:
  """Trains all weights; the base is not read and may be None in `apply`.

  Args:
    model: The model.

  Returns:
    An `Adapter` whose trainable is a float32 copy of the parameters.

  Raises:
    ConfigError: The model has quantised weights.
  """
  adapter_lib.check_trained(
    model, list(adapter_lib.parameters(model.shapes)), "full"
  )

  def bind(params, trainable):
    del params
    return trainable

  return adapter_lib.make_adapter(
    model,
    init=lambda key, params: adapter_lib.own(params),
    bind=bind,
    merge=bind,
    kind="full",
    axes=model.axes,
  )
