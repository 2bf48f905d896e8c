"""Photon's recipe (Sani et al. 2024, arXiv 2411.02908): DiLoCo, averaging only.

w <- sum_m p_m w_m,   w_m after H steps of AdamW from w

The outer optimizer is plain averaging, eta = 1 and mu = 0. What makes it work
is in the config (`configs/photon.py`): small batches and a learning rate as
high as averaging over replicas bears. AdamW's state is kept with the replica,
as in DiLoCo.
"""

import optax

from fedfm.algorithms.diloco import diloco
from fedfm.types import FederatedAlgorithm, LossFn


def photon(
  loss: LossFn,
  *,
  server_optimizer: optax.GradientTransformation | None = None,
  **options,
) -> FederatedAlgorithm:
  """Averages replicas whose AdamW states are kept.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    server_optimizer: Outer optimizer, default `optax.sgd(1.0)`.
    **options: Those of `diloco`; `client_optimizer` is needed.

  Returns:
    A `FederatedAlgorithm`.
  """
  return diloco(
    loss, server_optimizer=server_optimizer or optax.sgd(1.0), **options
  )
