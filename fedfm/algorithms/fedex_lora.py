"""FedEx-LoRA (Singhal et al. 2025, arXiv 2410.09432): the residual is kept.

  A <- sum_i p_i A_i        B <- sum_i p_i B_i            as FedIT
  W <- W + s (sum_i p_i A_i B_i - A B)                    what FedIT misses

Exact; clients go on from A and B. (With A drawn anew and B = 0 instead it would
be FLoRA.)
"""

from typing import Any

import jax.numpy as jnp

from fedfm import aggregators, trees
from fedfm.adapters import Adapter
from fedfm.algorithms import (
  algorithm,
  base_change,
  checks,
  lora_metrics,
  low_rank,
)
from fedfm.clients import local
from fedfm.types import FederatedAlgorithm, LossFn


def fedex_lora(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  adapter: Adapter,
  server_optimizer: checks.Absent = None,
  aggregator: checks.Absent = None,
  weighting: str = "examples",
  residual: str = "dense",
  residual_rank: int = 0,
  **options: Any,
) -> FederatedAlgorithm:
  """Averages the factors and adds what that misses to the base.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    adapter: LoRA.
    server_optimizer: None: the factors are to be the mean.
    aggregator: None, for the same reason.
    weighting: "examples", "tokens" or "uniform".
    residual: "dense", a matrix a kernel, exact; or "low_rank", pairs beside
      kernels that may be quantised, cut to `residual_rank` every round.
    residual_rank: Their rank.
    **options: `seed`, `num_clients`, `transforms`, `downlink` and others of
      `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: Another adapter than LoRA, or an option out of range.
  """
  checks.check_absent(
    "FedEx-LoRA's residual is what the weighted mean of the factors misses",
    server_optimizer=server_optimizer,
    aggregator=aggregator,
  )
  scale = low_rank.scale_of(adapter, "fedex_lora")
  change = base_change.base_change(residual, residual_rank)

  def combine(state, kept, result, cohort):
    trained = low_rank.pairs_of(trees.add(state.trainable, kept.messages))
    mean = low_rank.pairs_of(trees.add(state.trainable, kept.update))
    products = {
      path: low_rank.concat(
        low_rank.weighted_sum(pair, scale * kept.shares),
        low_rank.scaled(mean[path], -scale),
      )
      for path, pair in trained.items()
    }
    rank = adapter.config["rank"] * jnp.sum(kept.shares > 0)
    return kept.update, {
      "change": change.add(state.extra["change"], products),
      "stacked_rank": rank.astype(jnp.float32),
    }

  def metrics(state, new_state, kept, result, cohort):
    added = change.added(new_state.extra["change"], state.extra["change"])
    mean = low_rank.pairs_of(new_state.trainable)
    got = {
      path: low_rank.plus(low_rank.scaled(mean[path], scale), x)
      for path, x in added.items()
    }
    return {
      lora_metrics.ERROR: lora_metrics.aggregation_error(
        trees.add(state.trainable, kept.messages), scale * kept.shares, got
      ),
      "update/norm": lora_metrics.update_norm(scale, state, new_state, added),
    }

  def beside(state):
    """Down, beside the factors, those of the last residual."""
    pairs = trees.num_bytes(low_rank.pairs_of(state.trainable))
    rank = algorithm.number(state.extra["stacked_rank"], 0)
    if residual == "low_rank":
      rank = min(rank, residual_rank)
    return 0, round(pairs * rank / adapter.config["rank"])

  return algorithm.federated(
    local.local_update(loss, client_optimizer, weighting=weighting),
    aggregator=aggregators.keep(),
    server=algorithm.Server(
      init=lambda trainable: {
        "change": change.init(trainable),
        "stacked_rank": jnp.zeros(()),
      },
      combine=combine,
      metrics=metrics,
      effective_base=lambda state, base: change.apply(
        base, state.extra["change"]
      ),
      beside=beside,
    ),
    **options,
  )
