"""The data and the protocols that the layers pass to each other."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedfm import errors, trees

PyTree = Any
Array = Any  # A jax or NumPy array.
# loss(trainable, base, batch, key) -> (scalar, aux); see `models.losses`.
LossFn = Callable[[PyTree, PyTree, PyTree, Any], tuple[Any, PyTree]]


class LanePart(NamedTuple):
  """Which lanes of a cohort one process packed.

  Attributes:
    num_lanes: Lanes of the whole cohort.
    lanes: Their numbers that are here, ascending.
  """

  num_lanes: int
  lanes: tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cohort:
  """The clients of one round, laid out on lanes.

  A lane runs its clients back to back. A *segment* is a run of steps in which
  no client starts or ends on any lane: starts and ends happen only at segment
  boundaries, so that a step costs nothing for them. Buffers are padded to
  `steps`, `slots` and `clients`; the loop runs `num_segments` segments.
  """

  batches: dict[str, Array]  # shape=(lanes, steps, batch, ...), with "mask"
  slot: Array  # shape=(lanes, steps), dtype=int32: lane-local index of client
  start: Array  # shape=(lanes, steps), dtype=bool: first step of a client
  end: Array  # shape=(lanes, steps), dtype=bool: last step of a client
  boundaries: Array  # shape=(steps + 1,), dtype=int32: where segments begin
  num_segments: Array  # shape=(), dtype=int32
  id_hash: Array  # shape=(lanes, slots, 2), dtype=uint32
  row: Array  # shape=(lanes, slots), dtype=int32: row in a client store
  num_examples: Array  # shape=(lanes, slots), dtype=int32
  num_steps: Array  # shape=(lanes, slots), dtype=int32: local steps
  weight: Array  # shape=(lanes, slots), dtype=float32: 0 where no client is
  rate: Array  # shape=(lanes, slots), dtype=float32: times the learning rate
  order: Array  # shape=(clients,), dtype=int32: lane * slots + slot, or -1
  # Row r of the client store is slot r % slots of lane r // slots.
  aligned: bool = dataclasses.field(default=False, metadata={"static": True})
  # What one process packed, until it is placed on a mesh; None: all lanes.
  part: LanePart | None = dataclasses.field(
    default=None, metadata={"static": True}
  )

  @property
  def num_lanes(self) -> int:
    """Lanes, of all processes once the cohort is placed on a mesh."""
    return self.slot.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientInfo:
  """What a client update may know about its client."""

  key: Array  # typed key of (seed, round, client)
  round: Array  # shape=(), dtype=int32
  row: Array  # shape=(), dtype=int32
  num_examples: Array  # shape=(), dtype=int32
  num_steps: Array  # shape=(), dtype=int32
  weight: Array  # shape=(), dtype=float32
  rate: Array  # shape=(), dtype=float32: multiplies the client's learning rate


class ClientUpdate(NamedTuple):
  """One client's work, written for one client; the engine runs many.

  Attributes:
    start: `start(broadcast, client_state, info) -> carry`.
    step: `step(carry, base, batch, key) -> carry`, one local step.
    finish: `finish(broadcast, carry, info) -> (message, weight, client_state,
      metrics)`; `metrics` is a dict of scalars.
    first: `first(carry, base, batch, key) -> carry`, between start and the
      first step, given that step's batch; None for nothing. What would cost
      something on every step if `step` had to ask whether it is the first.
  """

  start: Callable[..., PyTree]
  step: Callable[..., PyTree]
  finish: Callable[..., tuple[PyTree, Any, PyTree, dict[str, Any]]]
  first: Callable[..., PyTree] | None = None


class Aggregator(NamedTuple):
  """Combines the cohort's messages into one; the only code that sees many.

  Attributes:
    init: `init(message) -> state`, held by the server across rounds.
    add: `add(state, message, weight) -> terms`. Streaming aggregators return
      the terms that the engine sums over clients; stacking ones have None.
    finish: `finish(state, collected) -> (update, state)`, where `collected` is
      the summed terms, or `(messages [clients, ...], weights [clients])`. A
      client of weight 0 is absent.
    stacking: Whether `finish` needs every client's message at once.
    min_clients: A round of fewer clients (masked ones do not count) leaves the
      server as it is: a robust rule holds no promise there.
  """

  init: Callable[[PyTree], PyTree]
  add: Callable[[PyTree, PyTree, Any], PyTree] | None
  finish: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
  stacking: bool = False
  min_clients: int = 1

  def aggregate(self, messages: PyTree, weights: Array) -> PyTree:
    """Aggregates stacked messages, outside of a round.

    Args:
      messages: Tree of arrays [clients, ...].
      weights: [clients]; 0 means absent, as does a non-finite message.

    Returns:
      The aggregate, a tree of arrays [...]; zero where fewer than
      `min_clients` are present and finite.

    Raises:
      ConfigError: Fewer rows than `min_clients`, or not a row a weight.
    """
    weights = jnp.asarray(weights)
    if weights.ndim != 1:
      raise errors.ConfigError(
        f"weights: got shape {weights.shape}, expected one a client"
      )
    for name, x in trees.by_path(messages).items():
      if jnp.shape(x)[:1] != weights.shape:
        raise errors.ConfigError(
          f"messages: got shape {jnp.shape(x)}{f' of {name!r}' * bool(name)}, "
          f"expected {weights.shape[0]} rows, as many as weights"
        )
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    if weights.shape[0] < self.min_clients:
      raise errors.ConfigError(
        f"messages: got {weights.shape[0]} clients, expected at least "
        f"{self.min_clients} for this aggregator"
      )
    finite = jax.lax.map(trees.all_finite, (messages, weights))
    kept = finite & (weights > 0)
    weights = jnp.where(kept, weights, 0)
    messages = jax.tree.map(
      lambda x: jnp.where(kept.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0),
      messages,
    )
    state = self.init(jax.tree.map(lambda x: jnp.zeros_like(x[0]), messages))
    update, _ = self.finish(state, self.collect(state, messages, weights))
    if self.add is not None:
      return update
    enough = jnp.sum(kept) >= self.min_clients
    return trees.select(enough, update, trees.zeros_like(update))

  def collect(self, state: PyTree, messages: PyTree, weights: Array) -> PyTree:
    """Collects stacked messages as the engine would, for `finish`.

    Args:
      state: The aggregator's state.
      messages: Tree of arrays [clients, ...], zero where the weight is.
      weights: [clients].

    Returns:
      The messages and weights as they are, or the summed terms.
    """
    if self.add is None:
      return messages, weights

    def one(terms, client):
      return trees.add(terms, self.add(state, *client)), None

    first = jax.tree.map(lambda x: x[0], (messages, weights))
    zero = trees.zeros_like(self.add(state, *first))
    return jax.lax.scan(one, zero, (messages, weights))[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerState:
  """Everything that a round reads and writes, checkpointed as it is."""

  trainable: PyTree
  server_optimizer: PyTree
  aggregator: PyTree
  clients: PyTree  # client store, leaves [num_clients, ...], or ()
  extra: PyTree  # what the algorithm itself remembers, or ()
  round: Array  # shape=(), dtype=int32: rounds done
  seed: Array  # shape=(), dtype=uint32: of every random number of the rounds
  # What clients know of the broadcast where the way down is compressed, or ().
  sent: PyTree = ()


def _same_trainable(state: ServerState) -> PyTree:
  return state.trainable


class Passes(NamedTuple):
  """What local work costs: how often a batch goes through the model.

  As the code runs it: a masked part of a batch counts as all of it.

  Attributes:
    forwards: Passes forward, a local step.
    backwards: Passes back, a local step. A tangent (`jax.jvp`) is one as well:
      it takes the same products, one for the input's and one for the weight's.
    hessian_products: Passes back through a gradient, a local step.
    first_forwards: Passes forward before the first step of a client.
  """

  forwards: int = 1
  backwards: int = 1
  hessian_products: int = 0
  first_forwards: int = 0


class FederatedAlgorithm(NamedTuple):
  """A federated algorithm as pure functions.

  Attributes:
    init: `init(trainable) -> ServerState` (copies).
    round: `round(state, base, cohort, server_batch=None) -> (state, metrics)`;
      the caller jits it and donates `state`.
    effective_base: `effective_base(state, base) -> base`, the base that the
      trainable of `state` goes with; the identity for most.
    bytes_per_client: `bytes_per_client(state) -> (up, down)`, bytes that one
      client sends and receives in a round.
    effective_trainable: `effective_trainable(state) -> trainable`, the global
      model to evaluate and to export; `state.trainable` for most.
    personal: `personal(state, client_state) -> trainable`, a client's own
      model; None where clients have none.
    client_state: `client_state(trainable) -> state` of a client that never took
      part; None where clients keep no state.
    local_steps: `local_steps(round) -> steps`, the most that a client takes in
      a round; None where the algorithm does not say.
    aligned: Whether the clients are replicas, all of which have a lane and slot
      of their own in every round (`pack(aligned=True)`).
    passes: What a client's work costs, in passes of the model.
  """

  init: Callable[[PyTree], ServerState]
  round: Callable[..., tuple[ServerState, dict[str, Any]]]
  effective_base: Callable[[ServerState, PyTree], PyTree]
  bytes_per_client: Callable[[ServerState], tuple[int, int]]
  effective_trainable: Callable[[ServerState], PyTree] = _same_trainable
  personal: Callable[[ServerState, PyTree], PyTree] | None = None
  client_state: Callable[[PyTree], PyTree] | None = None
  local_steps: Callable[[int], int] | None = None
  aligned: bool = False
  passes: Passes = Passes()
