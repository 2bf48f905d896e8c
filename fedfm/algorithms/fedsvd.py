"""FedSVD (Lee et al. 2025, arXiv 2505.12805): FFA-LoRA with A drawn by an SVD.

  clients train B under one frozen A;    B <- sum_i p_i B_i          exact
  A B = U S V            of rank r at most: nothing is lost
  A <- U (orthonormal),  B <- S V        every `period` rounds       x A B

A follows the principal directions of the updates, and no client's data enters
it but through B: under differential privacy it is post-processing.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fedfm import errors, trees
from fedfm.adapters import Adapter
from fedfm.algorithms import algorithm, lora_metrics, low_rank
from fedfm.algorithms.ffa_lora import SERVER, expand, train_b
from fedfm.clients import local
from fedfm.clients.transforms import MessageTransform
from fedfm.types import Aggregator, FederatedAlgorithm, LossFn


def fedsvd(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  adapter: Adapter,
  aggregator: Aggregator | None = None,
  weighting: str = "examples",
  seed: int = 0,
  num_clients: int | None = None,
  transforms: Sequence[MessageTransform] = (),
  period: int = 1,
  split: str = "b",
  report_error: bool = True,
) -> FederatedAlgorithm:
  """Trains and averages B, and takes A anew from their product.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    adapter: LoRA.
    aggregator: Default the weighted mean.
    weighting: "examples", "tokens" or "uniform".
    seed: Seed in [0, 2**32).
    num_clients: Size of the population, for transforms with a state.
    transforms: What is done to the clients' messages, such as compression.
    period: Rounds between SVDs.
    split: Where the singular values go: "b", or "sqrt" to both factors alike
      (worse, by the paper).
    report_error: As in `fedit`.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: Another adapter than LoRA, or an option out of range.
  """
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

  server = SERVER._replace(
    init=lambda trainable: {"rounds": jnp.zeros((), jnp.int32)},
    after=after,
    metrics=lambda state, new_state, *rest: {
      "update/norm": lora_metrics.update_norm(scale, state, new_state)
    },
  )
  if report_error:
    aggregator, server = lora_metrics.reported(aggregator, server, expand)

  def bytes_per_client(state):
    """Up B; down B, and A where the round before changed it."""
    rounds = algorithm.number(state.extra["rounds"], 0)
    b = trees.num_bytes(low_rank.select(state.trainable, "b"))
    new_a = rounds > 0 and rounds % period == 0
    return b, trees.num_bytes(state.trainable) if new_a else b

  return algorithm.federated(
    train_b(loss, client_optimizer, weighting),
    aggregator=aggregator,
    seed=seed,
    num_clients=num_clients,
    transforms=transforms,
    server=server,
    bytes_per_client=bytes_per_client,
  )
