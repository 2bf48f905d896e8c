"""Models as pure functions, their weights' files, and their losses."""

from fedfm.models import generation, huggingface, linen, losses
from fedfm.models.decoder import DecoderConfig, decoder
from fedfm.models.model import Model

__all__ = [
  "DecoderConfig",
  "Model",
  "decoder",
  "generation",
  "huggingface",
  "linen",
  "losses",
]
