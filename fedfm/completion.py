"""Text in, text out: continues a prompt with a model, adapted or not."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from fedfm import errors
from fedfm.data import instructions
from fedfm.data.prompt_formats import PromptFormat
from fedfm.data.tokenizers import Tokenizer, special_pattern
from fedfm.models import generation
from fedfm.models.model import Model

PyTree = Any


def generate_text(
  model: Model,
  params: tuple[PyTree, ...],
  tokenizer: Tokenizer,
  prompt: str,
  *,
  max_new_tokens: int,
  seed: int = 0,
  apply: Callable[..., Any] | None = None,
  prompt_format: PromptFormat | None = None,
  **sampling: Any,
) -> str:
  """Continues a text.

  Args:
    model: The model, with a key/value cache.
    params: Leading arguments of `apply`.
    tokenizer: The tokenizer that the model was trained with.
    prompt: The text to continue; may be empty.
    max_new_tokens: Most tokens to add; what ends a text ends earlier.
    seed: Of the sampling, in [0, 2**32).
    apply: Default `model.apply`; with an adapter, `adapter.apply` and
      `params = (base, trainable)`.
    prompt_format: How the prompt is written for the model; default as it is.
    **sampling: `temperature`, `top_k` and `top_p` of `generation.generate`.

  Returns:
    What was added, without the prompt.

  Raises:
    ConfigError: An option out of range, or more tokens than the model's
      longest sequence.
    DataError: A vocabulary smaller than the tokenizer's.
  """
  if not 0 <= seed < 2**32:
    raise errors.ConfigError(f"seed: got {seed}, expected 0 <= seed < 2**32")
  if tokenizer.vocab_size > model.config.vocab_size:
    raise errors.DataError(
      f"model: vocabulary of {model.config.vocab_size} is smaller than "
      f"the tokenizer's {tokenizer.vocab_size}"
    )
  tokens = prompt_tokens(tokenizer, prompt, prompt_format)
  longest = model.config.max_length
  if len(tokens) + max_new_tokens > longest:
    raise errors.ConfigError(
      f"max_new_tokens: got {max_new_tokens} after a prompt of {len(tokens)} "
      f"tokens, but the model's longest sequence is {longest}"
    )
  end = ending(tokenizer, prompt_format)
  generated = generation.generate(
    apply or model.apply,
    cast("Callable[..., PyTree]", model.init_cache),
    params,
    tokens[None],
    max_new_tokens=max_new_tokens,
    key=jax.random.key(seed),
    eos=end.ids,
    **sampling,
  )
  length = int(generated.lengths[0])
  added = end.without(np.asarray(generated.tokens[0, :length]))
  # Decoded as one text: a piece may be written otherwise at its start.
  before, text = (
    tokenizer.decode(x) for x in (tokens, np.concatenate([tokens, added]))
  )
  whole = text.startswith(before)
  return end.cut(
    text.removeprefix(before) if whole else tokenizer.decode(added)
  )


class Ending(NamedTuple):
  """What ends a generated text.

  Attributes:
    ids: Tokens, each of which does; the tokenizer's `eos` first.
    text: What does where no token is it; "" where one is.
  """

  ids: tuple[int, ...]
  text: str

  def without(self, tokens: np.ndarray) -> np.ndarray:
    """Drops the token that ended them, where one did."""
    return tokens[:-1] if len(tokens) and tokens[-1] in self.ids else tokens

  def cut(self, text: str) -> str:
    """Drops the text that ends and what the model went on with."""
    return text.partition(self.text)[0] if self.text else text


def ending(
  tokenizer: Tokenizer, prompt_format: PromptFormat | None = None
) -> Ending:
  """Finds what ends a text: where the training of a format taught it.

  Args:
    tokenizer: Its `eos`, `stops` and `specials` are looked at.
    prompt_format: How the prompt is written, or None.

  Returns:
    The `Ending`.

  Examples:
    >>> from fedfm.data import byte_tokenizer, prompt_formats
    >>> chatml = prompt_formats.builtin("chatml")
    >>> ending(byte_tokenizer(), chatml)
    Ending(ids=(257,), text='<|im_end|>')
    >>> ending(byte_tokenizer()._replace(specials={"<|im_end|>": 260}), chatml)
    Ending(ids=(257, 260), text='')
  """
  ids, text = [tokenizer.eos, *tokenizer.stops], ""
  if prompt_format is not None:
    text = prompt_format.end
    if found := special_pattern(tokenizer).search(text):
      ids.append(tokenizer.specials[found[0]])
      text = text[: found.start()]
  return Ending(tuple(dict.fromkeys(ids)), text.strip())


def check_decoder(model: Model, tokenizer: Tokenizer | None) -> Tokenizer:
  """Refuses a model that continues no text.

  Args:
    model: Any.
    tokenizer: Its own, or None.

  Returns:
    The tokenizer.

  Raises:
    ConfigError: It is no decoder, or has no tokenizer.
  """
  if tokenizer is None or model.init_cache is None:
    raise errors.ConfigError(
      f"model: a {type(model.config).__name__} generates no text, expected a "
      "decoder"
    )
  return tokenizer


def prompt_tokens(
  tokenizer: Tokenizer, prompt: str, prompt_format: PromptFormat | None = None
) -> np.ndarray:
  """Encodes a prompt, as it is or as a format writes it.

  Args:
    tokenizer: What encodes.
    prompt: The text.
    prompt_format: How to write it, or None.

  Returns:
    int32 [tokens], a start token first.
  """
  if prompt_format is None:
    return np.asarray([tokenizer.bos, *tokenizer.encode(prompt)], np.int32)
  # What is before a response does not depend on it.
  before, _ = prompt_format.render(prompt, "", "response")
  return instructions.encode_prompt(tokenizer, prompt_format, before)
