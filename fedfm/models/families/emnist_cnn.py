"""The EMNIST CNN: our own layout, in the files that all models have."""

from typing import Any

from fedfm.models.cnn import CNNConfig
from fedfm.models.families.family import Family, FieldRow, Fields, TensorRow

_KERNELS = ("conv1", "conv2", "dense", "head")
_BIASES = ("bias1", "bias2", "dense_bias", "head_bias")


def _read(fields: Fields) -> dict[str, Any]:
  channels = fields.get("channels", list, [32, 64])
  if len(channels) != 2 or not all(type(n) is int for n in channels):
    raise fields.error(f"channels is {channels!r}, expected two integers")
  return {"channels": tuple(channels)}


def _write(config: CNNConfig) -> dict[str, Any]:
  return {"channels": list(config.channels)}


EMNIST_CNN = Family(
  architecture="EMNISTCNN",
  model_type="emnist_cnn",
  tensors=tuple(TensorRow(name, name) for name in (*_KERNELS, *_BIASES)),
  fields=(
    FieldRow("num_classes", "num_classes", int, 62),
    FieldRow("image_size", "image_size", int, 28),
    FieldRow("num_channels", "num_channels", int, 1),
    FieldRow("hidden_size", "hidden", int, 128),
  ),
  activation=None,
  read=_read,
  write=_write,
  ignored=r"$^",
  config=CNNConfig,
  classifier="EMNISTCNN",
)
