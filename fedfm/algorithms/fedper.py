"""FedPer (Arivazhagan et al. 2019, arXiv 1912.00818): private parts.

  client i   trains (shared, local_i), sends the delta of shared, keeps local_i
  server     shared <- shared + sum_i p_i delta_i

FedBN (Li et al. 2021, arXiv 2102.07623) is the same with the norms private.
"""

from collections.abc import Sequence
import re
from typing import Any

import jax

from fedfm import errors, trees
from fedfm.algorithms import algorithm
from fedfm.clients import local
from fedfm.types import ClientUpdate, FederatedAlgorithm, LossFn

PyTree = Any


def split(
  trainable: PyTree, local_parts: Sequence[str]
) -> tuple[PyTree, PyTree]:
  """Splits a trainable into what is shared and what stays with a client.

  Args:
    trainable: Arrays or shapes.
    local_parts: Names of what stays: whole words of paths, such as "head",
      "layers/q_proj" or "b", the second factor of LoRA.

  Returns:
    (shared, local), each like the trainable with None for the other's leaves.

  Raises:
    ConfigError: A name that no path holds, or nothing left to share.

  Examples:
    >>> split({"body": {"w": 1}, "head": {"w": 2}}, ["head"])
    ({'body': {'w': 1}, 'head': {'w': None}}, \
{'body': {'w': None}, 'head': {'w': 2}})
  """
  if not local_parts or isinstance(local_parts, str):
    raise errors.ConfigError(
      f"local_parts: got {local_parts!r}, expected a list of names"
    )
  leaves, treedef = jax.tree.flatten(trainable)
  paths = trees.paths(trainable)
  for name in local_parts:
    if not any(_holds(path, name) for path in paths):
      known = {part for path in paths for part in path.split("/")}
      raise errors.ConfigError(
        f"local_parts: the trainable has no {name!r}"
        f"{errors.nearest(name, known)}"
      )
  stays = [any(_holds(path, name) for name in local_parts) for path in paths]
  if all(stays):
    raise errors.ConfigError(
      f"local_parts: got {list(local_parts)}, which leave nothing to share"
    )
  shared = [None if s else x for s, x in zip(stays, leaves)]
  kept = [x if s else None for s, x in zip(stays, leaves)]
  return treedef.unflatten(shared), treedef.unflatten(kept)


def _holds(path: str, name: str) -> bool:
  """Whether a name is in a path, with no other letters next to it."""
  return re.search(rf"(^|[/_]){re.escape(name)}($|[/_])", path) is not None


def join(shared: PyTree, kept: PyTree) -> PyTree:
  """Puts the two results of `split` together again."""
  return jax.tree.map(
    lambda s, k: k if s is None else s,
    shared,
    kept,
    is_leaf=lambda x: x is None,
  )


def with_local_parts(
  client: ClientUpdate, local_parts: Sequence[str], **options: Any
) -> FederatedAlgorithm:
  """Federates a local update that leaves a part of the weights at home.

  Args:
    client: From `local_update`; trains the whole trainable.
    local_parts: As in `split`.
    **options: Those of `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm` whose clients keep their local part. One that never
    took part has the initial one, as has `ServerState.trainable`.
  """

  def start(shared, kept, info):
    return client.start(join(shared, kept), (), info)

  def finish(shared, carry, info):
    _, kept = split(carry.trainable, local_parts)
    delta, weight, _, metrics = client.finish(join(shared, kept), carry, info)
    return split(delta, local_parts)[0], weight, kept, metrics

  def combine(state, mean, result, cohort):
    _, kept = split(state.trainable, local_parts)
    return join(mean, trees.zeros_like(kept)), state.extra

  return algorithm.federated(
    ClientUpdate(start, client.step, finish),
    server=algorithm.Server(
      broadcast=lambda state: split(state.trainable, local_parts)[0],
      combine=combine,
    ),
    client_state=lambda trainable: split(trainable, local_parts)[1],
    personal=lambda state, kept: join(
      split(state.trainable, local_parts)[0], kept
    ),
    **options,
  )


def fedper(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  local_parts: tuple[str, ...],
  weighting: str = "examples",
  num_clients: int | None = None,
  **options: Any,
) -> FederatedAlgorithm:
  """Shares a body and leaves each client its own parts.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    local_parts: Names of what stays with the client, as in `split`.
    weighting: "examples", "tokens" or "uniform".
    num_clients: Size of the population.
    **options: `server_optimizer`, `aggregator`, `seed` and others of
      `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm`; its `init` raises ConfigError where `local_parts`
    do not fit the trainable.
  """
  client = local.local_update(loss, client_optimizer, weighting=weighting)
  return with_local_parts(
    client, local_parts, num_clients=num_clients, **options
  )


def fedbn(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  local_parts: tuple[str, ...] = ("norm",),
  **options: Any,
) -> FederatedAlgorithm:
  """FedBN: `fedper` with the norms' parameters staying with the client."""
  return fedper(
    loss, client_optimizer=client_optimizer, local_parts=local_parts, **options
  )
