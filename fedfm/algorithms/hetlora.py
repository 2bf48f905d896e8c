"""HetLoRA (Cho et al. 2024, arXiv 2401.06432): ranks that clients prune.

client j is sent A[:, :r_j], B[:r_j]                    in our order, x A B
it minimises  F_j + lambda |A[:, g r_j:]| |B[g r_j:]|
if that product fell below what it began with,  r_j <- g r_j  from here on
S_j = |A_j B_j|,  w_j = S_j / sum_i S_i
A <- sum_j w_j pad(A_j)        B <- sum_j w_j pad(B_j)
"""

import jax
import jax.numpy as jnp
import optax

from fedfm import aggregators, errors, trees
from fedfm.adapters import Adapter
from fedfm.algorithms import (
  algorithm,
  checks,
  client_ranks,
  lora_metrics,
  low_rank,
)
from fedfm.clients import local
from fedfm.types import ClientUpdate, FederatedAlgorithm, LossFn, PyTree


def tail(trainable: PyTree, first: jax.Array, last: jax.Array) -> jax.Array:
  """Sums |A[:, first:last]| |B[first:last]| over all kernels.

  Args:
    trainable: A trainable.
    first: First column of A that counts.
    last: First that does not count any more.

  Returns:
    A scalar, whose gradient is 0 where a norm is 0.
  """
  total = jnp.zeros(())
  for pair in low_rank.pairs_of(trainable).values():
    columns = jnp.arange(pair["a"].shape[-1])
    inside = (columns >= first) & (columns < last)
    a = jnp.where(inside, pair["a"], 0)
    b = jnp.where(inside[:, None], pair["b"], 0)
    total = total + jnp.sum(_norm(a) * _norm(b))
  return total


def _norm(x: jax.Array) -> jax.Array:
  """Norms of matrices [..., rows, columns]; no NaN in the gradient at 0."""
  square = jnp.sum(jnp.square(x), axis=(-2, -1))
  positive = square > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def product_norm(trainable: PyTree) -> jax.Array:
  """Returns |A B| over all kernels, by the factors' small Gram matrices.

  A QR would be as good, but of lanes on many devices XLA would gather it.

  Args:
    trainable: A trainable.

  Returns:
    A scalar.
  """
  total = jnp.zeros(())
  for pair in low_rank.pairs_of(trainable).values():
    of_a = jnp.swapaxes(pair["a"], -1, -2) @ pair["a"]
    of_b = pair["b"] @ jnp.swapaxes(pair["b"], -1, -2)
    total = total + jnp.sum(of_a * of_b)
  return jnp.sqrt(jnp.maximum(total, 0))


def _update(loss, client_optimizer, population, weighting, strength, decay):
  """Local work at a client's own rank, which its state keeps."""
  kept_of = jnp.asarray(
    [max(1, int(decay * r)) for r in range(population.highest + 1)], jnp.int32
  )

  def rank_of(client_state, info):
    # 0 is the rank of a client that never took part.
    rank = client_state["rank"]
    return jnp.where(rank > 0, rank, population.of(info.row))

  own = client_ranks.ranked_update(
    loss,
    client_optimizer,
    population,
    weighting=weighting,
    rank_of=rank_of,
    penalty=lambda t, rank: strength * tail(t, kept_of[rank], rank),
  )

  def finish(broadcast, carry, info):
    message, size, _, metrics = own.finish(broadcast, carry, info)
    state, first, rank = carry
    before, after = (
      tail(t, kept_of[rank], rank) for t in (first, state.trainable)
    )
    rank = jnp.where(after < before, kept_of[rank], rank)
    trained = population.cut(state.trainable, rank)
    message |= {
      "trained": trained,
      "kept_rank": rank.astype(jnp.float32),
      "size": size * info.weight,
    }
    return message, product_norm(trained), {"rank": rank}, metrics

  return ClientUpdate(own.start, own.step, finish)


def hetlora(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  adapter: Adapter,
  num_clients: int,
  server_optimizer: optax.GradientTransformation | None = None,
  aggregator: checks.Absent = None,
  transforms: checks.Absent = (),
  downlink: checks.Absent = None,
  weighting: str = "examples",
  seed: int = 0,
  ranks: tuple[int, ...] = (),
  client_alpha: str = "proportional",
  strength: float = 0.005,
  decay: float = 0.99,
) -> FederatedAlgorithm:
  """Averages factors by the size of their product; clients prune their ranks.

  A client has one rank for all its kernels.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    adapter: LoRA, of the highest rank of a client.
    num_clients: Size of the population, whose ranks are kept.
    server_optimizer: Applied to the pseudo-gradient; default `optax.sgd(1.0)`.
    aggregator: None, and so are `transforms` and `downlink`: clients are sent
      and send adapters of their own ranks, not deltas.
    weighting: "examples", "tokens" or "uniform": p_i of the aggregation error;
      the aggregate itself is weighted by w_i.
    seed: Seed in [0, 2**32).
    ranks: Ranks at the start, given to the population's clients in turn; () for
      the adapter's rank.
    client_alpha: "proportional" to the rank (all have the adapter's scale) or
      "equal" (s_i = alpha / r_i); the factors are averaged as they are.
    strength: lambda, at least 0; the loss that is reported is without it.
    decay: gamma, the part of the rank that is kept (rounded down, at least 1),
      in (0, 1]; 1 for no pruning.

  Returns:
    A `FederatedAlgorithm`; `lora/mean_rank` is that of the round's clients.

  Raises:
    ConfigError: Another adapter than LoRA, or an option out of range.
  """
  checks.check_absent(
    "HetLoRA's clients send whole adapters, for a mean weighted by their size",
    aggregator=aggregator,
    transforms=transforms,
    downlink=downlink,
  )
  low_rank.scale_of(adapter, "hetlora")
  population = client_ranks.client_ranks(adapter, ranks, client_alpha)
  if not 0 <= strength < float("inf"):
    raise errors.ConfigError(
      f"strength: got {strength}, expected a finite number of at least 0"
    )
  if not 0 < decay <= 1:
    raise errors.ConfigError(f"decay: got {decay}, expected 0 < decay <= 1")

  def combine(state, kept, result, cohort):
    here = kept.shares > 0
    total = jnp.sum(jnp.where(here, kept.messages["kept_rank"], 0))
    mean_rank = total / jnp.maximum(jnp.sum(here), 1)
    delta = trees.sub(kept.update["trained"], state.trainable)
    return delta, {"mean_rank": mean_rank}

  def metrics(state, new_state, kept, result, cohort):
    rank = kept.messages["rank"]
    size = kept.messages["size"].astype(kept.shares.dtype)
    total = jnp.sum(size)
    shares = size / jnp.where(total > 0, total, 1)
    first = population.cut(state.trainable, rank)
    return {
      lora_metrics.ERROR: lora_metrics.aggregation_error(
        kept.messages["trained"],
        shares * population.relative_scale(rank),
        low_rank.pairs_of(kept.update["trained"]),
      ),
      "lora/mean_rank": new_state.extra["mean_rank"],
      **client_ranks.ranked_drift(first, kept, result),
    }

  def bytes_per_client(state):
    rank = algorithm.number(state.extra["mean_rank"], mean_rank)
    num_bytes = population.num_bytes(state.trainable, (rank,))
    return num_bytes, num_bytes

  mean_rank = sum(population.ranks) / len(population.ranks)
  return algorithm.federated(
    _update(loss, client_optimizer, population, weighting, strength, decay),
    aggregator=aggregators.keep(),
    server_optimizer=server_optimizer,
    seed=seed,
    server=algorithm.Server(
      init=lambda trainable: {"mean_rank": jnp.asarray(mean_rank, jnp.float32)},
      combine=combine,
      metrics=metrics,
    ),
    client_state=lambda trainable: {"rank": jnp.zeros((), jnp.int32)},
    num_clients=num_clients,
    bytes_per_client=bytes_per_client,
  )
