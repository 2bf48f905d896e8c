"""Tiny problems, and a round as a plain Python loop to hold the engine to."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedfm import data
from fedfm.clients import engine
from fedfm.data import packing
from fedfm.types import ClientInfo, ServerState

# Heavy-tailed, with one client smaller than a batch and partial last batches.
SIZES = (21, 9, 6, 4, 3, 2, 1, 1)
BATCH = 4
COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "all-to-all",
  "reduce-scatter",
  "collective-permute",
)


def client_ids(sizes=SIZES):
  """Names of the clients, one per size."""
  return [f"client {i}" for i in range(len(sizes))]


def mlp_source(sizes=SIZES, features=5, dtype=np.float32):
  """Clients with examples x [features] and targets y, each of its own kind."""
  clients = {}
  for index, size in enumerate(sizes):
    rng = np.random.default_rng([7, index])
    clients[f"client {index}"] = {
      "x": (rng.normal(size=(size, features)) + index % 3).astype(dtype),
      "y": rng.normal(size=size).astype(dtype),
    }
  return data.from_arrays(clients)


def mlp_params(features=5, hidden=6, dtype=jnp.float32):
  """A user's own pytree, with a list and a tuple in it."""
  rng = np.random.default_rng(3)

  def draw(*shape):
    return jnp.asarray(0.5 * rng.normal(size=shape), dtype)

  return {"in": [draw(features, hidden), draw(hidden)], "out": (draw(hidden),)}


def mlp_loss(params, base, batch, key):
  """Mean squared error of an MLP."""
  del key
  w, b = params["in"]
  hidden = jnp.tanh(batch["x"] @ w + b + base["shift"])
  squares = jnp.square(hidden @ params["out"][0] - batch["y"]) * batch["mask"]
  return jnp.sum(squares) / jnp.maximum(jnp.sum(batch["mask"]), 1), {}


def mlp_base(dtype=jnp.float32):
  """The frozen part of the MLP."""
  return {"shift": jnp.asarray(0.1, dtype)}


def client_batches(examples, batch_size=BATCH, epochs=1):
  """Yields a client's padded batches in stored order."""
  size = len(next(iter(examples.values())))
  for _ in range(epochs):
    for begin in range(0, size, batch_size):
      rows = {k: x[begin : begin + batch_size] for k, x in examples.items()}
      count = len(next(iter(rows.values())))
      batch = {
        k: np.concatenate(
          [x, np.zeros((batch_size - count, *x.shape[1:]), x.dtype)]
        )
        for k, x in rows.items()
      }
      mask = np.arange(batch_size) < count
      yield batch | {"mask": mask.astype(np.float32)}


def client_key(client_id, round_index=0, seed=0):
  """The key of a client in a round: folded in, never arithmetic on seeds."""
  key = jax.random.fold_in(jax.random.key(seed), round_index)
  for word in packing.id_hash(client_id):
    key = jax.random.fold_in(key, word)
  return key


@functools.cache
def _optax_step(loss, optimizer):
  @jax.jit
  def step(params, state, base, batch, key):
    grads, _ = jax.grad(loss, has_aux=True)(params, base, batch, key)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step


def client_delta(
    loss, optimizer, trainable, base, source, client_id, *,
    epochs=1, batch_size=BATCH,
):  # fmt: skip
  """One client of round 0, by a plain loop of optax steps; its delta."""
  key, step = client_key(client_id), _optax_step(loss, optimizer)
  params, state = trainable, optimizer.init(trainable)
  batches = client_batches(source.read(client_id), batch_size, epochs)
  for index, batch in enumerate(batches):
    step_key = jax.random.fold_in(key, index)
    params, state = step(params, state, base, batch, step_key)
  return jax.tree.map(jnp.subtract, params, trainable)


def run_cohort_by_loop(
    update, aggregator, aggregator_state, broadcast, base, cohort,
    client_states, key, round_index,
):  # fmt: skip
  """`engine.run_cohort` as plain Python: one client after another, no jit."""
  count = int(np.sum(np.asarray(cohort.order) >= 0))
  slots = cohort.row.shape[1]
  round_key = jax.random.fold_in(key, round_index)
  states = jax.tree.map(np.array, client_states)
  rows = []
  for position in range(count):
    lane, steps = rows_of(cohort, position)
    at = lane, int(cohort.order[position]) % slots
    client_key = round_key
    for word in cohort.id_hash[at]:
      client_key = jax.random.fold_in(client_key, word)
    fields = ("row", "num_examples", "num_steps", "weight", "rate")
    info = ClientInfo(
      key=client_key,
      round=jnp.asarray(round_index),
      **{f: jnp.asarray(getattr(cohort, f)[at]) for f in fields},
    )
    own = jax.tree.map(lambda x, at=at: jnp.asarray(x[at]), states)
    carry = update.start(broadcast, own, info)
    for index, t in enumerate(range(steps.start, steps.stop)):
      batch = {k: jnp.asarray(x[lane, t]) for k, x in cohort.batches.items()}
      step_key = jax.random.fold_in(client_key, index)
      if index == 0 and update.first is not None:
        carry = update.first(carry, base, batch, step_key)
      carry = update.step(carry, base, batch, step_key)
    message, weight, own, metrics = update.finish(broadcast, carry, info)
    for old, new in zip(jax.tree.leaves(states), jax.tree.leaves(own)):
      old[at] = new
    rows.append((message, weight * info.weight, metrics))
  padding = len(cohort.order) - count

  def stack(*x):
    return jnp.concatenate([jnp.stack(x), jnp.zeros((padding, *x[0].shape))])

  messages, weights, metrics = jax.tree.map(stack, *rows)
  if aggregator.stacking:
    collected = messages, weights
  else:
    terms = [aggregator.add(aggregator_state, m, w) for m, w, _ in rows]
    collected = jax.tree.map(lambda *x: sum(x), *terms)
  return engine.CohortResult(
    collected=collected,
    client_states=jax.tree.map(jnp.asarray, states),
    weights=weights,
    metrics=metrics,
    nonfinite=jnp.zeros(len(weights), bool),
    present=weights > 0,
  )


def flat(tree):
  """All leaves as one float64 vector."""
  return np.concatenate(
    [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  )


def relative_error(new, expected, old):
  """Error of the update new - old, relative to the norm of the expected one."""
  new, expected, old = flat(new), flat(expected), flat(old)
  return np.linalg.norm(new - expected) / np.linalg.norm(expected - old)


def state_bytes(state: ServerState):
  """The bytes of every leaf, to compare states bitwise."""
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def with_weights(cohort, weights):
  """Sets the weights of a one-process cohort's clients, in order of ids."""
  weight = np.array(cohort.weight)
  for position, value in weights.items():
    weight.reshape(-1)[cohort.order[position]] = value
  return dataclasses.replace(cohort, weight=weight)


def rows_of(cohort, position):
  """Index of the steps of one client: (lane, slice of steps)."""
  lane, slot = divmod(int(cohort.order[position]), cohort.row.shape[1])
  starts = cohort.start[lane] & (cohort.slot[lane] == slot)
  begin = int(np.flatnonzero(starts)[0])
  return lane, slice(begin, begin + int(cohort.num_steps[lane, slot]))


def check_message(error, words):
  """Asserts that an error is one line that holds every word."""
  message = str(error)
  assert "\n" not in message
  for word in words:
    assert word in message


def sizes_of_collectives(text, names=COLLECTIVES):
  """Elements of every floating array that collectives of an HLO text give."""
  sizes = []
  pattern = rf"= (.*?) (?:{'|'.join(names)})(?:-start)?\("
  for shapes in re.findall(pattern, text):
    for dims in re.findall(r"\bb?f\d+\[([\d,]*)\]", shapes):
      sizes.append(int(np.prod([int(d) for d in dims.split(",") if d])))
  return sizes


def assert_one_line(error, *parts):
  """Checks that an exception's message is one line with these parts."""
  message = str(error.value)
  assert "\n" not in message
  for part in parts:
    assert part in message


def numbered(sizes):
  """Clients whose examples say whose and which they are."""
  return data.from_arrays(
    {
      f"client {c}": {
        "id": 1000 * c + np.arange(size, dtype=np.int32),
        "x": np.ones((size, 2), np.float32),
      }
      for c, size in enumerate(sizes)
    }
  )
