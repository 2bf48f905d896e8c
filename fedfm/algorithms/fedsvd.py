"""FedSVD (Lee et al. 2025, arXiv 2505.12805): FFA-LoRA with A drawn by an SVD.

  clients train B under one frozen A;    B <- sum_i p_i B_i          exact
  A B = U S V            of rank r at most: nothing is lost
  A <- U (orthonormal),  B <- S V        every `period` rounds       x A B

A follows the principal directions of the updates, and no client's data enters
it but through B: under differential privacy it is post-processing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import errors, trees
from fedfm.adapters import Adapter
from fedfm.algorithms import algorithm, checks, lora_metrics, low_rank
from fedfm.algorithms.ffa_lora import SERVER, expand, train_b
from fedfm.clients import local
from fedfm.types import Aggregator, FederatedAlgorithm, LossFn, PyTree


def fedsvd(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  adapter: Adapter,
  server_optimizer: checks.Absent = None,
  aggregator: Aggregator | None = None,
  weighting: str = "examples",
  period: int = 1,
  split: str = "b",
  report_error: bool = True,
  **options: Any,
) -> FederatedAlgorithm:
  """Trains and averages B, and takes A anew from their product.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    adapter: LoRA.
    server_optimizer: None: its moments of B would be of an earlier A.
    aggregator: Default the weighted mean.
    weighting: "examples", "tokens" or "uniform".
    period: Rounds between SVDs.
    split: Where the singular values go: "b", or "sqrt" to both factors alike
      (worse, by the paper).
    report_error: As in `fedit`.
    **options: `seed`, `num_clients`, `transforms`, `downlink` and others of
      `algorithm.federated`. A new A is sent as it is. What error feedback kept
      at a client is of an earlier A; with it, let the `period` be long.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: Another adapter than LoRA, or an option out of range.
  """
  checks.check_absent(
    "FedSVD draws A anew, which moments of B would not follow",
    server_optimizer=server_optimizer,
  )
  scale = low_rank.scale_of(adapter, "fedsvd")
  if period < 1:
    raise errors.ConfigError(f"period: got {period}, expected at least 1")
  if split not in low_rank.SPLITS:
    raise errors.ConfigError(
      f"split: got {split!r}{errors.nearest(split, low_rank.SPLITS)}"
    )

  def refactor(trainable):
    return low_rank.map_pairs(
      lambda pair: low_rank.truncate(pair, pair["a"].shape[-1], split),
      lambda x: x,
      trainable,
    )

  def after(trainable, extra):
    rounds = extra["rounds"] + 1
    trainable = jax.lax.cond(
      rounds % period == 0, refactor, lambda t: t, trainable
    )
    return trainable, {"rounds": rounds}

  def beside(state):
    """Down, beside B, A where the round before changed it."""
    rounds = algorithm.number(state.extra["rounds"], 0)
    a = trees.num_bytes(low_rank.select(state.trainable, "a", rest=False))
    return 0, a if rounds > 0 and rounds % period == 0 else 0

  server = SERVER._replace(
    init=lambda trainable: {"rounds": jnp.zeros((), jnp.int32)},
    after=after,
    metrics=lambda state, new_state, *rest: {
      "update/norm": lora_metrics.update_norm(scale, state, new_state)
    },
    beside=beside,
  )
  if report_error:
    aggregator, server = lora_metrics.reported(aggregator, server, expand)

  built = algorithm.federated(
    train_b(loss, client_optimizer, weighting),
    aggregator=aggregator,
    server=server,
    **options,
  )
  if options.get("downlink") is None:
    return built

  def round_fn(state, base, cohort, server_batch=None):
    new, metrics = built.round(state, base, cohort, server_batch)
    known, memory = new.sent
    known = _under_new_a(state.trainable, new.trainable, known)
    return dataclasses.replace(new, sent=(known, memory)), metrics

  return built._replace(round=round_fn)


def _under_new_a(before: PyTree, after: PyTree, known: PyTree) -> PyTree:
  """Rewrites the B that clients know; both A span the same columns."""

  def one(old, new, part):
    same = jnp.all(old["a"] == new["a"])
    b = jnp.linalg.pinv(new["a"]) @ low_rank.product({**old, **part})
    return {"b": jnp.where(same, part["b"], b)}

  return low_rank.map_pairs(one, lambda x, y, part: part, before, after, known)
