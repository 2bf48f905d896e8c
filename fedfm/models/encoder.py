"""A bidirectional text encoder: BERT, MiniLM, RoBERTa, as pure functions.

Learned positions and token types, LayerNorm after the residual sums, padding
masked out (Devlin et al. 2019, arXiv 1810.04805; Liu et al. 2019, arXiv
1907.11692). `EncoderConfig` says what comes after the layers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import errors, sharding
from fedfm.models import attention, encoder_layers, layers
from fedfm.models import model as model_lib
from fedfm.models.encoder_layers import StackConfig, dense, norm
from fedfm.models.model import Model, ParamSpec

PyTree = Any
HEADS = ("none", "pooled", "dense", "masked_lm")
_KERNELS = (
  *encoder_layers.KERNELS,
  "pooler",
  "classifier_dense",
  "classifier",
  "masked_lm_dense",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(StackConfig):
  """Sizes and options of a text encoder; the defaults are BERT's.

  Attributes:
    vocab_size: Number of token ids.
    max_length: Longest sequence, in tokens.
    num_types: Token types (segments).
    position_offset: Row of the position table that the first token has;
      RoBERTa's is its pad id + 1.
    pad_id: Id of padding; RoBERTa's positions count the tokens that are not it.
    pooler: Whether there is BERT's pooler: tanh of a dense layer on the first
      token.
    head: "none", "pooled" (a classifier on the pooler's output), "dense" (on a
      dense layer and tanh of the first token, RoBERTa's) or "masked_lm".
    num_classes: Classes of the classifier; 0 without one.
    architecture: What `huggingface.save` writes it as.
    dtype: Compute dtype.
    param_dtype: Dtype that `init` draws parameters in.
    scan_layers: Run layers in one `scan` or unrolled.
    remat: "none", "full", "mlp" or "dots"; see `DecoderConfig`.
    attention_kernel: "xla", "cudnn" (GPU), "splash" (TPU), or "auto".
  """

  vocab_size: int
  max_length: int = 512
  num_types: int = 2
  position_offset: int = 0
  pad_id: int | None = 0
  pooler: bool = True
  head: str = "none"
  num_classes: int = 0
  architecture: str = "BertModel"
  dtype: str = "float32"
  param_dtype: str = "float32"
  scan_layers: bool = True
  remat: str = "none"
  attention_kernel: str = "auto"

  def __post_init__(self):
    super().__post_init__()
    encoder_layers.check_positive(self, "vocab_size", "max_length", "num_types")
    encoder_layers.check_choice(self, "remat", encoder_layers.REMAT)
    encoder_layers.check_choice(self, "attention_kernel", attention.KERNELS)
    encoder_layers.check_choice(self, "head", HEADS)
    classifies = self.head in ("pooled", "dense")
    if self.num_classes < 0 or classifies != (self.num_classes > 0):
      raise errors.ConfigError(
        f"model.num_classes: got {self.num_classes} with head {self.head!r}, "
        "expected at least 1 with 'pooled' or 'dense', and 0 with others"
      )
    if self.head == "pooled" and not self.pooler:
      raise errors.ConfigError("model.head: 'pooled' needs model.pooler")
    if self.position_offset and self.pad_id is None:
      raise errors.ConfigError("model.position_offset: needs model.pad_id")


def encoder(config: EncoderConfig) -> Model:
  """Builds the encoder as pure functions.

  `apply(params, tokens, *, mask=None, token_types=None, output=None)` takes
  tokens [batch, seq] and `mask` [batch, seq], true where a token is no padding
  (default: all are). What it returns is by `output`:
    "hidden": [batch, seq, width], the last layer's.
    "mean": [batch, width], their mean over the tokens of the mask.
    "cls": [batch, width], the first token's.
    "pooled": [batch, width], the pooler's.
    "logits": [batch, classes], or [batch, seq, vocab] of a masked-LM head.
  The default is "logits" of a model with a head, else "hidden". Logits and
  means are float32 at least.

  Tokens may be embeddings [batch, seq, width], as `embed_tokens` makes them:
  the seam of soft prompts, which count as tokens of the text. `prompt` [n,
  width] among the parameters is put after the first token (`prompt_tuning`);
  what is returned a token leaves it out.

  Args:
    config: Sizes and options.

  Returns:
    A `Model`.

  Examples:
    >>> model = encoder(EncoderConfig(vocab_size=11, width=8, num_layers=2,
    ...                               num_heads=2, mlp_width=16))
    >>> params = model.init(jax.random.key(0))
    >>> model.apply(params, jnp.zeros((3, 5), jnp.int32), output="mean").shape
    (3, 8)
  """
  apply = functools.partial(_apply, config)
  return model_lib.from_specs(_specs(config), apply, config, _KERNELS)


def _specs(config: EncoderConfig) -> PyTree:
  """Declares every parameter, once."""
  c, d = config, config.width

  def table(rows, axis=None):
    return ParamSpec((rows, d), (axis, "table_width"), 0.02)

  specs: dict[str, Any] = {
    "embed": table(c.vocab_size, "vocab"),
    "position_embed": table(c.max_length + c.position_offset),
    "type_embed": table(c.num_types),
    **encoder_layers.norm_specs("embed_norm", d),
    "layers": encoder_layers.stack_specs(c),
  }
  square = functools.partial(
    encoder_layers.dense_specs, rows=d, cols=d, axes=("embed", None)
  )
  if c.pooler:
    specs |= square("pooler")
  if c.head == "dense":
    specs |= square("classifier_dense")
  if c.num_classes:
    specs |= encoder_layers.dense_specs(
      "classifier", d, c.num_classes, ("embed", None)
    )
  if c.head == "masked_lm":
    specs |= square("masked_lm_dense")
    specs |= encoder_layers.norm_specs("masked_lm_norm", d)
    specs["masked_lm_bias"] = ParamSpec((c.vocab_size,), ("vocab",))
  return specs


def embed_tokens(
  config: EncoderConfig, params: PyTree, tokens: jax.Array
) -> jax.Array:
  """Looks tokens up, without positions and types.

  Args:
    config: The encoder's.
    params: Its parameters.
    tokens: [batch, seq] integers.

  Returns:
    [batch, seq, width] in the compute dtype.
  """
  table = sharding.constrain(params["embed"], "vocab", None)
  return table[tokens].astype(jnp.dtype(config.dtype))


def _positions(config: EncoderConfig, tokens: jax.Array) -> jax.Array:
  """Rows of the position table, [1 or batch, seq]."""
  if config.position_offset and tokens.ndim == 2:
    assert config.pad_id is not None  # As the config has checked.
    # Padding has the row before the first.
    there = jnp.not_equal(tokens, config.pad_id).astype(jnp.int32)
    return jnp.cumsum(there, axis=1) * there + config.position_offset - 1
  return jnp.arange(tokens.shape[1])[None] + config.position_offset


def _apply(
  config: EncoderConfig,
  params: PyTree,
  tokens: jax.Array,
  *,
  mask: jax.Array | None = None,
  token_types: jax.Array | None = None,
  output: str | None = None,
) -> jax.Array:
  """See `encoder`."""
  prompt = params.get("prompt")
  length = tokens.shape[1] + (0 if prompt is None else len(prompt))
  if length > config.max_length:
    raise errors.ConfigError(
      f"tokens: a sequence of {length}, but the model's longest is "
      f"{config.max_length}"
    )
  if output is None:
    output = "hidden" if config.head == "none" else "logits"
  tokens = jnp.asarray(tokens)
  dtype = jnp.dtype(config.dtype)
  with jax.named_scope("embed"):
    is_ids = tokens.ndim == 2
    x = embed_tokens(config, params, tokens) if is_ids else tokens.astype(dtype)
    types = 0 if token_types is None else token_types
    if prompt is not None:
      x = encoder_layers.insert(x, prompt)
      # Positions are those of a word, which is no padding.
      word = 0 if config.pad_id is None else config.pad_id + 1
      places = jnp.full((len(prompt), *tokens.shape[2:]), word, tokens.dtype)
      tokens = encoder_layers.insert(tokens, places)
      if mask is not None:
        mask = encoder_layers.insert(jnp.asarray(mask), jnp.ones(len(prompt)))
      if token_types is not None:
        types = encoder_layers.insert(
          jnp.asarray(types), jnp.zeros(len(prompt))
        )
    x = x + params["position_embed"][_positions(config, tokens)].astype(dtype)
    x = x + params["type_embed"][types].astype(dtype)
    x = norm(config, x, params, "embed_norm")
    x = sharding.constrain(x, "batch", "sequence", "width")
  x = encoder_layers.run_stack(
    config,
    params["layers"],
    x,
    encoder_layers.attend_to(config.attention_kernel, mask),
    norm_first=False,
    scan_layers=config.scan_layers,
    remat=config.remat,
  )
  with jax.named_scope("head"):
    found = _output(config, params, x, mask, output)
  # [batch, ...] is of a whole text.
  return encoder_layers.without(found, prompt) if found.ndim == 3 else found


def _output(config, params, x, mask, output) -> jax.Array:
  """Makes of the last layer's x [batch, seq, width] what was asked for."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  if output == "hidden":
    return x
  if output == "mean":
    there = jnp.ones(x.shape[:2], wide)
    if mask is not None:
      there = jnp.asarray(mask).astype(wide)
    total = jnp.einsum("bsd,bs->bd", x.astype(wide), there)
    return total / jnp.maximum(there.sum(axis=1, keepdims=True), 1)
  first = x[:, 0]
  if output == "cls":
    return first
  if output == "pooled" and config.pooler:
    return _pooled(params, first)
  if output != "logits" or config.head == "none":
    raise errors.ConfigError(
      f"output: got {output!r}, but a model with head {config.head!r} and "
      f"pooler {config.pooler} does not have it"
    )
  if config.head == "masked_lm":
    x = layers.ACTIVATIONS[config.activation](
      dense(x, params, "masked_lm_dense")
    )
    x = norm(config, x, params, "masked_lm_norm")
    logits = x @ params["embed"].astype(x.dtype).T
    return logits.astype(wide) + params["masked_lm_bias"].astype(wide)
  if config.head == "pooled":
    first = _pooled(params, first)
  else:
    first = jnp.tanh(dense(first, params, "classifier_dense"))
  return dense(first, params, "classifier").astype(wide)


def _pooled(params: PyTree, first: jax.Array) -> jax.Array:
  return jnp.tanh(dense(first, params, "pooler"))
