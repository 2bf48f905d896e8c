"""The vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929).

Patches are cut by a reshape and embedded by one matmul, never a convolution:
under vmap over clients that would become a grouped one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import errors, sharding
from fedfm.models import attention, encoder_layers
from fedfm.models import model as model_lib
from fedfm.models.encoder_layers import StackConfig, dense, norm
from fedfm.models.model import Model, ParamSpec

PyTree = Any
_KERNELS = (*encoder_layers.KERNELS, "pooler", "classifier")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(StackConfig):
  """Sizes and options of a vision transformer.

  Attributes:
    image_size: Height and width of an image, in pixels.
    patch_size: Height and width of a patch; divides `image_size`.
    num_channels: Channels of an image.
    pooler: Whether there is a pooler: tanh of a dense layer on the class token.
    num_classes: Classes of the classifier on the class token; 0 without one.
    architecture: What `huggingface.save` writes it as.
    dtype: Compute dtype.
    param_dtype: Dtype that `init` draws parameters in.
    scan_layers: Run layers in one `scan` or unrolled.
    remat: "none", "full", "mlp" or "dots"; see `DecoderConfig`.
    attention_kernel: "xla", "cudnn" (GPU), "splash" (TPU), or "auto".
  """

  image_size: int = 224
  patch_size: int = 16
  num_channels: int = 3
  pooler: bool = False
  num_classes: int = 0
  architecture: str = "ViTModel"
  dtype: str = "float32"
  param_dtype: str = "float32"
  scan_layers: bool = True
  remat: str = "none"
  attention_kernel: str = "auto"

  def __post_init__(self):
    super().__post_init__()
    check_image(self)
    encoder_layers.check_choice(self, "remat", encoder_layers.REMAT)
    encoder_layers.check_choice(self, "attention_kernel", attention.KERNELS)
    if self.num_classes < 0:
      raise errors.ConfigError(
        f"model.num_classes: got {self.num_classes}, expected at least 0"
      )


def check_image(config: Any) -> None:
  """Refuses patches that do not tile the image."""
  encoder_layers.check_positive(
    config, "image_size", "patch_size", "num_channels"
  )
  if config.image_size % config.patch_size:
    raise errors.ConfigError(
      f"model.patch_size: {config.patch_size} does not divide image_size "
      f"{config.image_size}"
    )


def vit(config: VisionConfig) -> Model:
  """Builds the vision transformer as pure functions.

  `apply(params, images, *, output=None)` takes images [batch, size, size,
  channels], or [batch, size, size] where there is one channel. `output` is
  "logits" [batch, classes], "hidden" [batch, 1 + patches, width] (the class
  token first), "cls" [batch, width], "mean" [batch, width] (over the patches)
  or "pooled" [batch, width]; the default is "logits" of a model with a
  classifier, else "hidden". `prompt` [n, width] among the parameters is put
  after the class token, without positions (VPT-shallow, arXiv 2203.12119); no
  output has it.

  Args:
    config: Sizes and options.

  Returns:
    A `Model`.

  Examples:
    >>> model = vit(VisionConfig(width=8, num_layers=1, num_heads=2,
    ...                          mlp_width=16, image_size=28, patch_size=7,
    ...                          num_channels=1, num_classes=10))
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, jnp.zeros((3, 28, 28))).shape
    (3, 10)
  """
  c, d = config, config.width
  specs: dict[str, Any] = {
    "class_token": ParamSpec((1, 1, d), (None, None, "norm"), 0.02),
    "position_embed": ParamSpec(
      (1, 1 + num_patches(c), d), (None, None, "table_width"), 0.02
    ),
    "patch_embed": patch_spec(c, d),
    "patch_embed_bias": ParamSpec((d,), ("norm",)),
    "layers": encoder_layers.stack_specs(c),
    **encoder_layers.norm_specs("final_norm", d),
  }
  if c.pooler:
    specs |= encoder_layers.dense_specs("pooler", d, d, ("embed", None))
  if c.num_classes:
    specs |= encoder_layers.dense_specs(
      "classifier", d, c.num_classes, ("embed", None)
    )
  apply = functools.partial(_apply, config)
  return model_lib.from_specs(specs, apply, config, _KERNELS)


def num_patches(config: Any) -> int:
  """Patches of an image."""
  return (config.image_size // config.patch_size) ** 2


def patch_spec(config: Any, width: int) -> ParamSpec:
  """The patches' kernel, in the layout of the files: [width, c, rows, cols]."""
  side = config.patch_size
  shape = (width, config.num_channels, side, side)
  return ParamSpec(shape, ("embed", None, None, None), 0.02)


def embed_patches(
  config: Any, images: jax.Array, kernel: jax.Array, dtype: Any
) -> jax.Array:
  """Cuts images into patches and embeds each by the same matrix.

  Args:
    config: `image_size`, `patch_size` and `num_channels`.
    images: [batch, size, size, channels], or without the last of one.
    kernel: [width, channels, patch, patch].
    dtype: Compute dtype.

  Returns:
    [batch, patches, width], row by row.

  Raises:
    ConfigError: Images of another size.
  """
  size, side, channels = (
    config.image_size,
    config.patch_size,
    config.num_channels,
  )
  images = jnp.asarray(images)
  if images.ndim == 3 and channels == 1:
    images = images[..., None]
  if images.shape[1:] != (size, size, channels):
    raise errors.ConfigError(
      f"images: got {list(images.shape[1:])} each, but the model's are "
      f"[{size}, {size}, {channels}]"
    )
  batch, n = images.shape[0], size // side
  x = images.astype(dtype).reshape(batch, n, side, n, side, channels)
  # [batch, rows, patch, cols, patch, c] -> [batch, rows, cols, c, patch, patch]
  x = x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, n * n, -1)
  return x @ kernel.astype(dtype).reshape(kernel.shape[0], -1).T


def _apply(
  config: VisionConfig,
  params: PyTree,
  images: jax.Array,
  *,
  output: str | None = None,
) -> jax.Array:
  """See `vit`."""
  dtype = jnp.dtype(config.dtype)
  if output is None:
    output = "logits" if config.num_classes else "hidden"
  with jax.named_scope("embed"):
    x = embed_patches(config, images, params["patch_embed"], dtype)
    x = x + params["patch_embed_bias"].astype(dtype)
    token = params["class_token"].astype(dtype)
    token = jnp.broadcast_to(token, (x.shape[0], *token.shape[1:]))
    x = jnp.concatenate([token, x], axis=1)
    x = x + params["position_embed"].astype(dtype)
    prompt = params.get("prompt")
    if prompt is not None:
      x = encoder_layers.insert(x, prompt)
    x = sharding.constrain(x, "batch", "sequence", "width")
  x = encoder_layers.run_stack(
    config,
    params["layers"],
    x,
    encoder_layers.attend_to(config.attention_kernel),
    norm_first=True,
    scan_layers=config.scan_layers,
    remat=config.remat,
  )
  with jax.named_scope("head"):
    x = norm(config, encoder_layers.without(x, prompt), params, "final_norm")
    wide = jnp.promote_types(dtype, jnp.float32)
    if output == "hidden":
      return x
    if output == "cls":
      return x[:, 0]
    if output == "mean":
      return jnp.mean(x[:, 1:].astype(wide), axis=1)
    if output == "pooled" and config.pooler:
      return jnp.tanh(dense(x[:, 0], params, "pooler"))
    if output == "logits" and config.num_classes:
      return dense(x[:, 0], params, "classifier").astype(wide)
  raise errors.ConfigError(
    f"output: got {output!r}, but a model with {config.num_classes} classes "
    f"and pooler {config.pooler} does not have it"
  )
