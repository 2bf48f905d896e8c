"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): virtual tokens.

Their embeddings are trained and come before the text. As attention is causal,
what they are in every layer does not depend on the text: they run through the
model once for a client, not once for each of its rows, and the text attends to
the keys and values that this gives.

An encoder's text begins with a token that stands for all of it, and CLIP's with
a start: there, virtual tokens come after the first (CoOp, Zhou et al. 2022,
arXiv 2109.01134; VPT-shallow, Jia et al. 2022, arXiv 2203.12119), once a row.
"""

import jax

from fedfm import errors
from fedfm.adapters import adapter as adapter_lib
from fedfm.adapters.adapter import Adapter, trainable_dtype
from fedfm.models.clip import CLIPConfig
from fedfm.models.decoder import embed_tokens
from fedfm.models.encoder import EncoderConfig
from fedfm.models.model import Model
from fedfm.models.vision import VisionConfig


def prompt_tuning(model: Model, *, num_tokens: int = 16) -> Adapter:
  """Trains the embeddings of virtual tokens before the text.

  Args:
    model: A decoder; or an encoder, a vision transformer or CLIP (its texts).
    num_tokens: Virtual tokens; positions count from the first of them.

  Returns:
    An `Adapter` whose trainable is {"prompt": [num_tokens, width]}, at the
    start the embeddings of tokens drawn from the vocabulary. Where the model
    stretches positions with the length of the text, those of the prompt are a
    short text's. An image's start as noise.

  Raises:
    ConfigError: A model that is none of these, or fewer than 1 token.
  """
  if isinstance(model.config, EncoderConfig | VisionConfig | CLIPConfig):
    return _after_the_first(model, num_tokens)
  check_decoder(model, num_tokens, "prompt_tuning")

  def init(key, params):
    ids = jax.random.randint(key, (num_tokens,), 0, params["embed"].shape[0])
    embedded = embed_tokens(model.config, params, ids)
    return {"prompt": embedded.astype(trainable_dtype(params["embed"].dtype))}

  def bind(params, trainable):
    prefix = keys_and_values(model, params, trainable["prompt"][None])
    return with_prefix(params, prefix)

  return adapter_lib.make_adapter(
    model,
    init=init,
    bind=bind,
    merge=None,
    kind="prompt_tuning",
    config={"num_tokens": num_tokens},
  )


def _after_the_first(model: Model, num_tokens: int) -> Adapter:
  """Prompt tuning of what has no cache of keys and values."""
  check_num_tokens(model, num_tokens)
  tower = "text" if isinstance(model.config, CLIPConfig) else None

  def init(key, params):
    params = params if tower is None else params[tower]
    if "embed" in params:
      return {"prompt": words(key, params["embed"], num_tokens)}
    position = params["position_embed"]
    shape = (num_tokens, position.shape[-1])
    dtype = trainable_dtype(position.dtype)
    return {"prompt": 0.02 * jax.random.normal(key, shape, dtype)}

  def bind(params, trainable):
    if tower is None:
      return {**params, **trainable}
    return {**params, tower: {**params[tower], **trainable}}

  return adapter_lib.make_adapter(
    model,
    init=init,
    bind=bind,
    merge=None,
    kind="prompt_tuning",
    config={"num_tokens": num_tokens},
  )


def words(key: jax.Array, table: jax.Array, num_tokens: int) -> jax.Array:
  """Embeddings [num_tokens, width] of tokens drawn from the vocabulary."""
  ids = jax.random.randint(key, (num_tokens,), 0, table.shape[0])
  return table[ids].astype(trainable_dtype(table.dtype))


def check_num_tokens(model: Model, num_tokens: int) -> None:
  """Refuses prompts without tokens, or that leave a text no room."""
  longest = getattr(model.config, "max_length", None)
  most = None if longest is None else longest - 1
  if num_tokens < 1 or (most is not None and num_tokens > most):
    allowed = "at least 1" if most is None else f"1 to {most}"
    raise errors.ConfigError(
      f"num_tokens: got {num_tokens}, expected {allowed}"
    )


def check_decoder(model: Model, num_tokens: int, kind: str) -> None:
  """Refuses a model without keys and values, and prompts without tokens.

  Args:
    model: The model.
    num_tokens: Virtual tokens.
    kind: The adapter, for the message.

  Raises:
    ConfigError: See above.
  """
  if model.init_cache is None:
    raise errors.ConfigError(
      f"adapter.kind: {kind!r} needs a decoder with a key/value cache"
    )
  check_num_tokens(model, num_tokens)


def keys_and_values(model: Model, params, tokens: jax.Array) -> dict:
  """Returns what text attends to where `tokens` come before it.

  Args:
    model: A decoder.
    params: Its parameters.
    tokens: [1, prefix] token ids, or embeddings [1, prefix, width].

  Returns:
    {"key", "value"}, each [layers, prefix, kv_heads, head_dim].
  """
  assert model.init_cache is not None
  cache = model.init_cache(1, tokens.shape[1])
  _, cache = model.apply(params, tokens, cache=cache, output="hidden")
  return {name: cache[name][:, 0] for name in ("key", "value")}


def with_prefix(params, prefix: dict) -> dict:
  """Puts keys and values before those of the text."""
  return {**params, "layers": {**params["layers"], "prefix": prefix}}
