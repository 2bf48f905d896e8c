"""Forward gradients (Baydin et al. 2022, arXiv 2202.08587), federated.

local step:  z ~ N(0, I),  g = <grad L(w), z> by a Jacobian-vector product
             w <- w - lr g z

No activations are kept for a backward pass, and unlike a difference of losses
the slope is exact. The estimate is unbiased; its variance grows with the number
of weights.
"""

from fedfm.algorithms.fedavg import fedavg
from fedfm.clients import estimators
from fedfm.types import FederatedAlgorithm, LossFn, Passes


def forward_gradients(loss: LossFn, **options) -> FederatedAlgorithm:
  """Averages clients that step along random directions, by their slopes.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    **options: Those of `fedavg`; `client_optimizer` is needed.

  Returns:
    A `FederatedAlgorithm`.
  """
  # The tangent is counted as a pass back.
  passes = Passes(forwards=1, backwards=1)
  return fedavg(estimators.forward_mode(loss), passes=passes, **options)
