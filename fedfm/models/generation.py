"""Generates tokens with a key/value cache, a batch at a time."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedfm import errors, sharding

PyTree = Any


class Generation(NamedTuple):
  """What was generated.

  Attributes:
    tokens: [batch, max_new_tokens] int32; past a row's end `eos` is repeated,
      the first where there are several.
    lengths: [batch] int32, tokens generated, the one that ended the row
      included.
  """

  tokens: jax.Array
  lengths: jax.Array


class _Sampling(NamedTuple):
  temperature: float
  top_k: int | None
  top_p: float | None


def generate(
  apply: Callable[..., Any],
  init_cache: Callable[[int, int], PyTree],
  params: tuple[PyTree, ...],
  prompts: jax.Array | np.ndarray,
  *,
  max_new_tokens: int,
  prompt_lengths: jax.Array | np.ndarray | None = None,
  key: jax.Array | None = None,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  eos: int | Sequence[int] | None = None,
) -> Generation:
  """Continues prompts, all rows in step by position.

  One pass fills the cache, then one loop makes a token a step. Prompts of
  different lengths start from the shortest: a row still inside its prompt is
  fed its own next token, so no row ever attends to padding. The loop ends when
  every row has. A row's tokens do not depend on the other rows.

  Compiled once for each `apply` (by identity: pass the same object again),
  shape of `prompts` and set of options; of `eos`, their number only.

  Args:
    apply: `apply(*params, tokens, positions=, cache=) -> (logits, cache)`, such
      as `model.apply` or `adapter.apply`.
    init_cache: `init_cache(batch, length) -> cache`, such as
      `model.init_cache`; a dict whose "index" counts the positions filled.
    params: Leading arguments of `apply`: `(params,)`, or `(params, trainable)`
      with an adapter.
    prompts: [batch, seq] integers; each row's prompt, then anything.
    max_new_tokens: Tokens to generate a row.
    prompt_lengths: [batch], tokens of each prompt; default all of `seq`.
    key: A typed PRNG key; needed when `temperature` is above 0.
    temperature: Divides the logits; 0 takes the most likely token.
    top_k: Sample among the k most likely tokens only.
    top_p: Sample among the fewest most likely tokens whose probabilities reach
      p only (arXiv 1904.09751).
    eos: A row ends after this token, or after any of these.

  Returns:
    A `Generation`.

  Raises:
    ConfigError: An option out of range.
    DataError: Prompts that are empty or outside the vocabulary.
  """
  prompts = np.asarray(prompts)
  if prompts.ndim != 2 or 0 in prompts.shape:
    raise errors.DataError(
      f"prompts: got shape {prompts.shape}, expected [batch, seq], not empty"
    )
  batch, seq = prompts.shape
  lengths = np.full((batch,), seq)
  if prompt_lengths is not None:
    lengths = np.asarray(prompt_lengths)
  if lengths.shape != (batch,) or lengths.min() < 1 or lengths.max() > seq:
    raise errors.DataError(
      f"prompt_lengths: got {lengths.tolist()}, expected {batch} numbers in "
      f"[1, {seq}]"
    )
  prompts = np.where(np.arange(seq) < lengths[:, None], prompts, 0)
  cache = jax.eval_shape(functools.partial(init_cache, batch, seq))
  logits, _ = jax.eval_shape(
    apply, *params, prompts, positions=prompts, cache=cache
  )
  vocab = logits.shape[-1]
  if prompts.min() < 0 or prompts.max() >= vocab:
    raise errors.DataError(
      f"prompts: tokens lie in [{prompts.min()}, {prompts.max()}], the "
      f"vocabulary is [0, {vocab - 1}]"
    )
  for name, value, ok, expected in (
    ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
    ("temperature", temperature, temperature >= 0, "0 or more"),
    ("top_k", top_k, top_k is None or 1 <= top_k <= vocab, f"1 to {vocab}"),
    ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0, up to 1"),
    ("key", key, key is not None or temperature == 0, "a key to sample with"),
  ):
    if not ok:
      raise errors.ConfigError(f"{name}: got {value}, expected {expected}")
  stops = np.atleast_1d(np.asarray([] if eos is None else eos))
  for stop in stops.tolist():
    if not 0 <= stop < vocab:
      raise errors.ConfigError(f"eos: got {stop}, expected 0 to {vocab - 1}")
  return _run(
    apply,
    init_cache,
    max_new_tokens,
    _Sampling(temperature, top_k, top_p),
    params,
    jnp.asarray(prompts, jnp.int32),
    jnp.asarray(lengths, jnp.int32),
    jnp.asarray(stops, jnp.int32),
    jax.random.key(0) if key is None else key,
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(
  apply,
  init_cache,
  max_new_tokens,
  sampling,
  params,
  prompts,
  lengths,
  stops,
  key,
) -> Generation:
  """See `generate`; everything is valid here."""
  batch, seq = prompts.shape
  cache = init_cache(batch, seq + max_new_tokens)
  if seq > 1:
    # The last prompt token is the loop's first, so that logits of the prompt,
    # [batch, seq, vocab], are never made. Slots past the shortest prompt are
    # written again by the loop before they are read.
    positions = jnp.broadcast_to(jnp.arange(seq - 1), (batch, seq - 1))
    _, cache = apply(*params, prompts[:, :-1], positions=positions, cache=cache)
  shortest = jnp.min(lengths)
  cache = cache | {"index": shortest - 1}
  ends = lengths + max_new_tokens
  buffer = jnp.pad(prompts, ((0, 0), (0, max_new_tokens)))
  keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(batch))

  def unfinished(carry):
    return ~jnp.all(carry[2] <= carry[0])

  def step(carry):
    position, buffer, ends, cache = carry
    current = jax.lax.dynamic_slice_in_dim(buffer, position - 1, 1, axis=1)
    positions = jnp.full((batch, 1), position - 1)
    logits, cache = apply(*params, current, positions=positions, cache=cache)
    step_keys = jax.vmap(jax.random.fold_in)(keys, position - lengths)
    new = _sample(sampling, logits[:, -1], step_keys)
    old = jax.lax.dynamic_index_in_dim(buffer, position, 1, keepdims=False)
    growing = (position >= lengths) & (position < ends)
    new = jnp.where(growing, new, old)
    buffer = jax.lax.dynamic_update_index_in_dim(buffer, new, position, 1)
    stopped = jnp.any(new[:, None] == stops, axis=-1)
    ends = jnp.where(growing & stopped, position + 1, ends)
    return position + 1, buffer, ends, cache

  _, buffer, ends, _ = jax.lax.while_loop(
    unfinished, step, (shortest, buffer, ends, cache)
  )
  columns = lengths[:, None] + jnp.arange(max_new_tokens)
  tokens = jnp.take_along_axis(buffer, columns, axis=1)
  fill = stops[0] if stops.size else 0
  tokens = jnp.where(columns < ends[:, None], tokens, fill)
  return sharding.replicated(Generation(tokens, ends - lengths))


def _sample(sampling: _Sampling, logits: jax.Array, keys: jax.Array):
  """Chooses a token per row from logits [batch, vocab] and keys [batch]."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / sampling.temperature
  if sampling.top_k is not None:
    floor = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
    logits = jnp.where(logits < floor, -jnp.inf, logits)
  if sampling.top_p is not None:
    ordered = jnp.sort(logits, axis=-1, descending=True)
    weights = jax.nn.softmax(ordered, axis=-1)
    # A token stays if those before it have not reached p yet.
    before = jnp.cumsum(weights, axis=-1) - weights
    kept = jnp.where(before < sampling.top_p, ordered, jnp.inf)
    floor = jnp.min(kept, axis=-1, keepdims=True)
    logits = jnp.where(logits < floor, -jnp.inf, logits)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
