"""MimeLite (Karimireddy et al. 2021, arXiv 2008.03606).

  client i   w_i <- w_i + U(g, s)        steps of an optimizer whose state s is
             G_i = grad F_i(w_t)         the server's and does not change
  server     w <- w + sum_i p_i (w_i - w_t)
             s <- V(sum_i p_i G_i, s)

U and V are the two results of an optax optimizer. For SGD with momentum these
are the paper's; for Adam, U also puts the client's own g into its second moment
for the one step, where the paper divides by the server's alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedfm.algorithms import algorithm
from fedfm.clients import local, measures
from fedfm.types import ClientUpdate, FederatedAlgorithm, LossFn, Passes


def mimelite(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  weighting: str = "examples",
  **options: Any,
) -> FederatedAlgorithm:
  """Lets clients step as a centralised optimizer would, by its global state.

  Each local step takes two gradients: at the client's weights, and at those
  that it was sent.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: The optimizer whose state is the server's, such as
      `optax.sgd(0.1, momentum=0.9)`, or a function of the round giving one.
    weighting: "examples", "tokens" or "uniform".
    **options: `server_optimizer`, `aggregator`, `seed` and others of
      `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm` whose `extra` is the optimizer's state.
  """

  def unchanging(round_index):
    inner = local.as_optimizer(client_optimizer, round_index)

    def update(updates, state, params=None):
      return inner.update(updates, state, params)[0], state

    return optax.GradientTransformation(inner.init, update)

  client = local.local_update(loss, unchanging, weighting=weighting)
  grad_fn = jax.grad(loss, has_aux=True)

  def start(sent, client_state, info):
    carry = client.start(sent["trainable"], client_state, info)
    mean = measures.RunningMean.start(sent["trainable"])
    return carry._replace(optimizer=sent["optimizer"]), mean, sent["trainable"]

  def step(carry, base, batch, key):
    own, mean, sent = carry
    gradient, aux = grad_fn(sent, base, batch, key)
    mean = mean.add(gradient, local.batch_count(batch, aux))
    return client.step(own, base, batch, key), mean, sent

  def finish(sent, carry, info):
    own, mean, _ = carry
    delta, weight, client_state, metrics = client.finish(
      sent["trainable"], own, info
    )
    message = {"delta": delta, "gradient": mean.value()}
    return message, weight, client_state, metrics

  def combine(state, mean, result, cohort):
    optimizer = local.as_optimizer(client_optimizer, state.round)
    _, statistics = optimizer.update(
      mean["gradient"], state.extra, state.trainable
    )
    return mean["delta"], statistics

  def init(trainable):
    first_round = jnp.zeros((), jnp.int32)
    return local.as_optimizer(client_optimizer, first_round).init(trainable)

  return algorithm.federated(
    ClientUpdate(start, step, finish),
    server=algorithm.Server(
      init=init,
      broadcast=lambda state: {
        "trainable": state.trainable,
        "optimizer": state.extra,
      },
      combine=combine,
      direction=lambda message: message["delta"],
    ),
    passes=Passes(forwards=2, backwards=2),
    **options,
  )
