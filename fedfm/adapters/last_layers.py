"""Training the last layers of the model only."""

import jax
import jax.numpy as jnp

from fedfm import errors
from fedfm.adapters import adapter as adapter_lib
from fedfm.adapters.adapter import Adapter
from fedfm.models.model import Model


def last_layers(model: Model, *, num_layers: int = 1) -> Adapter:
  """Trains the last layers of a decoder whole.

  The layers before them stay the base's own and are shared by all clients.
  Scanned, they are sliced off the stack: a copy of that part of the base.

  Args:
    model: A decoder.
    num_layers: Layers to train, from the end.

  Returns:
    An `Adapter` whose trainable is a float32 copy of the layers' parameters,
    leaves [num_layers, ...].

  Raises:
    ConfigError: A model without stacked layers, a number that is not 1 up to
      all of them, or quantised layers.
  """
  shapes = model.shapes if isinstance(model.shapes, dict) else {}
  if not isinstance(shapes.get("layers"), dict) or model.init_cache is None:
    raise errors.ConfigError(
      "adapter.kind: 'last_layers' needs a decoder, whose layers are stacked"
    )
  paths = [p for p in adapter_lib.parameters(shapes) if p.startswith("layers/")]
  adapter_lib.check_trained(model, paths, "last_layers")
  depth = adapter_lib.parameters(shapes)[paths[0]].shape[0]
  if not 1 <= num_layers <= depth:
    raise errors.ConfigError(
      f"num_layers: got {num_layers}, expected 1 to {depth}"
    )
  frozen = depth - num_layers

  def bind(params, trainable):
    if not frozen:
      return {**params, "layers": trainable}
    first = jax.tree.map(lambda x: x[:frozen], params["layers"])
    return {**params, "layers": (first, trainable)}

  def merge(params, trainable):
    # In the wider dtype: what is merged is what was trained and evaluated.
    both = jax.tree.map(
      lambda x, t: jnp.concatenate([x[:frozen], t]),
      params["layers"],
      trainable,
    )
    return {**params, "layers": both}

  return adapter_lib.make_adapter(
    model,
    init=lambda key, params: adapter_lib.own(
      jax.tree.map(lambda x: x[frozen:], params["layers"])
    ),
    bind=bind,
    merge=merge,
    kind="last_layers",
    config={"num_layers": num_layers},
  )
