"""FedRep (Collins et al. 2021, arXiv 2102.07078): head first, then body.

client i   the first steps train local_i with the shared part fixed,
           the others train the shared part with local_i fixed
server     shared <- shared + sum_i p_i delta_i
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedfm import trees
from fedfm.algorithms import checks
from fedfm.algorithms.fedper import join, split, with_local_parts
from fedfm.clients import local
from fedfm.types import FederatedAlgorithm, LossFn

PyTree = Any


class AlternatingState(NamedTuple):
  """Optimizer states of the two parts; whose turn it is.

  Attributes:
    shared: State of the shared part's optimizer.
    kept: State of the local part's.
    step: int32 scalar.
    local_steps: int32 scalar, steps before the shared part's turn.
  """

  shared: PyTree
  kept: PyTree
  step: jax.Array
  local_steps: jax.Array


def alternating(
  optimizer: local.ClientOptimizer, local_parts: Sequence[str]
) -> local.ClientOptimizer:
  """Trains the local parts first, then the others, each by its optimizer."""

  def at_round(round_index):
    inner = local.as_optimizer(optimizer, round_index)

    def init(params):
      shared, kept = split(params, local_parts)
      zero = jnp.zeros((), jnp.int32)
      return AlternatingState(inner.init(shared), inner.init(kept), zero, zero)

    def update(updates, state, params=None):
      grads = split(updates, local_parts)
      params = split(params, local_parts)
      turns = state.step >= state.local_steps, state.step < state.local_steps
      moves, states = [], []
      for g, p, s, turn in zip(grads, params, state[:2], turns):
        move, new = inner.update(g, s, p)
        moves.append(trees.select(turn, move, trees.zeros_like(move)))
        states.append(trees.select(turn, new, s))
      shared, kept = states
      new_state = state._replace(shared=shared, kept=kept, step=state.step + 1)
      return join(*moves), new_state

    return optax.GradientTransformation(init, update)

  return at_round


def fedrep(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  local_parts: tuple[str, ...],
  local_share: float = 0.5,
  weighting: str = "examples",
  num_clients: int | None = None,
  **options: Any,
) -> FederatedAlgorithm:
  """Shares a body, which each client trains with its own parts settled.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    local_parts: Names of what stays with the client, as in `fedper.split`.
    local_share: Share of a client's steps that train its local parts, rounded
      down, in [0, 1).
    weighting: "examples", "tokens" or "uniform".
    num_clients: Size of the population.
    **options: `server_optimizer`, `aggregator`, `seed` and others of
      `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm`; its `init` raises ConfigError where `local_parts`
    do not fit the trainable.

  Raises:
    ConfigError: A share out of range.
  """
  checks.check_number("local_share", local_share, most=1, open_at=(1,))
  client = local.local_update(
    loss, alternating(client_optimizer, local_parts), weighting=weighting
  )

  def start(sent, client_state, info):
    carry = client.start(sent, client_state, info)
    steps = jnp.floor(local_share * info.num_steps).astype(jnp.int32)
    return carry._replace(optimizer=carry.optimizer._replace(local_steps=steps))

  return with_local_parts(
    client._replace(start=start),
    local_parts,
    num_clients=num_clients,
    **options,
  )
