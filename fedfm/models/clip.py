"""CLIP (Radford et al. 2021, arXiv 2103.00020): images and texts in one space.

Two towers of pre-norm layers, a causal one over tokens and one over patches;
each ends in a projection to the same space.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import errors, sharding
from fedfm.models import (
  attention,
  encoder_layers,
  field_types,
  layers,
  vision,
)
from fedfm.models import model as model_lib
from fedfm.models.encoder_layers import StackConfig, norm
from fedfm.models.model import Model, ParamSpec

PyTree = Any
_KERNELS = (*encoder_layers.KERNELS, "projection")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig:
  """Sizes and options of CLIP.

  Attributes:
    text: The text tower.
    image: The image tower.
    projection_width: Size of the shared space.
    vocab_size: Number of token ids.
    max_length: Longest text, in tokens.
    eos_id: Id of the token that ends a text, whose first place is the text's
      embedding; None is the place of the highest id (OpenAI's files).
    image_size: Height and width of an image, in pixels.
    patch_size: Height and width of a patch.
    num_channels: Channels of an image.
    logit_scale: Logarithm of the scale that `init` gives to similarities.
    architecture: What `huggingface.save` writes it as.
    dtype: Compute dtype.
    param_dtype: Dtype that `init` draws parameters in.
    scan_layers: Run layers in one `scan` or unrolled.
    remat: "none", "full", "mlp" or "dots"; see `DecoderConfig`.
    attention_kernel: "xla", "cudnn" (GPU), "splash" (TPU), or "auto".
  """

  text: StackConfig
  image: StackConfig
  projection_width: int = 512
  vocab_size: int = 49408
  max_length: int = 77
  eos_id: int | None = 49407
  image_size: int = 224
  patch_size: int = 32
  num_channels: int = 3
  logit_scale: float = 2.6592
  architecture: str = "CLIPModel"
  dtype: str = "float32"
  param_dtype: str = "float32"
  scan_layers: bool = True
  remat: str = "none"
  attention_kernel: str = "auto"

  def __post_init__(self):
    field_types.check(self)
    encoder_layers.check_positive(
      self, "projection_width", "vocab_size", "max_length"
    )
    encoder_layers.check_choice(self, "remat", encoder_layers.REMAT)
    encoder_layers.check_choice(self, "attention_kernel", attention.KERNELS)
    vision.check_image(self)
    eos = self.eos_id
    if eos is not None and not 0 <= eos < self.vocab_size:
      raise errors.ConfigError(
        f"model.eos_id: got {eos}, expected 0 to {self.vocab_size - 1}"
      )


def clip(config: CLIPConfig) -> Model:
  """Builds CLIP as pure functions.

  `apply(params, tokens=None, images=None, *, mask=None, ends=None,
  output="logits")` takes texts [texts, seq], with `mask` [texts, seq] false
  where a token is padding, and images [images, size, size, channels]. `output`:
    "logits": [texts, images] in float32 at least, the scaled cosines.
    "text", "image": [texts or images, projection_width], not normalised.

  Tokens may be embeddings [texts, seq, width]; then `ends` [texts] says where
  each text ends. `prompt` [n, width] among a tower's parameters is put after
  the first token of a text (CoOp, arXiv 2109.01134) or image (MaPLe, arXiv
  2210.03117), where an image's has no positions.

  Args:
    config: Sizes and options.

  Returns:
    A `Model`.

  Examples:
    >>> sizes = StackConfig(width=8, num_layers=1, num_heads=2, mlp_width=16,
    ...                     activation="quick_gelu")
    >>> model = clip(CLIPConfig(text=sizes, image=sizes, projection_width=4,
    ...                         vocab_size=11, eos_id=10, image_size=8,
    ...                         patch_size=4))
    >>> params = model.init(jax.random.key(0))
    >>> texts = jnp.array([[1, 10], [2, 10]])
    >>> model.apply(params, texts, jnp.zeros((3, 8, 8, 3))).shape
    (2, 3)
  """
  apply = functools.partial(_apply, config)
  return model_lib.from_specs(_specs(config), apply, config, _KERNELS)


def _specs(config: CLIPConfig) -> PyTree:
  """Declares every parameter, once."""
  c = config

  def table(rows, width, axis=None):
    return ParamSpec((rows, width), (axis, "table_width"), 0.02)

  def projection(width):
    shape = (width, c.projection_width)
    return ParamSpec(shape, ("embed", None), width**-0.5)

  text = {
    "embed": table(c.vocab_size, c.text.width, "vocab"),
    "position_embed": table(c.max_length, c.text.width),
    "layers": encoder_layers.stack_specs(c.text),
    **encoder_layers.norm_specs("final_norm", c.text.width),
    "projection": projection(c.text.width),
  }
  image = {
    "class_token": ParamSpec((c.image.width,), ("norm",), 0.02),
    "position_embed": table(1 + vision.num_patches(c), c.image.width),
    "patch_embed": vision.patch_spec(c, c.image.width),
    **encoder_layers.norm_specs("embed_norm", c.image.width),
    "layers": encoder_layers.stack_specs(c.image),
    **encoder_layers.norm_specs("final_norm", c.image.width),
    "projection": projection(c.image.width),
  }
  scale = ParamSpec((), (), fill=c.logit_scale)
  return {"text": text, "image": image, "logit_scale": scale}


def embed_tokens(
  config: CLIPConfig, params: PyTree, tokens: jax.Array
) -> jax.Array:
  """Looks tokens [texts, seq] up: [texts, seq, width], without positions."""
  table = sharding.constrain(params["text"]["embed"], "vocab", None)
  return table[tokens].astype(jnp.dtype(config.dtype))


def _ends(config: CLIPConfig, tokens: jax.Array) -> jax.Array:
  """Where texts end, [texts]."""
  if tokens.ndim == 3:
    raise errors.ConfigError("ends: texts given as embeddings need it")
  if config.eos_id is None:
    return jnp.argmax(tokens, axis=1)
  return jnp.argmax(tokens == config.eos_id, axis=1)


def _run(config, tower, params, x, attend):
  return encoder_layers.run_stack(
    tower,
    params["layers"],
    x,
    attend,
    norm_first=True,
    scan_layers=config.scan_layers,
    remat=config.remat,
  )


def _embed_text(config, params, tokens, mask, ends) -> jax.Array:
  """The text tower: [texts, projection_width]."""
  prompt = params["text"].get("prompt")
  seq = tokens.shape[1] + (0 if prompt is None else len(prompt))
  if seq > config.max_length:
    raise errors.ConfigError(
      f"tokens: a sequence of {seq}, but the model's longest is "
      f"{config.max_length}"
    )
  dtype = jnp.dtype(config.dtype)
  ends = _ends(config, tokens) if ends is None else ends
  if tokens.ndim == 3:
    x = tokens.astype(dtype)
  else:
    x = embed_tokens(config, params, tokens)
  params = params["text"]
  if prompt is not None:
    x, ends = encoder_layers.insert(x, prompt), ends + len(prompt)
    if mask is not None:
      mask = encoder_layers.insert(jnp.asarray(mask), jnp.ones(len(prompt)))
  x = x + params["position_embed"][:seq].astype(dtype)
  x = sharding.constrain(x, "batch", "sequence", "width")
  # A token sees those before it that are no padding; padding sees padding.
  segments = None if mask is None else jnp.asarray(mask).astype(jnp.int32)
  attend = functools.partial(
    attention.causal_attention,
    segment_ids=segments,
    kernel=config.attention_kernel,
  )
  x = _run(config, config.text, params, x, attend)
  x = norm(config.text, x, params, "final_norm")
  last = jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0]
  return layers.dense(last, params["projection"])


def _embed_image(config, params, images) -> jax.Array:
  """The image tower: [images, projection_width]."""
  dtype, params = jnp.dtype(config.dtype), params["image"]
  x = vision.embed_patches(config, images, params["patch_embed"], dtype)
  token = params["class_token"].astype(dtype)
  token = jnp.broadcast_to(token, (x.shape[0], 1, token.shape[0]))
  x = jnp.concatenate([token, x], axis=1)
  x = x + params["position_embed"].astype(dtype)
  if "prompt" in params:
    x = encoder_layers.insert(x, params["prompt"])
  x = norm(config.image, x, params, "embed_norm")
  x = sharding.constrain(x, "batch", "sequence", "width")
  attend = encoder_layers.attend_to(config.attention_kernel)
  x = _run(config, config.image, params, x, attend)
  first = norm(config.image, x[:, 0], params, "final_norm")
  return layers.dense(first, params["projection"])


def _unit(x: jax.Array) -> jax.Array:
  """Normalises rows, in float32 at least."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  # A row of zeros stays zero, and its gradient finite.
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def _apply(
  config: CLIPConfig,
  params: PyTree,
  tokens: jax.Array | None = None,
  images: jax.Array | None = None,
  *,
  mask: jax.Array | None = None,
  ends: jax.Array | None = None,
  output: str = "logits",
) -> jax.Array:
  """See `clip`."""
  known = {"logits": (tokens, images), "text": (tokens,), "image": (images,)}
  if output not in known or any(x is None for x in known[output]):
    raise errors.ConfigError(
      f"output: got {output!r}, expected 'logits' of tokens and images, 'text'"
      " of tokens or 'image' of images"
    )

  def text_tower():
    with jax.named_scope("text"):
      return _embed_text(config, params, jnp.asarray(tokens), mask, ends)

  def image_tower():
    with jax.named_scope("image"):
      return _embed_image(config, params, images)

  if output != "logits":
    return text_tower() if output == "text" else image_tower()
  text, image = _unit(text_tower()), _unit(image_tower())
  scale = jnp.exp(params["logit_scale"].astype(text.dtype))
  return scale * (text @ image.T)
