"""Losses with the signature `loss(trainable, base, batch, key)`.

A batch is `{name: array [batch, ...], "mask": [batch]}`; language models read
`tokens` [batch, seq] and `loss_mask` [batch, seq], which marks the tokens to be
predicted (each from those before it, so position 0 never counts). Rows that
hold several examples have `segment_ids` and `positions` [batch, seq] too, and
`num_bytes` [batch] says how much text the predicted tokens of a row stand for.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import errors, trees

PyTree = Any
_PLACES = ("positions", "segment_ids")
LossFn = Callable[..., tuple[jax.Array, PyTree]]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Negative log-likelihood of integer labels, in nats.

  Args:
    logits: [..., classes].
    labels: [...] integers.

  Returns:
    [...], in the dtype of `logits`.
  """
  top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  log_sum = jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1))
  # From the logits: a pick from their difference would have it written out.
  picked = jnp.take_along_axis(logits, labels[..., None], axis=-1) - top
  return log_sum - picked[..., 0]


def language_model(
  apply: Callable[..., jax.Array],
  *,
  unembed: Callable[..., Any] | None = None,
  chunk: int = 0,
) -> LossFn:
  """Mean next-token loss over the tokens that `loss_mask` and `mask` mark.

  With a chunk, logits exist for that many tokens at a time, forward and
  backward: [batch, chunk / batch, vocab] and never [batch, seq, vocab]. The
  backward pass computes them again, one more product with the head.

  Args:
    apply: `apply(trainable, base, tokens) -> logits [batch, seq, vocab]`; see
      `fedfm.adapters` for the three usual ones. Called with `positions` and
      `segment_ids` too where a batch has them.
    unembed: `unembed(trainable, base) -> (hidden [..., width] -> logits [...,
      vocab])`, such as `adapters.loss_unembed`; read where `chunk` is not 0,
      and then `apply` is called with `output="hidden"`.
    chunk: Tokens whose logits exist at once, over the rows of a batch (at least
      one a row); 0 for all of them.

  Returns:
    `loss(trainable, base, batch, key) -> (nats per token, aux)` with
    `aux = {"tokens", "loss_sum", "correct"}`, sums over the batch, and "bytes"
    where it has `num_bytes`. A batch without a token to predict has loss 0, and
    gradient 0.

  Raises:
    ConfigError: A negative chunk, or one without `unembed`.
  """
  if chunk < 0:
    raise errors.ConfigError(f"loss_chunk: got {chunk}, expected at least 0")
  if chunk and unembed is None:
    raise errors.ConfigError(
      f"loss_chunk: got {chunk}, but the model has no unembed apart from its "
      "apply; expected 0"
    )

  def plain(trainable, base, tokens, mask, places):
    logits = apply(trainable, base, tokens, **places)[:, :-1]
    with jax.named_scope("loss"):
      return _sums(logits, tokens[:, 1:], mask)

  def chunked(trainable, base, tokens, mask, places):
    assert unembed is not None
    hidden = apply(trainable, base, tokens, output="hidden", **places)
    with jax.named_scope("loss"):
      # The last position predicts nothing: lengths stay round, it is masked.
      labels = jnp.roll(tokens, -1, axis=1)
      mask = jnp.pad(mask, ((0, 0), (0, 1)))
      positions = max(1, chunk // tokens.shape[0])
      return _sums_in_chunks(
        unembed(trainable, base), hidden, labels, mask, positions
      )

  def loss_fn(trainable, base, batch, key):
    del key
    tokens = jnp.asarray(batch["tokens"])
    mask = batch["loss_mask"][:, 1:] * batch["mask"][:, None]
    # As many tokens as the chunk, or fewer: nothing to cut.
    sums = chunked if 0 < chunk < tokens.size else plain
    places = {name: batch[name] for name in _PLACES if name in batch}
    aux = sums(trainable, base, tokens, mask, places)
    if "num_bytes" in batch:
      rows = batch["mask"].astype(aux["tokens"].dtype)
      aux["bytes"] = jnp.sum(batch["num_bytes"].astype(rows.dtype) * rows)
    return aux["loss_sum"] / jnp.maximum(aux["tokens"], 1), aux

  return loss_fn


def _sums(
  logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> dict[str, jax.Array]:
  """Sums over the tokens that the mask marks: their number, nats and hits."""
  mask = mask.astype(logits.dtype)
  nll = cross_entropy(logits, labels)
  correct = jnp.argmax(logits, axis=-1) == labels
  return {
    "tokens": jnp.sum(mask),
    "loss_sum": jnp.sum(nll * mask),
    "correct": jnp.sum(correct * mask),
  }


def _sums_in_chunks(
  unembed: Callable[[jax.Array], jax.Array],
  hidden: jax.Array,
  labels: jax.Array,
  mask: jax.Array,
  positions: int,
) -> dict[str, jax.Array]:
  """`_sums` of `unembed(hidden)`, some positions of every row at a time."""
  batch, seq = labels.shape
  count = -(-seq // positions)

  def split(x):
    # [batch, seq, ...] -> [count, batch, positions, ...]; padding is masked.
    pad = [(0, 0), (0, count * positions - seq)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad).reshape(batch, count, positions, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  @functools.partial(jax.checkpoint, prevent_cse=False)  # As scan needs none.
  def chunk_sums(hidden, labels, mask):
    return _sums(unembed(hidden), labels, mask)

  def step(sums, chunk):
    return trees.add(sums, chunk_sums(*chunk)), None

  chunks = jax.tree.map(split, (hidden, labels, mask))
  first = jax.tree.map(lambda x: x[0], chunks)
  zeros = jax.tree.map(
    lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(chunk_sums, *first)
  )
  return jax.lax.scan(step, zeros, chunks)[0]


def classification(apply: Callable[..., jax.Array]) -> LossFn:
  """Mean cross-entropy of `batch["label"]` given the rest of the batch.

  Args:
    apply: `apply(trainable, base, x) -> logits [batch, classes]`, x being
      `batch["x"]`; of a batch with "tokens" [batch, seq] instead, it is called
      as `apply(trainable, base, tokens, mask=batch["token_mask"])`.

  Returns:
    `loss(trainable, base, batch, key) -> (nats per example, aux)` with
    `aux = {"tokens", "loss_sum", "correct"}`; an example counts as one token.
  """

  def loss_fn(trainable, base, batch, key):
    del key
    if "tokens" in batch:
      tokens, mask = batch["tokens"], batch["token_mask"]
      logits = apply(trainable, base, tokens, mask=mask)
    else:
      logits = apply(trainable, base, batch["x"])
    mask = batch["mask"].astype(logits.dtype)
    nll = cross_entropy(logits, batch["label"])
    loss_sum, count = jnp.sum(nll * mask), jnp.sum(mask)
    correct = jnp.sum((jnp.argmax(logits, axis=-1) == batch["label"]) * mask)
    aux = {"tokens": count, "loss_sum": loss_sum, "correct": correct}
    return loss_sum / jnp.maximum(count, 1), aux

  return loss_fn


def contrastive(apply: Callable[..., jax.Array]) -> LossFn:
  """CLIP's loss (arXiv 2103.00020): each text picks its image, and back.

  The others of the batch are the wrong answers, so that what is learned
  depends on the batch's size; rows that `mask` leaves out are no answers.

  Args:
    apply: `apply(trainable, base, tokens, images, mask=token_mask) -> logits
      [texts, images]` of `batch["tokens"]`, `batch["x"]` and
      `batch["token_mask"]`; text i belongs to image i.

  Returns:
    `loss(trainable, base, batch, key) -> (nats per pair, aux)`, the mean of
    both directions, with `aux = {"tokens", "loss_sum", "correct"}`: pairs,
    their loss, and the texts whose image is picked.
  """

  def loss_fn(trainable, base, batch, key):
    del key
    logits = apply(
      trainable, base, batch["tokens"], batch["x"], mask=batch["token_mask"]
    )
    there = batch["mask"].astype(bool)
    pairs = jnp.arange(len(there))
    lowest = jnp.finfo(logits.dtype).min
    loss_sum, picks = jnp.zeros((), logits.dtype), []
    for scores in (logits, logits.T):
      scores = jnp.where(there[None, :], scores, lowest)
      # A row that is left out has its own answer left out too: not read.
      nll = jnp.where(there, cross_entropy(scores, pairs), 0)
      loss_sum = loss_sum + jnp.sum(nll) / 2
      picks.append(jnp.argmax(scores, axis=-1))
    count = jnp.sum(there.astype(logits.dtype))
    correct = jnp.sum(((picks[0] == pairs) & there).astype(logits.dtype))
    aux = {"tokens": count, "loss_sum": loss_sum, "correct": correct}
    return loss_sum / jnp.maximum(count, 1), aux

  return loss_fn
