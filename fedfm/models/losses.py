"""Losses with the signature `loss(trainable, base, batch, key)`.

A batch is `{name: array [batch, ...], "mask": [batch]}`; language models read
`tokens` [batch, seq] and `loss_mask` [batch, seq], which marks the tokens to be
predicted (each from those before it, so position 0 never counts).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
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
  shifted = logits - top
  log_sum = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
  picked = jnp.take_along_axis(shifted, labels[..., None], axis=-1)[..., 0]
  return log_sum - picked


def language_model(apply: Callable[..., jax.Array]) -> LossFn:
  """Mean next-token loss over the tokens that `loss_mask` and `mask` mark.

  Args:
    apply: `apply(trainable, base, tokens) -> logits [batch, seq, vocab]`; see
      `fedfm.adapters` for the three usual ones.

  Returns:
    `loss(trainable, base, batch, key) -> (nats per token, aux)` with
    `aux = {"tokens", "loss_sum", "correct"}`, sums over the batch. A batch
    without a token to predict has loss 0, and gradient 0.
  """

  def loss_fn(trainable, base, batch, key):
    del key
    tokens = batch["tokens"]
    logits = apply(trainable, base, tokens)[:, :-1]
    labels = tokens[:, 1:]
    with jax.named_scope("loss"):
      mask = batch["loss_mask"][:, 1:] * batch["mask"][:, None]
      mask = mask.astype(logits.dtype)
      nll = cross_entropy(logits, labels)
      loss_sum, count = jnp.sum(nll * mask), jnp.sum(mask)
      correct = jnp.sum((jnp.argmax(logits, axis=-1) == labels) * mask)
    aux = {"tokens": count, "loss_sum": loss_sum, "correct": correct}
    return loss_sum / jnp.maximum(count, 1), aux

  return loss_fn


def classification(apply: Callable[..., jax.Array]) -> LossFn:
  """Mean cross-entropy of `batch["label"]` given `batch["x"]`.

  Args:
    apply: `apply(trainable, base, x) -> logits [batch, classes]`.

  Returns:
    `loss(trainable, base, batch, key) -> (nats per example, aux)` with
    `aux = {"tokens", "loss_sum", "correct"}`; an example counts as one token.
  """

  def loss_fn(trainable, base, batch, key):
    del key
    logits = apply(trainable, base, batch["x"])
    mask = batch["mask"].astype(logits.dtype)
    nll = cross_entropy(logits, batch["label"])
    loss_sum, count = jnp.sum(nll * mask), jnp.sum(mask)
    correct = jnp.sum((jnp.argmax(logits, axis=-1) == batch["label"]) * mask)
    aux = {"tokens": count, "loss_sum": loss_sum, "correct": correct}
    return loss_sum / jnp.maximum(count, 1), aux

  return loss_fn
