"""Zero-padding: the baseline for clients of different LoRA ranks.

  client j is sent A[:, :r_j], B[:r_j]                    in our order, x A B
  A <- sum_i p_i pad(A_i)        B <- sum_i p_i pad(B_i)

As FLoRA (arXiv 2409.05976) and HetLoRA (arXiv 2401.06432) compare with: inexact
like FedIT, and small ranks water down the higher columns with their zeros.
"""

import optax

from fedfm import aggregators, trees
from fedfm.adapters import Adapter
from fedfm.algorithms import (
  algorithm,
  checks,
  client_ranks,
  lora_metrics,
  low_rank,
)
from fedfm.clients import local
from fedfm.types import FederatedAlgorithm, LossFn


def zero_padding(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  adapter: Adapter,
  server_optimizer: optax.GradientTransformation | None = None,
  aggregator: checks.Absent = None,
  transforms: checks.Absent = (),
  downlink: checks.Absent = None,
  weighting: str = "examples",
  seed: int = 0,
  num_clients: int | None = None,
  ranks: tuple[int, ...] = (),
  client_alpha: str = "proportional",
) -> FederatedAlgorithm:
  """Averages the factors of clients of different ranks, padded with zeros.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    adapter: LoRA, of the highest rank of a client.
    server_optimizer: Applied to the pseudo-gradient; default `optax.sgd(1.0)`.
    aggregator: None, and so are `transforms` and `downlink`: clients are sent
      and send adapters of their own ranks, not deltas.
    weighting: "examples", "tokens" or "uniform".
    seed: Seed in [0, 2**32).
    num_clients: Size of the population; not read.
    ranks: Ranks, given to the population's clients in turn; () for the
      adapter's rank.
    client_alpha: "proportional" to the rank (all have the adapter's scale) or
      "equal" (s_i = alpha / r_i); the factors are averaged as they are.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: Another adapter than LoRA, or an option out of range.
  """
  checks.check_absent(
    "clients of different ranks send whole adapters, for a weighted mean",
    aggregator=aggregator,
    transforms=transforms,
    downlink=downlink,
  )
  low_rank.scale_of(adapter, "zero_padding")
  population = client_ranks.client_ranks(adapter, ranks, client_alpha)

  def combine(state, kept, result, cohort):
    return trees.sub(kept.update["trained"], state.trainable), state.extra

  def metrics(state, new_state, kept, result, cohort):
    rank = kept.messages["rank"]
    first = population.cut(state.trainable, rank)
    return {
      lora_metrics.ERROR: lora_metrics.aggregation_error(
        kept.messages["trained"],
        kept.shares * population.relative_scale(rank),
        low_rank.pairs_of(kept.update["trained"]),
      ),
      **client_ranks.ranked_drift(first, kept, result),
    }

  def bytes_per_client(state):
    num_bytes = population.num_bytes(state.trainable)
    return num_bytes, num_bytes

  return algorithm.federated(
    client_ranks.ranked_update(
      loss, client_optimizer, population, weighting=weighting
    ),
    aggregator=aggregators.keep(),
    server_optimizer=server_optimizer,
    seed=seed,
    num_clients=num_clients,
    server=algorithm.Server(combine=combine, metrics=metrics),
    bytes_per_client=bytes_per_client,
  )
