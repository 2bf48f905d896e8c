"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190): keys and values."""

import jax

from fedfm.adapters import adapter as adapter_lib
from fedfm.adapters.adapter import Adapter, trainable_dtype
from fedfm.adapters.prompt_tuning import (
  check_decoder,
  keys_and_values,
  with_prefix,
)
from fedfm.models.model import Model


def prefix_tuning(model: Model, *, num_tokens: int = 16) -> Adapter:
  """Trains keys and values that every layer's attention sees before the text.

  Args:
    model: A decoder.
    num_tokens: Virtual tokens; positions count from the first of them.

  Returns:
    An `Adapter` whose trainable is {"key", "value"}, each [layers, num_tokens,
    kv_heads, head_dim], after positions were applied. At the start they are
    those of tokens drawn from the vocabulary (the paper's section 7.4: real
    activations, not noise).

  Raises:
    ConfigError: A model that is no decoder, or fewer than 1 token.
  """
  check_decoder(model, num_tokens, "prefix_tuning")

  def init(key, params):
    vocab_size = params["embed"].shape[0]
    tokens = jax.random.randint(key, (1, num_tokens), 0, vocab_size)
    dtype = trainable_dtype(params["embed"].dtype)
    start = keys_and_values(model, params, tokens)
    return jax.tree.map(lambda x: x.astype(dtype), start)

  return adapter_lib.make_adapter(
    model,
    init=init,
    bind=with_prefix,
    merge=None,
    kind="prefix_tuning",
    config={"num_tokens": num_tokens},
  )
