"""FlexLoRA (Bai et al. 2024, arXiv 2402.11505): an SVD of the mean product.

  M = sum_i p_i s_i A_i B_i = U S V            clients of ranks r_i, x A B
  A = U[:, :r],  B = S[:r] V[:r] / s           client j is sent the first r_j

M is never formed: with [A_1 .. A_n] = Q_a R_a and [B_1; .. ; B_n]^T = Q_b R_b
its SVD is that of R_a R_b^T between Q_a and Q_b^T.
"""

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
from fedfm.types import FederatedAlgorithm, LossFn


def flexlora(
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
  split: str = "b",
) -> FederatedAlgorithm:
  """Cuts the mean of the clients' products back to the adapter's rank.

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
    client_alpha: "proportional" to the rank (all have the adapter's scale) or
      "equal" (s_i = alpha / r_i).
    split: Where the singular values go: "b" as in the paper, A is then
      orthonormal; "sqrt" to both factors alike.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: Another adapter than LoRA, or an option out of range.
  """
  checks.check_absent(
    "FlexLoRA's factors are an SVD of the mean product of whole adapters",
    server_optimizer=server_optimizer,
    aggregator=aggregator,
    transforms=transforms,
    downlink=downlink,
  )
  scale = low_rank.scale_of(adapter, "flexlora")
  population = client_ranks.client_ranks(adapter, ranks, client_alpha)
  if split not in low_rank.SPLITS:
    raise errors.ConfigError(
      f"split: got {split!r}{errors.nearest(split, low_rank.SPLITS)}"
    )

  def begin(broadcast, rank, info):
    # s_j (A B_j) is to be what s (A B) is: B in the client's own scale.
    relative = population.relative_scale(rank)
    own = low_rank.map_pairs(
      lambda pair: low_rank.scaled(pair, 1 / relative), lambda x: x, broadcast
    )
    return population.cut(own, rank)

  def weights(kept):
    return kept.shares * population.relative_scale(kept.messages["rank"])

  def combine(state, kept, result, cohort):
    stacked, weight = kept.messages["trained"], weights(kept)

    def one(pair, mean, clients):
      del mean
      product = low_rank.weighted_sum(clients, weight)
      cut = low_rank.truncate(product, population.highest, split)
      return trees.sub(cut, pair)

    delta = low_rank.map_pairs(
      one,
      lambda x, mean, clients: mean - x,
      state.trainable,
      kept.update["trained"],
      stacked,
    )
    return delta, state.extra

  def metrics(state, new_state, kept, result, cohort):
    first = begin(state.trainable, kept.messages["rank"], None)
    return {
      lora_metrics.ERROR: lora_metrics.aggregation_error(
        kept.messages["trained"],
        weights(kept),
        low_rank.pairs_of(new_state.trainable),
      ),
      "update/norm": lora_metrics.update_norm(scale, state, new_state),
      **client_ranks.ranked_drift(first, kept, result),
    }

  def bytes_per_client(state):
    num_bytes = population.num_bytes(state.trainable)
    return num_bytes, num_bytes

  return algorithm.federated(
    client_ranks.ranked_update(
      loss, client_optimizer, population, weighting=weighting, begin=begin
    ),
    aggregator=aggregators.keep(),
    seed=seed,
    num_clients=num_clients,
    server=algorithm.Server(combine=combine, metrics=metrics),
    bytes_per_client=bytes_per_client,
  )
