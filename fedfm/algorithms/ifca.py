"""IFCA (Ghosh et al. 2020, arXiv 2006.04088): clusters of clients.

  client i   j = argmin_j F_i(w_j) on its first batch; trains w_j
  server     w_j <- w_j + sum_(i in cluster j) p_i (w_i - w_j)

The trainable is k models, leaves [k, ...]; where it is an adapter, an adapter
for each cluster.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedfm import errors, sums, trees
from fedfm.algorithms import algorithm, checks, round_metrics
from fedfm.clients import local
from fedfm.types import (
  Aggregator,
  ClientUpdate,
  FederatedAlgorithm,
  LossFn,
  Passes,
)

PyTree = Any
_PERTURB_KEY = 0xFFFFFFFE  # Folded into the seed, to draw the first models.


def mean_by_cluster(num_clusters: int) -> Aggregator:
  """Averages each cluster's deltas by weight; an empty one's mean is zero.

  Args:
    num_clusters: k.

  Returns:
    A streaming `Aggregator` of messages {"delta", "cluster"}, whose update is
    {"delta": [k, ...], "weight": [k]}.
  """

  def add(state, message, weight):
    del state
    share = weight * jax.nn.one_hot(message["cluster"], num_clusters)
    wide = sums.widen(message["delta"])
    total = wide.map(lambda d: jnp.tensordot(share.astype(d.dtype), d, axes=0))
    return total, share

  def finish(state, collected):
    total, weight = collected
    safe = jnp.where(weight > 0, weight, 1)
    mean = total.map(
      lambda t: t / safe.astype(t.dtype).reshape((-1,) + (1,) * (t.ndim - 1))
    )
    return {"delta": mean.narrow(), "weight": weight}, state

  return Aggregator(init=lambda message: (), add=add, finish=finish)


def ifca(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  num_clusters: int = 2,
  spread: float = 0.01,
  server_optimizer: optax.GradientTransformation | None = None,
  aggregator: checks.Absent = None,
  weighting: str = "examples",
  seed: int = 0,
  **options: Any,
) -> FederatedAlgorithm:
  """Trains k models, each on the clients whose data it fits best.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    num_clusters: k, at least 1.
    spread: The models start as the trainable plus normal noise of this standard
      deviation (the first as it is): equal models could not be told apart.
    server_optimizer: Of the k models; default `optax.sgd(1.0)`.
    aggregator: None: each cluster's mean is by weight.
    weighting: Within a cluster: "examples", "tokens" or "uniform".
    seed: Seed in [0, 2**32).
    **options: `num_clients` (needed), `server_step`, `transforms`, `downlink`
      and others of `algorithm.federated`, on the k models. What error feedback
      keeps of a delta goes to the cluster that a client joins next.

  Returns:
    A `FederatedAlgorithm` whose clients keep the cluster that they were in last
    (-1 before the first), and whose `extra` is the clusters' weights in the
    last round. The global model, which a new client has too, is the heaviest
    cluster's.

  Raises:
    ConfigError: A number out of range, or no `num_clients`.
  """
  checks.check_absent(
    "IFCA takes the weighted mean of each cluster", aggregator=aggregator
  )
  if num_clusters < 1:
    raise errors.ConfigError(
      f"num_clusters: got {num_clusters}, expected at least 1"
    )
  checks.check_number("spread", spread)
  checks.check_seed(seed)
  client = local.local_update(loss, client_optimizer, weighting=weighting)

  def model(models, cluster):
    return jax.tree.map(lambda x: x[cluster], models)

  def start(models, client_state, info):
    del client_state
    nowhere = jnp.full((), -1, jnp.int32)
    return client.start(model(models, 0), (), info), nowhere

  def first(carry, models_and_base, batch, key):
    models, base = models_and_base

    def loss_of(one):
      return loss(one, base, batch, key)[0]

    cluster = jnp.argmin(jax.lax.map(loss_of, models)).astype(jnp.int32)
    return carry[0]._replace(trainable=model(models, cluster)), cluster

  def step(carry, models_and_base, batch, key):
    return client.step(carry[0], models_and_base[1], batch, key), carry[1]

  def finish(models, carry, info):
    own, cluster = carry
    delta, weight, _, metrics = client.finish(model(models, cluster), own, info)
    return {"delta": delta, "cluster": cluster}, weight, cluster, metrics

  def combine(state, mean, result, cohort):
    return mean["delta"], mean["weight"]

  def metrics(state, new_state, mean, result, cohort):
    # Clients agree where they agree with the others of their cluster.
    norms = jax.lax.map(trees.norm, mean["delta"])
    total = jnp.sum(mean["weight"])
    norm = norms @ mean["weight"] / jnp.where(total > 0, total, 1)
    return round_metrics.drift(result, norm)

  def heaviest(state):
    return model(state.trainable, jnp.argmax(state.extra))

  def personal(state, cluster):
    own = model(state.trainable, cluster)
    return trees.select(cluster >= 0, own, heaviest(state))

  inner = algorithm.federated(
    ClientUpdate(start, step, finish, first),
    aggregator=mean_by_cluster(num_clusters),
    server_optimizer=server_optimizer,
    server=algorithm.Server(
      init=lambda models: jnp.zeros((num_clusters,), trees.sum_dtype(models)),
      combine=combine,
      direction=lambda message: message["delta"],
      metrics=metrics,
      client_base=lambda state, base, heard: (heard, base),
    ),
    client_state=lambda models: jnp.full((), -1, jnp.int32),
    seed=seed,
    effective_trainable=heaviest,
    personal=personal,
    passes=Passes(first_forwards=num_clusters),
    **options,
  )

  def init(trainable):
    key = jax.random.fold_in(jax.random.key(seed), _PERTURB_KEY)
    leaves, treedef = jax.tree.flatten(trainable)

    def spread_out(index, w):
      shape = (num_clusters, *w.shape)
      noise = jax.random.normal(jax.random.fold_in(key, index), shape, w.dtype)
      return w + spread * noise.at[0].set(0)

    models = [spread_out(index, w) for index, w in enumerate(leaves)]
    return inner.init(treedef.unflatten(models))

  return inner._replace(init=init)
