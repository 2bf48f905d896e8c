"""Gradients without a backward pass: from two losses, or from a tangent.

An estimator turns a loss into one whose gradient is the estimate: any local
update, and so any algorithm, can be built on it. z is standard normal noise in
the shape of the trainable, drawn for each leaf from the step's key and the
leaf's index, and so the same on any mesh.

  zeroth order (SPSA)   g = (L(w + eps z) - L(w - eps z)) / (2 eps)
  forward mode          g = <grad L(w), z>, by one Jacobian-vector product
  gradient              g z
"""

from collections.abc import Callable
from typing import Any

import jax

from fedfm import errors, trees
from fedfm.types import LossFn

PyTree = Any
_NOISE_KEY = 0xFFFFFFFF  # Folded into a step's key, beside what the loss draws.


def zeroth_order(loss: LossFn, epsilon: float = 1e-3) -> LossFn:
  """Estimates gradients from the losses at two points (MeZO, arXiv 2305.17333).

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`; it draws the
      same at both points.
    epsilon: Distance of the points, in units of z.

  Returns:
    A loss; its value is the mean of the two.

  Raises:
    ConfigError: An epsilon that is not above 0.
  """
  check_epsilon(epsilon)

  def estimate(trainable, base, batch, key):
    noise = normal_like(jax.random.fold_in(key, _NOISE_KEY), trainable)
    value, aux, slope = two_points(
      loss, trainable, noise, epsilon, base, batch, key
    )
    return value, aux, trees.scale(noise, slope)

  return _with_gradient(estimate)


def forward_mode(loss: LossFn) -> LossFn:
  """Estimates gradients from one tangent (arXiv 2202.08587); unbiased.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.

  Returns:
    A loss of the same value.
  """

  def estimate(trainable, base, batch, key):
    noise = normal_like(jax.random.fold_in(key, _NOISE_KEY), trainable)
    value, slope, aux = jax.jvp(
      lambda w: loss(w, base, batch, key), (trainable,), (noise,), has_aux=True
    )
    return value, aux, trees.scale(noise, slope)

  return _with_gradient(estimate)


def two_points(
  loss: LossFn, trainable: PyTree, noise: PyTree, epsilon: float, *arguments
) -> tuple[jax.Array, PyTree, jax.Array]:
  """Measures a loss's slope along z.

  Args:
    loss: As in `zeroth_order`.
    trainable: w.
    noise: z.
    epsilon: Distance of the points.
    *arguments: The loss's other arguments.

  Returns:
    (mean of the losses, aux of one of them, slope).
  """

  def at(distance):
    moved = jax.tree.map(lambda w, z: w + distance * z, trainable, noise)
    return loss(moved, *arguments)

  (above, aux), (below, _) = at(epsilon), at(-epsilon)
  return (above + below) / 2, aux, (above - below) / (2 * epsilon)


def normal_like(key: jax.Array, tree: PyTree) -> PyTree:
  """Draws standard normal noise in the shapes and dtypes of a tree.

  Args:
    key: Typed key.
    tree: Of floating arrays.

  Returns:
    The noise; a leaf's depends on the key and its index only.
  """
  leaves, treedef = jax.tree.flatten(tree)
  return treedef.unflatten(
    [
      jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
      for i, x in enumerate(leaves)
    ]
  )


def check_epsilon(epsilon: float) -> None:
  """Raises ConfigError unless epsilon is above 0."""
  if not 0 < epsilon < float("inf"):
    raise errors.ConfigError(
      f"epsilon: got {epsilon}, expected a number above 0"
    )


def _with_gradient(estimate: Callable[..., Any]) -> LossFn:
  """A loss whose gradient by the trainable is what `estimate` returns."""

  @jax.custom_vjp
  def loss(trainable, base, batch, key):
    value, aux, _ = estimate(trainable, base, batch, key)
    return value, aux

  def forward(trainable, base, batch, key):
    value, aux, gradient = estimate(trainable, base, batch, key)
    return (value, aux), gradient

  def backward(gradient, cotangents):
    # Nothing is known of the gradients by the other arguments.
    return trees.scale(gradient, cotangents[0]), None, None, None

  loss.defvjp(forward, backward)
  return loss
