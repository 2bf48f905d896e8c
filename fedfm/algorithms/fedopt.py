"""FedOpt (Reddi et al. 2021, arXiv 2003.00295): a server optimizer.

  D = sum_i p_i (w_i - w)                                pseudo-gradient -D
  FedAvgM     m <- beta m + D                            w <- w + lr m
  FedAdagrad  m <- beta1 m + (1-beta1) D           w <- w + lr m/(sqrt v + tau)
              v <- v + D^2
  FedYogi     ...   v <- v - (1-beta2) D^2 sign(v - D^2)
  FedAdam     ...   v <- beta2 v + (1-beta2) D^2

The paper's forms: no bias correction, v starts at tau^2 (and m at 0). Optax's
own (`optax.adam` and so on, with bias correction) go in as `server_optimizer`
of `fedavg`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedfm.algorithms.fedavg import fedavg
from fedfm.clients import local
from fedfm.types import FederatedAlgorithm, LossFn

PyTree = Any


class PaperAdaptiveState(NamedTuple):
  """First and second moments, shaped like the trainable."""

  m: PyTree
  v: PyTree


def paper_adaptive(
  second_moment: Callable[[jax.Array, jax.Array], jax.Array],
  learning_rate: optax.ScalarOrSchedule,
  beta1: float,
  tau: float,
) -> optax.GradientTransformation:
  """The adaptive server step of algorithm 2 of FedOpt, as an optax transform.

  Args:
    second_moment: `(v, squared update) -> v`.
    learning_rate: Server learning rate, or a schedule over rounds.
    beta1: Decay of the first moment.
    tau: Degree of adaptivity: added to sqrt(v), which starts at tau.

  Returns:
    An `optax.GradientTransformation`.
  """

  def init(params):
    m = jax.tree.map(jnp.zeros_like, params)
    v = jax.tree.map(lambda p: jnp.full_like(p, tau**2), params)
    return PaperAdaptiveState(m, v)

  def update(updates, state, params=None):
    del params
    m = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.m, updates)
    v = jax.tree.map(
      lambda v, g: second_moment(v, jnp.square(g)), state.v, updates
    )
    step = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + tau), m, v)
    return step, PaperAdaptiveState(m, v)

  return optax.chain(
    optax.GradientTransformation(init, update),
    optax.scale_by_learning_rate(learning_rate),
  )


def server_adagrad(learning_rate=0.1, beta1=0.0, tau=1e-3):
  """Adagrad in the form of the paper; arguments as in `paper_adaptive`."""
  return paper_adaptive(lambda v, sq: v + sq, learning_rate, beta1, tau)


def server_adam(learning_rate=0.1, beta1=0.9, beta2=0.99, tau=1e-3):
  """Adam in the form of the paper; `beta2` is the decay of v."""
  return paper_adaptive(
    lambda v, sq: beta2 * v + (1 - beta2) * sq, learning_rate, beta1, tau
  )


def server_yogi(learning_rate=0.1, beta1=0.9, beta2=0.99, tau=1e-3):
  """Yogi in the form of the paper; `beta2` is the decay of v."""
  return paper_adaptive(
    lambda v, sq: v - (1 - beta2) * sq * jnp.sign(v - sq),
    learning_rate,
    beta1,
    tau,
  )


def fedopt(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  server_optimizer: optax.GradientTransformation | None = None,
  **options,
) -> FederatedAlgorithm:
  """Applies any optax optimizer to the pseudo-gradient.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    server_optimizer: Any optax transformation; it sees the negative mean
      delta. Default `optax.sgd(1.0)`, which is FedAvg.
    **options: Those of `fedavg`.

  Returns:
    A `FederatedAlgorithm`.
  """
  return fedavg(
    loss,
    client_optimizer=client_optimizer,
    server_optimizer=server_optimizer,
    **options,
  )


def fedavgm(loss: LossFn, **options) -> FederatedAlgorithm:
  """FedAvgM (arXiv 1909.06335): SGD, rate 1, momentum 0.9, unless given."""
  return _with_default(loss, optax.sgd(1.0, momentum=0.9), options)


def fedadagrad(loss: LossFn, **options) -> FederatedAlgorithm:
  """FedAdagrad in the form of the paper, unless a server optimizer is given."""
  return _with_default(loss, server_adagrad(), options)


def fedadam(loss: LossFn, **options) -> FederatedAlgorithm:
  """FedAdam in the form of the paper, unless a server optimizer is given."""
  return _with_default(loss, server_adam(), options)


def fedyogi(loss: LossFn, **options) -> FederatedAlgorithm:
  """FedYogi in the form of the paper, unless a server optimizer is given."""
  return _with_default(loss, server_yogi(), options)


def _with_default(loss, default, options):
  server_optimizer = options.pop("server_optimizer", None)
  return fedopt(
    loss,
    server_optimizer=default if server_optimizer is None else server_optimizer,
    **options,
  )
