"""The EMNIST CNN of the federated literature, with convolutions as matmuls.

Two 3 x 3 convolutions (32 and 64 channels), 2 x 2 max pooling, 128 hidden
units (Reddi et al. 2021, arXiv 2003.00295; dropout left out). XLA's
convolution is slow inside a loop on a CPU (jax-ml/jax issue 12868) and becomes
a grouped one under vmap; nine shifted copies and one matmul stay as fast as a
matmul in both.
"""

import dataclasses

import jax
import jax.numpy as jnp

from fedfm import errors
from fedfm.models import layers
from fedfm.models import model as model_lib
from fedfm.models.model import Model, ParamSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class CNNConfig:
  """Sizes of the CNN.

  Attributes:
    num_classes: Classes of the output.
    image_size: Height and width, even; images are [size, size, channels].
    num_channels: Channels of an image.
    channels: Channels of the two convolutions.
    hidden: Units of the hidden layer.
    architecture: What `huggingface.save` writes it as.
    dtype: Compute dtype.
    param_dtype: Dtype that `init` draws parameters in.
  """

  num_classes: int = 62
  image_size: int = 28
  num_channels: int = 1
  channels: tuple[int, int] = (32, 64)
  hidden: int = 128
  architecture: str = "EMNISTCNN"
  dtype: str = "float32"
  param_dtype: str = "float32"

  def __post_init__(self):
    if self.image_size < 6 or self.image_size % 2:
      raise errors.ConfigError(
        f"model.image_size: got {self.image_size}, expected an even number of "
        "at least 6"
      )


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves without padding, as patches and one matmul.

  Args:
    x: [batch, height, width, in].
    kernel: [rows, cols, in, out].

  Returns:
    [batch, height - rows + 1, width - cols + 1, out].
  """
  rows, cols, channels, out = kernel.shape
  h, w = x.shape[1] - rows + 1, x.shape[2] - cols + 1
  patches = jnp.concatenate(
    [x[:, i : i + h, j : j + w] for i in range(rows) for j in range(cols)],
    axis=-1,
  )
  return patches @ kernel.reshape(rows * cols * channels, out)


def max_pool(x: jax.Array) -> jax.Array:
  """Takes the maximum of 2 x 2 windows: [b, h, w, c] -> [b, h/2, w/2, c]."""
  b, h, w, c = x.shape
  # Pairwise maxima differentiate into selects; a window reduction would not.
  x = x.reshape(b, h // 2, 2, w // 2, 2, c)
  x = jnp.maximum(x[:, :, 0], x[:, :, 1])
  return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])


def cnn(config: CNNConfig | None = None) -> Model:
  """Builds the CNN as pure functions.

  `apply(params, x)` takes images [batch, size, size, channels], or
  [batch, size, size] where there is one channel, and returns logits
  [batch, classes] in float32 at least.

  Args:
    config: Sizes; default those of EMNIST with 62 classes.

  Returns:
    A `Model`.

  Examples:
    >>> model = cnn(CNNConfig(num_classes=10))
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, jnp.zeros((2, 28, 28))).shape
    (2, 10)
  """
  c = config or CNNConfig()
  first, second = c.channels
  side = (c.image_size - 4) // 2
  flat = side * side * second

  def kernel(*shape, axes):
    fan_in = 1
    for n in shape[:-1]:
      fan_in *= n
    return ParamSpec(shape, axes, stddev=(2 / fan_in) ** 0.5)

  def bias(n):
    return ParamSpec((n,), (None,))

  specs = {
    "conv1": kernel(3, 3, c.num_channels, first, axes=(None,) * 4),
    "bias1": bias(first),
    "conv2": kernel(3, 3, first, second, axes=(None,) * 4),
    "bias2": bias(second),
    "dense": kernel(flat, c.hidden, axes=("embed", "mlp")),
    "dense_bias": bias(c.hidden),
    "head": kernel(c.hidden, c.num_classes, axes=(None, None)),
    "head_bias": bias(c.num_classes),
  }
  dtype = jnp.dtype(c.dtype)

  def apply(params, x):
    x = x.reshape(x.shape[0], c.image_size, c.image_size, c.num_channels)
    x = x.astype(dtype)
    p = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    with jax.named_scope("conv"):
      x = jax.nn.relu(convolve(x, p["conv1"]) + p["bias1"])
      x = jax.nn.relu(convolve(x, p["conv2"]) + p["bias2"])
      x = max_pool(x).reshape(x.shape[0], flat)
    with jax.named_scope("dense"):
      x = jax.nn.relu(layers.dense(x, p["dense"], p["dense_bias"]))
      logits = layers.dense(x, p["head"], p["head_bias"])
    return logits.astype(jnp.promote_types(dtype, jnp.float32))

  return model_lib.from_specs(specs, apply, c, ("dense", "head"))
