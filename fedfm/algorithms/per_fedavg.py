"""Per-FedAvg (Fallah et al. 2020, arXiv 2002.07948): a start to adapt from.

FedAvg on the loss after one step of the client's own, as MAML:

  client i   w <- w - beta grad_w F_i(w - alpha grad F_i(w; D); D')

D and D' are the two halves of a batch. Its model is one gradient step from the
global one: evaluate it after local fine-tuning.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedfm.algorithms import checks
from fedfm.algorithms.fedavg import fedavg
from fedfm.types import FederatedAlgorithm, LossFn, Passes

PyTree = Any


def halves(batch: PyTree) -> tuple[PyTree, PyTree]:
  """Splits a batch by its mask: every other example to the first half.

  Args:
    batch: Its examples come first, padding last.

  Returns:
    Two batches of the same arrays with masks of their own; a batch of a single
    example is both of its halves.
  """
  mask = batch["mask"]
  odd = jnp.arange(mask.shape[0]) % 2 == 1
  second = jnp.where(odd, mask, 0)
  alone = jnp.sum(second) == 0
  first = jnp.where(odd, 0, mask)
  return batch | {"mask": first}, batch | {
    "mask": jnp.where(alone, mask, second)
  }


def meta_loss(
  loss: LossFn, inner_learning_rate: float, first_order: bool
) -> LossFn:
  """The loss on one half of a batch after a step of SGD on the other.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    inner_learning_rate: alpha.
    first_order: Whether to leave out the derivative of the inner step.

  Returns:
    A loss of the same form.
  """
  grad_fn = jax.grad(loss, has_aux=True)

  def after_a_step(trainable, base, batch, key):
    first, second = halves(batch)
    grads, _ = grad_fn(trainable, base, first, key)
    if first_order:
      grads = jax.lax.stop_gradient(grads)
    adapted = jax.tree.map(
      lambda w, g: w - inner_learning_rate * g, trainable, grads
    )
    return loss(adapted, base, second, key)

  return after_a_step


def per_fedavg(
  loss: LossFn, *, inner_learning_rate: float = 0.01, **options: Any
) -> FederatedAlgorithm:
  """Finds weights from which one gradient step suits each client.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`, differentiable
      twice.
    inner_learning_rate: alpha, of the inner step, at least 0; 0 is FedAvg on
      half the examples.
    **options: Those of `fedavg`.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: A negative or non-finite rate.
  """
  checks.check_number("inner_learning_rate", inner_learning_rate)
  return fedavg(
    meta_loss(loss, inner_learning_rate, False),
    passes=Passes(forwards=2, backwards=2, hessian_products=1),
    **options,
  )


def first_order_per_fedavg(
  loss: LossFn, *, inner_learning_rate: float = 0.01, **options: Any
) -> FederatedAlgorithm:
  """`per_fedavg` without second derivatives: the paper's FO variant."""
  checks.check_number("inner_learning_rate", inner_learning_rate)
  return fedavg(
    meta_loss(loss, inner_learning_rate, True),
    passes=Passes(forwards=2, backwards=2),
    **options,
  )
