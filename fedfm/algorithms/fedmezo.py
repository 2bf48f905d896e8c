"""FedMeZO (Ling et al. 2024, arXiv 2402.05926): FedAvg of zeroth-order steps.

local step:  z ~ N(0, I),  g = (L(w + eps z) - L(w - eps z)) / (2 eps)
             w <- w - lr g z

Clients need the memory of inference only. Made for LoRA, whose few weights keep
the noise of the estimate small; every trainable goes.
"""

from fedfm.algorithms.fedavg import fedavg
from fedfm.clients import estimators
from fedfm.types import FederatedAlgorithm, LossFn, Passes


def fedmezo(
  loss: LossFn, *, epsilon: float = 1e-3, **options
) -> FederatedAlgorithm:
  """Averages clients that step along random directions.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    epsilon: Distance of the two points that a slope is measured from.
    **options: Those of `fedavg`; `client_optimizer` is needed, SGD in the
      paper.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: An epsilon that is not above 0.
  """
  return fedavg(
    estimators.zeroth_order(loss, epsilon),
    passes=Passes(forwards=2, backwards=0),
    **options,
  )
