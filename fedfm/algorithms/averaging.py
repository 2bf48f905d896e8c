"""Server averaging: evaluates an average of the models of all rounds.

  m <- decay m + (1 - decay) w        after each round (Polyak 1990; an
                                      exponential window instead of all rounds)

Training goes on from w; what is evaluated and exported is m.
"""

import dataclasses

import jax

from fedfm import trees
from fedfm.algorithms.checks import check_number
from fedfm.types import FederatedAlgorithm


def averaged(inner: FederatedAlgorithm, decay: float) -> FederatedAlgorithm:
  """Adds an exponential moving average of the global model to any algorithm.

  Of LoRA it averages the factors, not their products; of an algorithm that
  merges adapters into the base it averages what is left to merge.

  Args:
    inner: The algorithm.
    decay: In [0, 1); 0 is the last model.

  Returns:
    A `FederatedAlgorithm` whose `effective_trainable` is the average.

  Raises:
    ConfigError: A decay out of range.
  """
  check_number("decay", decay, most=1, open_at=(1,))

  def own(state):
    return dataclasses.replace(state, extra=state.extra["own"])

  def init(trainable):
    state = inner.init(trainable)
    mean = trees.copy(inner.effective_trainable(state))
    return dataclasses.replace(state, extra={"own": state.extra, "mean": mean})

  def round_fn(state, base, cohort, server_batch=None):
    new, metrics = inner.round(own(state), base, cohort, server_batch)
    mean = jax.tree.map(
      lambda m, w: (decay * m + (1 - decay) * w).astype(m.dtype),
      state.extra["mean"],
      inner.effective_trainable(new),
    )
    # A round that brought nothing leaves the average as it is, too.
    moved = metrics["update/norm"] > 0
    mean = trees.select(moved, mean, state.extra["mean"])
    extra = {"own": new.extra, "mean": mean}
    return dataclasses.replace(new, extra=extra), metrics

  personal = inner.personal
  return inner._replace(
    init=init,
    round=round_fn,
    effective_base=lambda state, base: inner.effective_base(own(state), base),
    bytes_per_client=lambda state: inner.bytes_per_client(own(state)),
    effective_trainable=lambda state: state.extra["mean"],
    personal=None
    if personal is None
    else lambda state, client_state: personal(own(state), client_state),
  )
