"""FedDPA (Yang et al. 2024, arXiv 2403.19211): a global and a local adapter.

  y = x W + (1 - a) s x A_g B_g + a s x A_i B_i        (A_i, B_i) of client i

The global adapter is averaged. The local one is trained on top of the global
one as it was sent, with a fixed: in every round, beside the global one
(FedDPA-T), or once the global one is done (FedDPA-F). For an a of each text at
hand see `dual_adapter.instance_weights`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedfm import errors, trees
from fedfm.adapters import Adapter
from fedfm.algorithms import algorithm, checks, lora_metrics, low_rank
from fedfm.algorithms.dual_adapter import mixed
from fedfm.clients import local
from fedfm.types import (
  Aggregator,
  ClientUpdate,
  FederatedAlgorithm,
  LossFn,
  Passes,
  PyTree,
)

_LOCAL = 1  # Folded into the key of a step, for the local adapter.


def _pairs(trainable: PyTree) -> PyTree:
  return low_rank.map_pairs(lambda pair: pair, lambda x: None, trainable)


def _check_weight(weight: float) -> None:
  if not 0 <= weight <= 1:
    raise errors.ConfigError(
      f"local_weight: got {weight}, expected 0 <= local_weight <= 1"
    )


def _updates(
  loss: LossFn,
  client_optimizer: local.ClientOptimizer,
  weighting: str,
  local_weight: float,
) -> tuple[ClientUpdate, ClientUpdate]:
  """Local work on the global adapter, and on the client's own.

  The base of both is (base, the trainable that was sent).
  """

  def shared_loss(trainable, base_and_sent, batch, key):
    return loss(trainable, base_and_sent[0], batch, key)

  def own_loss(pairs, base_and_sent, batch, key):
    base, sent = base_and_sent
    key = jax.random.fold_in(key, _LOCAL)
    return loss(mixed(sent, pairs, local_weight), base, batch, key)

  def update(loss_fn):
    return local.local_update(loss_fn, client_optimizer, weighting=weighting)

  return update(shared_loss), update(own_loss)


def _personal(local_weight):
  return lambda state, own: mixed(state.trainable, own, local_weight)


def feddpa_t(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  adapter: Adapter,
  num_clients: int,
  server_optimizer: optax.GradientTransformation | None = None,
  aggregator: Aggregator | None = None,
  weighting: str = "examples",
  local_weight: float = 0.5,
  report_error: bool = True,
  **options: Any,
) -> FederatedAlgorithm:
  """Trains the global and the local adapter in every round.

  Each step trains both on its batch, the local one on top of the global one as
  it was sent: the same as one after the other over the same batches.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    adapter: LoRA.
    num_clients: Size of the population, whose local adapters are kept.
    server_optimizer: Applied to the pseudo-gradient; default `optax.sgd(1.0)`.
    aggregator: Default the weighted mean.
    weighting: "examples", "tokens" or "uniform".
    local_weight: a, in training and in `personal`.
    report_error: As in `fedit`, of the global adapter.
    **options: `seed`, `transforms`, `downlink` and others of
      `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm`, whose `personal` models are a client's own.

  Raises:
    ConfigError: Another adapter than LoRA, or a weight out of [0, 1].
  """
  low_rank.scale_of(adapter, "feddpa_t")
  _check_weight(local_weight)
  shared, own = _updates(loss, client_optimizer, weighting, local_weight)

  def start(broadcast, client_state, info):
    return shared.start(broadcast, (), info), own.start(client_state, (), info)

  def step(carry, base_and_sent, batch, key):
    first, second = carry
    return (
      shared.step(first, base_and_sent, batch, key),
      own.step(second, base_and_sent, batch, key),
    )

  def finish(broadcast, carry, info):
    first, second = carry
    delta, weight, _, metrics = shared.finish(broadcast, first, info)
    return delta, weight, second.trainable, metrics

  server = algorithm.Server(
    client_base=lambda state, base, heard: (base, heard)
  )
  if report_error:
    aggregator, server = lora_metrics.reported(
      aggregator, server, lambda state, delta: delta
    )
  return algorithm.federated(
    ClientUpdate(start, step, finish),
    aggregator=aggregator,
    server_optimizer=server_optimizer,
    server=server,
    client_state=_pairs,
    num_clients=num_clients,
    personal=_personal(local_weight),
    passes=Passes(forwards=2, backwards=2),
    **options,
  )


class PhaseState(NamedTuple):
  """A server optimizer's state, and how many rounds brought something."""

  inner: PyTree
  rounds: jax.Array  # shape=(), dtype=int32


def first_rounds(
  optimizer: optax.GradientTransformation, rounds: int
) -> optax.GradientTransformation:
  """Steps in the first rounds alone: momentum moves nothing later.

  Args:
    optimizer: Any optax transformation.
    rounds: How many.

  Returns:
    An optax transformation.
  """

  def init(params):
    return PhaseState(optimizer.init(params), jnp.zeros((), jnp.int32))

  def update(updates, state, params=None):
    stepped = optimizer.update(updates, state.inner, params)
    updates, inner = trees.select(
      state.rounds < rounds, stepped, (trees.zeros_like(updates), state.inner)
    )
    return updates, PhaseState(inner, state.rounds + 1)

  return optax.GradientTransformation(init, update)


def feddpa_f(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  adapter: Adapter,
  num_clients: int,
  global_rounds: int,
  server_optimizer: optax.GradientTransformation | None = None,
  aggregator: Aggregator | None = None,
  transforms: checks.Absent = (),
  downlink: checks.Absent = None,
  weighting: str = "examples",
  seed: int = 0,
  local_weight: float = 0.5,
  report_error: bool = True,
) -> FederatedAlgorithm:
  """Trains the global adapter first; afterwards clients train their own.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    adapter: LoRA.
    num_clients: Size of the population, whose local adapters are kept.
    global_rounds: Rounds of the global adapter, of those that brought
      something; all later ones are of the local adapters, and send nothing.
    server_optimizer: Of the global adapter; default `optax.sgd(1.0)`.
    aggregator: Default the weighted mean.
    transforms: (), and no `downlink`: what compression still owes after the
      last round of the global adapter would never be sent.
    weighting: "examples", "tokens" or "uniform".
    seed: Seed in [0, 2**32).
    local_weight: a, in training and in `personal`.
    report_error: As in `fedit`, of the global adapter.

  Returns:
    A `FederatedAlgorithm`, whose `personal` models are a client's own.

  Raises:
    ConfigError: Another adapter than LoRA, or an option out of range.
  """
  checks.check_absent(
    "FedDPA-F sends nothing after its global rounds, not what compression "
    "still owes",
    transforms=transforms,
    downlink=downlink,
  )
  low_rank.scale_of(adapter, "feddpa_f")
  _check_weight(local_weight)
  if global_rounds < 1:
    raise errors.ConfigError(
      f"global_rounds: got {global_rounds}, expected at least 1"
    )
  shared, own = _updates(loss, client_optimizer, weighting, local_weight)

  def start(broadcast, client_state, info):
    return shared.start(broadcast, (), info), own.start(client_state, (), info)

  def step(carry, base_sent_and_phase, batch, key):
    *base_and_sent, is_global = base_sent_and_phase

    def train_shared(carry):
      first, second = carry
      return shared.step(first, base_and_sent, batch, key), second

    def train_own(carry):
      first, second = carry
      return first, own.step(second, base_and_sent, batch, key)

    # The phase is the same on all lanes: under vmap this stays a branch.
    return jax.lax.cond(is_global, train_shared, train_own, carry)

  def finish(broadcast, carry, info):
    first, second = carry
    both = first._replace(
      loss_sum=first.loss_sum + second.loss_sum,
      count=first.count + second.count,
    )
    delta, weight, _, metrics = shared.finish(broadcast, both, info)
    return delta, weight, second.trainable, metrics

  server = algorithm.Server(
    client_base=lambda state, base, heard: (
      base,
      heard,
      state.server_optimizer.rounds < global_rounds,
    )
  )
  if report_error:
    aggregator, server = lora_metrics.reported(
      aggregator, server, lambda state, delta: delta
    )

  def bytes_per_client(state):
    """Up the global adapter while it trains; down it once more after that."""
    num_bytes = trees.num_bytes(state.trainable)
    done = algorithm.number(state.server_optimizer.rounds, 0) - global_rounds
    return num_bytes if done < 0 else 0, num_bytes if done <= 0 else 0

  return algorithm.federated(
    ClientUpdate(start, step, finish),
    aggregator=aggregator,
    server_optimizer=first_rounds(
      server_optimizer or optax.sgd(1.0), global_rounds
    ),
    seed=seed,
    server=server,
    client_state=_pairs,
    num_clients=num_clients,
    personal=_personal(local_weight),
    bytes_per_client=bytes_per_client,
  )
