"""FLoRA (Wang et al. 2024, arXiv 2409.05976): stacked factors, into the base.

  client i draws A_i, starts from B_i = 0, trains both at its own rank r_i
  A = [A_1 .. A_n],  B = [p_1 s_1 B_1; ..; p_n s_n B_n]      in our order, x A B
  W <- W + A B                                     exact, of rank sum_i r_i

Only one factor carries the weights: with both, products would be weighted by
p_i^2.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from fedfm import aggregators, trees
from fedfm.adapters import Adapter
from fedfm.adapters.lora import draw_a
from fedfm.algorithms import (
  algorithm,
  base_change,
  checks,
  client_ranks,
  lora_metrics,
  low_rank,
  round_metrics,
)
from fedfm.clients import local
from fedfm.types import FederatedAlgorithm, LossFn

_DRAW = 0x80000000  # Folded into a client's key, for its A.


def _without_b(trainable):
  return low_rank.map_pairs(
    lambda pair: pair | {"b": jnp.zeros_like(pair["b"])},
    lambda x: x,
    trainable,
  )


def flora(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  adapter: Adapter,
  server_optimizer: checks.Absent = None,
  aggregator: checks.Absent = None,
  transforms: checks.Absent = (),
  downlink: checks.Absent = None,
  weighting: str = "examples",
  seed: int = 0,
  num_clients: int | None = None,
  ranks: tuple[int, ...] = (),
  client_alpha: str = "proportional",
  residual: str = "dense",
  residual_rank: int = 0,
) -> FederatedAlgorithm:
  """Adds the clients' stacked adapters to the base; all start anew each round.

  The trainable of the state has B = 0: the model is in `effective_base`.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    adapter: LoRA, of the highest rank of a client.
    server_optimizer: None, and so are `aggregator`, `transforms`, `downlink`:
      clients are sent and send adapters of their own ranks, not deltas.
    weighting: "examples", "tokens" or "uniform".
    seed: Seed in [0, 2**32).
    num_clients: Size of the population; not read.
    ranks: Ranks, given to the population's clients in turn; () for the
      adapter's rank.
    client_alpha: "proportional" to the rank (all have the adapter's scale, as
      in the authors' code) or "equal" (s_i = alpha / r_i).
    residual: "dense", a matrix a kernel, exact; or "low_rank", pairs beside
      kernels that may be quantised, cut to `residual_rank` every round.
    residual_rank: Their rank.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: Another adapter than LoRA, or an option out of range.
  """
  checks.check_absent(
    "FLoRA adds the product of whole adapters to the base",
    server_optimizer=server_optimizer,
    aggregator=aggregator,
    transforms=transforms,
    downlink=downlink,
  )
  scale = low_rank.scale_of(adapter, "flora")
  population = client_ranks.client_ranks(adapter, ranks, client_alpha)
  change = base_change.base_change(residual, residual_rank)

  def begin(broadcast, rank, info):
    key, drawn = jax.random.fold_in(info.key, _DRAW), itertools.count()

    def fresh(pair):
      draw = jax.random.fold_in(key, next(drawn))
      return pair | {"a": draw_a(draw, pair["a"].shape, pair["a"].dtype)}

    started = low_rank.map_pairs(fresh, lambda x: x, broadcast)
    return population.cut(started, rank)

  def weights(kept):
    relative = population.relative_scale(kept.messages["rank"])
    return scale * kept.shares * relative

  def combine(state, kept, result, cohort):
    products = {
      path: low_rank.weighted_sum(pair, weights(kept))
      for path, pair in low_rank.pairs_of(kept.messages["trained"]).items()
    }
    delta = low_rank.map_pairs(
      lambda pair, mean: trees.zeros_like(pair),
      lambda x, mean: mean - x,
      state.trainable,
      kept.update["trained"],
    )
    return delta, {
      "change": change.add(state.extra["change"], products),
      "stacked_rank": jnp.sum(kept.messages["rank"]),
    }

  def metrics(state, new_state, kept, result, cohort):
    trained, weight = kept.messages["trained"], weights(kept)
    added = change.added(new_state.extra["change"], state.extra["change"])
    # From B = 0, a client's change of the kernels is its whole product.
    norms, mean_norm = lora_metrics.product_norms(trained, weight)
    relative = population.relative_scale(kept.messages["rank"])
    return {
      lora_metrics.ERROR: lora_metrics.aggregation_error(
        trained, weight, added
      ),
      "update/norm": lora_metrics.update_norm(scale, state, new_state, added),
      **round_metrics.drift(result, mean_norm, scale * relative * norms),
    }

  def first(trainable):
    # An adapter that was trained before goes into the base, too.
    products = {
      path: low_rank.scaled(pair, scale)
      for path, pair in low_rank.pairs_of(trainable).items()
    }
    return {
      "change": change.add(change.init(trainable), products),
      "stacked_rank": jnp.zeros(()),
    }

  def bytes_per_client(state):
    """Up a client's factors, down the stack of the round before."""
    up = population.num_bytes(state.trainable)
    rank = algorithm.number(state.extra["stacked_rank"], 0)
    return up, population.num_bytes(state.trainable, (rank,))

  built = algorithm.federated(
    client_ranks.ranked_update(
      loss, client_optimizer, population, weighting=weighting, begin=begin
    ),
    aggregator=aggregators.keep(),
    seed=seed,
    num_clients=num_clients,
    server=algorithm.Server(
      init=first,
      combine=combine,
      metrics=metrics,
      effective_base=lambda state, base: change.apply(
        base, state.extra["change"]
      ),
    ),
    bytes_per_client=bytes_per_client,
  )

  def init(trainable):
    state = built.init(trainable)
    return dataclasses.replace(state, trainable=_without_b(state.trainable))

  return built._replace(init=init)
