"""Gradient accumulation: a batch's gradient from several smaller ones.

Memory for activations falls to that of a microbatch; the gradient is that of
the whole batch to rounding, because microbatches weigh by what they count.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedfm import errors, trees
from fedfm.clients import local
from fedfm.types import LossFn

PyTree = Any


def accumulated(loss: LossFn, microbatches: int) -> LossFn:
  """Splits every batch, and sums values and gradients over the parts.

  The gradient with respect to the trainable is made while the value is: a
  part's activations are gone before the next part starts.

  Args:
    loss: `loss(trainable, base, batch, key) -> (mean, aux)`, the mean over
      `aux["tokens"]` tokens, or over examples where it counts none; its aux
      holds sums over the batch.
    microbatches: Parts of a batch; 1 changes nothing.

  Returns:
    A loss with the same value, gradient and aux to rounding. Each part gets a
    key of its own.

  Raises:
    ConfigError: Fewer than 1 part; and, where the loss is called, a batch that
      they do not divide.
  """
  if microbatches < 1:
    raise errors.ConfigError(
      f"accumulate: got {microbatches}, expected at least 1"
    )
  if microbatches == 1:
    return loss

  def over_parts(one, trainable, base, batch, key):
    """Sums `one(trainable, base, part, key) -> (weighted sums, count, aux)`."""
    parts = jax.tree.map(lambda x: _split(x, microbatches), batch)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype),
      jax.eval_shape(one, trainable, base, first, key),
    )

    def step(sums, index_and_part):
      index, part = index_and_part
      part_key = None if key is None else jax.random.fold_in(key, index)
      return trees.add(sums, one(trainable, base, part, part_key)), None

    inputs = (jnp.arange(microbatches), parts)
    weighted, count, aux = jax.lax.scan(step, zeros, inputs)[0]
    return trees.scale(weighted, 1 / jnp.where(count > 0, count, 1)), aux

  def value_sum(trainable, base, part, key):
    value, aux = loss(trainable, base, part, key)
    count = local.batch_count(part, aux)
    return _weighted(value, count), count, aux

  def value_and_gradient_sum(trainable, base, part, key):
    grad_fn = jax.value_and_grad(loss, has_aux=True)
    (value, aux), gradient = grad_fn(trainable, base, part, key)
    count = local.batch_count(part, aux)
    return _weighted((value, gradient), count), count, aux

  @jax.custom_vjp
  def accumulated_loss(trainable, base, batch, key):
    return over_parts(value_sum, trainable, base, batch, key)

  def forward(trainable, base, batch, key):
    for x in jax.tree.leaves((base, batch)):
      if x.perturbed:
        raise NotImplementedError(
          "an accumulated loss has a gradient for its trainable only"
        )
    trainable, base, batch, key = jax.tree.map(
      lambda x: x.value, (trainable, base, batch, key)
    )
    (value, gradient), aux = over_parts(
      value_and_gradient_sum, trainable, base, batch, key
    )
    return (value, aux), gradient

  def backward(gradient, cotangents):
    factor = cotangents[0]
    if isinstance(factor, jax.custom_derivatives.SymbolicZero):
      return trees.zeros_like(gradient), None, None, None
    return trees.scale(gradient, factor), None, None, None

  accumulated_loss.defvjp(forward, backward, symbolic_zeros=True)
  return accumulated_loss


def _weighted(tree: PyTree, count: jax.Array) -> PyTree:
  """Times the count; 0 of a part that counts nothing, whose mean may be NaN."""
  return trees.select(
    count > 0, trees.scale(tree, count), trees.zeros_like(tree)
  )


def _split(x: jax.Array, parts: int) -> jax.Array:
  """[batch, ...] to [parts, batch / parts, ...], every part from all devices.

  Part i has rows i, i + parts, ...: rows that are split over `fsdp` stay where
  they are.
  """
  if x.shape[0] % parts:
    raise errors.ConfigError(
      f"accumulate: {parts} microbatches do not divide a batch of {x.shape[0]}"
    )
  return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)
