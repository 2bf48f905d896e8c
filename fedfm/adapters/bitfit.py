"""BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): biases only."""

from fedfm import errors
from fedfm.adapters import adapter as adapter_lib
from fedfm.adapters.adapter import Adapter
from fedfm.adapters.subset import train_paths
from fedfm.models.model import Model


def bitfit(model: Model) -> Adapter:
  """Trains every bias of the model, those of its norms included.

  Args:
    model: A model with biases.

  Returns:
    An `Adapter` whose trainable is {path: bias}.

  Raises:
    ConfigError: The model has no bias.
  """
  paths = [
    path
    for path in adapter_lib.parameters(model.shapes)
    if path.rsplit("/", 1)[-1].rsplit("_", 1)[-1] == "bias"
  ]
  if not paths:
    raise errors.ConfigError(
      "adapter.kind: 'bitfit' trains biases, but the model has none"
    )
  return train_paths(model, paths, "bitfit", {})
