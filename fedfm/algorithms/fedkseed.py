"""FedKSeed (Qin et al. 2024, arXiv 2312.06353): a round in a few kilobytes.

K seeds are known to all; seed s stands for z_s ~ N(0, I).

local step:  s ~ U{1 .. K},  g = (L(w + eps z_s) - L(w - eps z_s)) / (2 eps)
             w <- w - lr g z_s,   G_i[s] <- G_i[s] + g
server:      G[s] <- G[s] + sum_i p_i G_i[s]
all:         w = w_0 - lr sum_s G[s] z_s

Clients send G_i and are sent G, K numbers each, and rebuild w from the weights
that they began with. That equals what the clients' steps did only for SGD of a
constant rate, so no other is taken; a client's own multiple of the rate is in
its G_i. The rebuilt w is the FedAvg of the clients' weights.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedfm import errors, trees
from fedfm.algorithms import algorithm, checks
from fedfm.clients import estimators, local
from fedfm.types import ClientUpdate, FederatedAlgorithm, LossFn, Passes

PyTree = Any
_SEEDS_KEY = 0x5EED  # Folded into the run's key: where the K seeds are from.
_CHOICE_KEY = 0xFFFFFFFF  # Folded into a step's key: which seed it takes.


class _Carry(NamedTuple):
  """A client in the middle of its work."""

  trainable: PyTree
  gradients: jax.Array  # shape=(K,): G_i
  seeds: jax.Array  # typed key
  rate: jax.Array  # shape=(), dtype=float32
  loss_sum: jax.Array
  count: jax.Array


def fedkseed(
  loss: LossFn,
  *,
  client_learning_rate: float,
  client_optimizer: checks.Absent = None,
  server_optimizer: checks.Absent = None,
  downlink: checks.Absent = None,
  num_seeds: int = 1024,
  epsilon: float = 1e-3,
  weighting: str = "examples",
  **options: Any,
) -> FederatedAlgorithm:
  """Exchanges scalar gradients of known directions, in place of weights.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_learning_rate: Of the local steps, constant.
    client_optimizer: None: it is SGD of that rate.
    server_optimizer: None, and so is `downlink`: clients rebuild the weights
      from the sum of all that was sent.
    num_seeds: K.
    epsilon: Distance of the two points that a slope is measured from.
    weighting: "examples", "tokens" or "uniform".
    **options: `aggregator` and `transforms` (of the G_i), `seed` and others of
      `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm`, whose `extra` is G.

  Raises:
    ConfigError: An option out of range.
  """
  checks.check_absent(
    "FedKSeed rebuilds what SGD of client_learning_rate did",
    client_optimizer=client_optimizer,
  )
  checks.check_absent(
    "FedKSeed's clients rebuild the weights from the sum of all G_i",
    server_optimizer=server_optimizer,
    downlink=downlink,
  )
  estimators.check_epsilon(epsilon)
  if isinstance(num_seeds, bool) or num_seeds < 1:
    raise errors.ConfigError(f"num_seeds: got {num_seeds}, expected at least 1")
  if not 0 <= client_learning_rate < float("inf"):
    raise errors.ConfigError(
      f"client_learning_rate: got {client_learning_rate}, expected a finite "
      "number of at least 0"
    )
  local.check_weighting(weighting)

  def start(sent, client_state, info):
    del client_state
    zero = jnp.zeros((), _dtype(sent["trainable"]))
    return _Carry(
      trainable=sent["trainable"],
      gradients=jnp.zeros(num_seeds, zero.dtype),
      seeds=seeds_key(sent["seed"]),
      rate=info.rate,
      loss_sum=zero,
      count=zero,
    )

  def step(carry, base, batch, key):
    choice = jax.random.fold_in(key, _CHOICE_KEY)
    index = jax.random.randint(choice, (), 0, num_seeds)
    noise = direction(carry.seeds, index, carry.trainable)
    value, aux, slope = estimators.two_points(
      loss, carry.trainable, noise, epsilon, base, batch, key
    )
    slope = slope.astype(carry.gradients.dtype) * carry.rate
    count = local.batch_count(batch, aux).astype(carry.count.dtype)
    return carry._replace(
      trainable=_moved(carry.trainable, noise, -client_learning_rate * slope),
      gradients=carry.gradients.at[index].add(slope),
      loss_sum=carry.loss_sum + value.astype(carry.count.dtype) * count,
      count=carry.count + count,
    )

  def finish(sent, carry, info):
    delta = trees.sub(carry.trainable, sent["trainable"])
    metrics = {
      "loss_sum": carry.loss_sum,
      "count": carry.count,
      "delta_norm": trees.norm(delta),
    }
    weight = local.client_weight(weighting, info, carry.count)
    return carry.gradients, weight, (), metrics

  def combine(state, aggregate, result, cohort):
    del result, cohort
    zeros = trees.zeros_like(state.trainable)
    delta = rebuild(zeros, aggregate, client_learning_rate, state.seed)
    return delta, state.extra + aggregate

  return algorithm.federated(
    ClientUpdate(start, step, finish),
    server=algorithm.Server(
      init=lambda trainable: jnp.zeros(num_seeds, _dtype(trainable)),
      broadcast=lambda state: {
        "trainable": state.trainable,
        "seed": state.seed,
      },
      combine=combine,
      # Not the weights: G, which they are rebuilt from.
      wire=lambda state, sent, message: (state.extra, message),
    ),
    passes=Passes(forwards=2, backwards=0),
    **options,
  )


def rebuild(
  start: PyTree, gradients: jax.Array, learning_rate: float, seed: Any
) -> PyTree:
  """Rebuilds the weights: w_0 - lr sum_s G[s] z_s.

  Args:
    start: w_0.
    gradients: G, [K].
    learning_rate: The clients', constant.
    seed: The run's seed.

  Returns:
    The weights.
  """
  key = seeds_key(seed)

  def add(index, weights):
    slope = gradients[index]

    def moved(w):
      return _moved(w, direction(key, index, w), -learning_rate * slope)

    # A cohort takes few of the seeds.
    return jax.lax.cond(slope != 0, moved, lambda w: w, weights)

  return jax.lax.fori_loop(0, gradients.shape[0], add, start)


def seeds_key(seed: Any) -> jax.Array:
  """The key that the K directions are drawn from."""
  return jax.random.fold_in(jax.random.key(seed), _SEEDS_KEY)


def direction(key: jax.Array, index: Any, like: PyTree) -> PyTree:
  """z of one seed, in the shapes of the trainable."""
  return estimators.normal_like(jax.random.fold_in(key, index), like)


def _moved(weights: PyTree, noise: PyTree, factor: jax.Array) -> PyTree:
  return jax.tree.map(
    lambda w, z: w + (factor * z).astype(w.dtype), weights, noise
  )


def _dtype(trainable: PyTree) -> Any:
  """float32, or float64 where the trainable is."""
  dtypes = [x.dtype for x in jax.tree.leaves(trainable)]
  return jnp.result_type(jnp.float32, *dtypes)
