"""From a model's config to the model, whatever kind it is."""

from typing import Any

from fedfm.models.clip import CLIPConfig, clip
from fedfm.models.cnn import CNNConfig, cnn
from fedfm.models.decoder import DecoderConfig, decoder
from fedfm.models.encoder import EncoderConfig, encoder
from fedfm.models.model import Model
from fedfm.models.vision import VisionConfig, vit

_FACTORIES: dict[type, Any] = {
  DecoderConfig: decoder,
  EncoderConfig: encoder,
  VisionConfig: vit,
  CLIPConfig: clip,
  CNNConfig: cnn,
}


def build(config: Any) -> Model:
  """Builds the model that a config is of.

  Args:
    config: A `DecoderConfig`, `EncoderConfig`, `VisionConfig`, `CLIPConfig` or
      `CNNConfig`.

  Returns:
    A `Model`.
  """
  return _FACTORIES[type(config)](config)


def image_shape(config: Any) -> tuple[int, int, int]:
  """What a model of images takes: (height, width, channels).

  Args:
    config: A `VisionConfig`, `CLIPConfig` or `CNNConfig`.

  Returns:
    The shape of an image.
  """
  return (config.image_size, config.image_size, config.num_channels)
