"""A client update, an aggregator and a server optimizer make an algorithm.

Where a paper asks for more, `Server` says what the server remembers, sends and
makes of the aggregate, and `client_state` what each client keeps.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedfm import aggregators, trees
from fedfm.algorithms import checks
from fedfm.algorithms import downlink as downlink_lib
from fedfm.algorithms import round_metrics as metrics_lib
from fedfm.clients import engine, naming, store
from fedfm.clients import transforms as transforms_lib
from fedfm.clients.transforms import MessageTransform
from fedfm.privacy import Mechanism
from fedfm.types import (
  Aggregator,
  ClientUpdate,
  FederatedAlgorithm,
  ServerState,
)

PyTree = Any
# `server_step(trainable, base, server_batch, key) -> trainable`
ServerStep = Callable[[PyTree, PyTree, PyTree, jax.Array], PyTree]
# Folded in after the round, for what the server draws.
_SERVER_KEY = 0xFFFFFFFF
_DOWNLINK_KEY = 0xFFFFFFFE
_PRIVACY_KEY = 0xFFFFFFFD


class Server(NamedTuple):
  """The server's part of an algorithm; the defaults are FedAvg's.

  Attributes:
    init: `init(trainable) -> extra`, what the algorithm remembers in
      `ServerState.extra`.
    broadcast: `broadcast(state) -> tree`, what every client is sent.
    combine: `combine(state, aggregate, result, cohort) -> (delta, extra)`; the
      server optimizer is given the negative delta, like the trainable.
    after: `after(trainable, extra) -> (trainable, extra)`, the last word, after
      the server optimizer.
    effective_base: As in `FederatedAlgorithm`.
    client_base: `client_base(state, base, heard) -> tree`, what the clients'
      steps get as their base: one for all lanes, where a carry is copied to
      each; default `effective_base`. `heard` is the broadcast, as it came
      through a compressed way down.
    metrics: `metrics(state, new_state, aggregate, result, cohort) -> dict` of
      scalars, beside or instead of those of `round_metrics.py`.
    direction: `direction(message) -> tree`, the part of a client's message, and
      of the aggregate, that says where the weights should go; drift is measured
      on it. Where the aggregate is no mean message, `metrics` has the drift.
    wire: `wire(state, sent, message) -> (sent, message)`, the shapes of what
      really travels in the round of `state`, where that is less.
    beside: `beside(state) -> (up, down)`, bytes that travel in the round of
      `state` beside that, uncompressed.
  """

  init: Callable[[PyTree], PyTree] = lambda trainable: ()
  broadcast: Callable[[ServerState], PyTree] = lambda state: state.trainable
  combine: Callable[..., tuple[PyTree, PyTree]] = (
    lambda state, aggregate, result, cohort: (aggregate, state.extra)
  )
  after: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]] = (
    lambda trainable, extra: (trainable, extra)
  )
  effective_base: Callable[..., PyTree] = lambda state, base: base
  client_base: Callable[..., PyTree] | None = None
  metrics: Callable[..., dict[str, jax.Array]] = (
    lambda state, new_state, aggregate, result, cohort: {}
  )
  direction: Callable[[PyTree], PyTree] = lambda message: message
  wire: Callable[..., tuple[PyTree, PyTree]] = lambda state, sent, message: (
    sent,
    message,
  )
  beside: Callable[[ServerState], tuple[int, int]] = lambda state: (0, 0)


def federated(
  update: ClientUpdate,
  *,
  aggregator: Aggregator | None = None,
  server_optimizer: optax.GradientTransformation | None = None,
  seed: int = 0,
  server_step: ServerStep | None = None,
  server: Server | None = None,
  client_state: Callable[[PyTree], PyTree] | None = None,
  num_clients: int | None = None,
  transforms: Sequence[MessageTransform] = (),
  downlink: MessageTransform | None = None,
  mechanism: Mechanism | None = None,
  **fields: Any,
) -> FederatedAlgorithm:
  """Builds an algorithm from its parts.

  Args:
    update: What a client does; its message is a delta of the trainable, or
      what `server.combine` turns into one after aggregation.
    aggregator: Default the weighted mean.
    server_optimizer: Applied to the negative delta, the pseudo-gradient;
      default `optax.sgd(1.0)`, which adds the delta.
    seed: Seed of every random number of the algorithm, in [0, 2**32).
    server_step: Applied to the new trainable where the round gets a
      `server_batch`: data that the server itself holds.
    server: What the server does beside optimizing; default nothing.
    client_state: `client_state(trainable) -> state` of a client that never took
      part, for updates whose clients keep one.
    num_clients: Size of the population; needed where clients keep a state.
    transforms: What is done to every client's message before it leaves, such
      as compression; their states are kept beside the client's own.
    downlink: Compresses what the server sends; see `downlink.py`. It must need
      no error feedback of its own.
    mechanism: Aggregates in a private way, in place of the aggregator; all that
      the server makes of the messages is made of what this releases.
    **fields: `bytes_per_client` (of algorithms that no compression goes with),
      `effective_trainable`, `personal`, `local_steps`, `aligned` and `passes`
      of `FederatedAlgorithm`, where they differ from FedAvg's.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: A seed out of range, client states without `num_clients`, or a
      mechanism with an aggregator.
  """
  if mechanism is not None:
    aggregator = checks.check_mechanism(mechanism, aggregator)
  aggregator = aggregator or aggregators.weighted_mean()
  server_optimizer = server_optimizer or optax.sgd(1.0)
  server = server or Server()
  checks.check_seed(seed)
  if client_state is not None:
    num_clients = checks.check_num_clients(num_clients)
  own_update = update
  if transforms:
    update = transforms_lib.transformed(own_update, *transforms)
  update = metrics_lib.measured(update, server.direction)

  def new_client(state):
    """The state of a client that never took part."""
    own = () if client_state is None else client_state(state.trainable)
    if not transforms:
      return own
    sent = jax.eval_shape(server.broadcast, state)
    message = _zeros(engine.message_like(own_update, sent, own))
    return own, [t.init(message) for t in transforms]

  def own_part(client):
    """A client's state, or a store or slots of them, without transforms'."""
    if isinstance(client, store.InSlots):
      return store.InSlots(own_part(client.states))
    return client[0] if transforms and isinstance(client, tuple) else client

  def own_state(state):
    return dataclasses.replace(state, clients=own_part(state.clients))

  known_shapes = {}  # Asked for every round; tracing them takes milliseconds.

  def sent_and_message(state):
    """Shapes of what a client is sent, and of what it sends back."""
    leaves, treedef = jax.tree.flatten(state)
    key = treedef, tuple((x.shape, x.dtype) for x in leaves)
    if key not in known_shapes:
      sent = jax.eval_shape(server.broadcast, state)
      client = jax.eval_shape(new_client, state)
      known_shapes[key] = sent, engine.message_like(update, sent, client)
    return known_shapes[key]

  def server_state(trainable):
    state = ServerState(
      trainable=trainable,
      server_optimizer=server_optimizer.init(trainable),
      aggregator=(),
      clients=(),
      extra=server.init(trainable),
      round=jnp.zeros((), jnp.int32),
      seed=jnp.asarray(seed, jnp.uint32),
    )
    sent = downlink_lib.init(downlink, server.broadcast(state))
    return dataclasses.replace(state, sent=sent)

  def init(trainable):
    state = server_state(trees.copy(trainable))
    clients = new_client(state)
    if jax.tree.leaves(clients):
      clients = store.init(clients, checks.check_num_clients(num_clients))
    _, message = sent_and_message(state)
    return dataclasses.replace(
      state, clients=clients, aggregator=aggregator.init(_zeros(message))
    )

  client_base = server.client_base or (
    lambda state, base, heard: server.effective_base(state, base)
  )

  def round_fn(state, base, cohort, server_batch=None):
    key = jax.random.key(state.seed)
    round_key = jax.random.fold_in(key, state.round)
    heard, sent = downlink_lib.send(
      downlink,
      server.broadcast(state),
      state.sent,
      jax.random.fold_in(round_key, _DOWNLINK_KEY),
      state.round,
    )
    result = engine.run_cohort(
      update,
      aggregator,
      state.aggregator,
      heard,
      client_base(state, base, heard),
      cohort,
      store.gather(state.clients, cohort),
      key,
      state.round,
    )
    with jax.named_scope("aggregate"):
      aggregate, aggregator_state = aggregator.finish(
        state.aggregator, result.collected
      )
      brought, told = jnp.sum(result.weights > 0) >= aggregator.min_clients, {}
      if mechanism is not None:
        noise_key = jax.random.fold_in(round_key, _PRIVACY_KEY)
        aggregate, aggregator_state, brought, told = mechanism.release(
          aggregate, aggregator_state, result.weights, noise_key
        )
      own_result = result._replace(client_states=own_part(result.client_states))
      delta, extra = server.combine(
        own_state(state), aggregate, own_result, cohort
      )
    with jax.named_scope("server_optimizer"):
      updates, optimizer_state = server_optimizer.update(
        trees.scale(delta, -1),
        state.server_optimizer,
        state.trainable,
      )
      trainable = optax.apply_updates(state.trainable, updates)
      trainable, extra = server.after(trainable, extra)
    # Momentum would move the weights on a round that brought nothing.
    trainable, optimizer_state, aggregator_state, extra, sent = trees.select(
      brought,
      (trainable, optimizer_state, aggregator_state, extra, sent),
      (
        state.trainable,
        state.server_optimizer,
        state.aggregator,
        state.extra,
        state.sent,
      ),
    )
    if server_batch is not None and server_step is not None:
      server_key = jax.random.fold_in(round_key, _SERVER_KEY)
      trainable = server_step(trainable, base, server_batch, server_key)
    kept = isinstance(aggregate, aggregators.Kept)
    mean = server.direction(aggregate.update if kept else aggregate)
    metrics = metrics_lib.round_metrics(result, trees.norm(mean)) | told
    if mechanism is not None:  # Of the mean there is only the noisy one.
      del metrics["drift/cosine"], metrics["drift/diversity"]
    if naming.is_on():
      metrics["clients/nonfinite_mask"] = result.nonfinite
    metrics["update/norm"] = trees.norm(trees.sub(trainable, state.trainable))
    new_state = ServerState(
      trainable=trainable,
      server_optimizer=optimizer_state,
      aggregator=aggregator_state,
      clients=store.scatter(state.clients, cohort, result.client_states),
      extra=extra,
      round=state.round + 1,
      seed=state.seed,
      sent=sent,
    )
    metrics |= server.metrics(
      own_state(state), own_state(new_state), aggregate, own_result, cohort
    )
    return new_state, metrics

  def bytes_per_client(state):
    sent, message = server.wire(state, *sent_and_message(state))
    up, down = trees.num_bytes(message), trees.num_bytes(sent)
    for transform in transforms:
      up = transform.num_bytes(message) if transform.num_bytes else up
    if mechanism is not None and mechanism.num_bytes:
      up = mechanism.num_bytes(message)
    if downlink is not None and downlink.num_bytes:
      down = downlink.num_bytes(sent)
    more_up, more_down = server.beside(state)
    return up + more_up, down + more_down

  has_state = client_state is not None or bool(transforms)
  algorithm = FederatedAlgorithm(
    init=init,
    round=round_fn,
    effective_base=server.effective_base,
    bytes_per_client=bytes_per_client,
    client_state=(lambda t: new_client(server_state(t))) if has_state else None,
  )._replace(**fields)
  personal = algorithm.personal
  if transforms and personal is not None:
    algorithm = algorithm._replace(
      personal=lambda state, client: personal(
        own_state(state), own_part(client)
      )
    )
  return algorithm


def _zeros(shapes: PyTree) -> PyTree:
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def many_rounds(round_fn: Callable[..., Any]) -> Callable[..., Any]:
  """Makes several rounds one program, for rounds shorter than their dispatch.

  Args:
    round_fn: `round(state, base, cohort) -> (state, metrics)`.

  Returns:
    `rounds(state, base, cohorts) -> (state, metrics)`: the leaves of `cohorts`
    and of the metrics lead with the rounds, [rounds, ...]. The cohorts are
    packed with one bucket, so that their buffers agree.
  """

  def rounds_fn(state, base, cohorts):
    return jax.lax.scan(lambda s, c: round_fn(s, base, c), state, cohorts)

  return rounds_fn


def number(x: Any, at_start: float) -> float:
  """Reads a scalar of a state, where what is sent depends on it.

  Args:
    x: Its leaf, an array or a shape.
    at_start: Its value in the first round, taken for a shape.

  Returns:
    The number.
  """
  return at_start if isinstance(x, jax.ShapeDtypeStruct) else float(x)
