"""Models as pure functions, their weights' files, and their losses."""

from fedfm.models import (
  generation,
  huggingface,
  linen,
  llama2c,
  losses,
  nnx,
  quantization,
)
from fedfm.models.build import build, image_shape
from fedfm.models.clip import CLIPConfig, clip
from fedfm.models.cnn import CNNConfig, cnn
from fedfm.models.decoder import DecoderConfig, decoder
from fedfm.models.encoder import EncoderConfig, encoder
from fedfm.models.encoder_layers import StackConfig
from fedfm.models.model import Model
from fedfm.models.vision import VisionConfig, vit

__all__ = [
  "CLIPConfig",
  "CNNConfig",
  "DecoderConfig",
  "EncoderConfig",
  "Model",
  "StackConfig",
  "VisionConfig",
  "build",
  "clip",
  "cnn",
  "decoder",
  "encoder",
  "generation",
  "huggingface",
  "image_shape",
  "linen",
  "llama2c",
  "losses",
  "nnx",
  "quantization",
  "vit",
]
