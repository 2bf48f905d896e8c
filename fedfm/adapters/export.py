"""Writes an adapted model as a plain Hugging Face folder."""

import dataclasses
import os
from typing import Any

import jax

from fedfm import errors
from fedfm.adapters.adapter import Adapter
from fedfm.models import huggingface, quantization
from fedfm.models.build import build
from fedfm.models.decoder import DecoderConfig
from fedfm.models.model import Model

PyTree = Any


def export(
  directory: str | os.PathLike,
  model: Model,
  params: PyTree,
  adapter: Adapter,
  trainable: PyTree,
  like: str | os.PathLike | None = None,
) -> None:
  """Merges an adapter into the model and saves it.

  Kernels of a quantised base are written as the float32 numbers that they stand
  for, so that the folder computes what the clients trained. Parameters that are
  trained whole keep the dtype they were trained in; an update of a kernel, such
  as LoRA's, is rounded to the kernel's.

  Args:
    directory: Folder to write; made if needed.
    model: The model, of `fedfm.models`.
    params: Its parameters, quantised or not; None where all are trained.
    adapter: The adapter.
    trainable: Its weights.
    like: A folder whose tokenizer goes along; see `huggingface.save`.

  Raises:
    ConfigError: An adapter that is not a change of weights.
    CheckpointError: As `huggingface.save`.
  """
  config = model.config
  if not hasattr(config, "architecture"):
    raise errors.CheckpointError(
      f"{directory}: only models of fedfm can be exported, got one with config "
      f"{type(config).__name__}"
    )

  @jax.jit
  def merge(params, trainable):
    return quantization.dequantize(adapter.merge(params, trainable))

  merged = merge(params, trainable)
  if (
    isinstance(config, DecoderConfig) and "lm_head" in merged
  ):  # A trained head unties.
    config = dataclasses.replace(config, tie_embeddings=False)
  huggingface.save(directory, build(config), merged, like=like)
