"""The lane engine: runs a cohort's clients on lanes, inside one jit.

The only place in fedfm that vmaps over clients. A lane runs its clients back to
back; memory grows with the lanes, not with the cohort. See `types.Cohort` for
the layout and `data.packing` for how it is made.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedfm import trees
from fedfm.clients import deterministic
from fedfm.types import Aggregator, ClientInfo, ClientUpdate, Cohort

PyTree = Any
_UNCONSTRAINED = jax.P.UNCONSTRAINED


class CohortResult(NamedTuple):
  """What the cohort brought back.

  Attributes:
    collected: Summed terms (streaming) or (messages, weights) (stacking), for
      `Aggregator.finish`.
    client_states: Leaves [lanes, slots, ...], as the clients left them.
    weights: [clients], 0 for absent and for masked clients.
    metrics: Leaves [clients], one scalar per client and name.
    nonfinite: [clients] bool, clients whose message or loss was not finite.
    present: [clients] bool, clients with a weight above 0, masked or not.
  """

  collected: PyTree
  client_states: PyTree
  weights: jax.Array
  metrics: dict[str, jax.Array]
  nonfinite: jax.Array
  present: jax.Array


def over_lanes(fn: Callable, in_axes: Any = 0) -> Callable:
  """The project's one vmap over clients; splits lanes over axis `clients`."""
  mesh = jax.sharding.get_abstract_mesh()
  on_mesh = not mesh.empty and "clients" in mesh.axis_names
  return jax.vmap(
    fn, in_axes=in_axes, spmd_axis_name="clients" if on_mesh else None
  )


def _split_lanes(tree: PyTree) -> PyTree:
  """Constrains leaves [lanes, ...] to mesh axis `clients`, rest as it comes."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or "clients" not in mesh.axis_names:
    return tree

  def one(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return x
    spec = jax.P("clients", *(_UNCONSTRAINED,) * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, spec)

  return jax.tree.map(one, tree)


def _zeros(fn: Callable, *args) -> PyTree:
  """Zeros shaped like `fn(*args)`; for keys, any key."""
  return jax.tree.map(
    lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, *args)
  )


def _mask_rows(batch: PyTree) -> PyTree:
  """Zeroes padded examples, so that their content (a NaN too) is never read."""
  mask = batch["mask"] > 0

  def one(x):
    rows = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    return jnp.where(rows, x, jnp.zeros((), x.dtype))

  return jax.tree.map(one, batch)


def _where_lane(flags: jax.Array, on_true: PyTree, on_false: PyTree) -> PyTree:
  """Selects per lane; leaves are [lanes, ...] and flags [lanes]."""
  return over_lanes(trees.select)(flags, on_true, on_false)


def run_cohort(
  update: ClientUpdate,
  aggregator: Aggregator,
  aggregator_state: PyTree,
  broadcast: PyTree,
  base: PyTree,
  cohort: Cohort,
  client_states: PyTree,
  key: jax.Array,
  round_index: jax.Array | np.ndarray | np.integer,
) -> CohortResult:
  """Runs every client of a cohort and collects what they send.

  Args:
    update: One client's work.
    aggregator: Decides what is kept: sums, or every message.
    aggregator_state: The aggregator's state, read by `add`.
    broadcast: What the server sends to every client.
    base: Frozen weights, or anything else that `step` reads.
    cohort: The clients' data on lanes.
    client_states: Leaves [lanes, slots, ...], or () for stateless clients.
    key: Typed key; a client's key is `fold_in` of it with round and id.
    round_index: int32 scalar.

  Returns:
    A `CohortResult`. Clients of weight 0, and those that return a non-finite
    message, weight or metric, count for nothing and keep their state.
  """
  cohort = jax.tree.map(jnp.asarray, cohort)  # NumPy's, outside of a jit.
  brought = deterministic.given()
  if brought is not None:
    return _collect(aggregator, cohort, brought)
  round_key = jax.random.fold_in(key, round_index)
  num_lanes, num_slots = cohort.row.shape

  def client_info(slot, id_hash, row, num_examples, num_steps, weight, rate):
    client_key = jax.random.fold_in(round_key, id_hash[slot, 0])
    return ClientInfo(
      key=jax.random.fold_in(client_key, id_hash[slot, 1]),
      round=jnp.asarray(round_index, jnp.int32),
      row=row[slot],
      num_examples=num_examples[slot],
      num_steps=num_steps[slot],
      weight=weight[slot],
      rate=rate[slot],
    )

  def info_at(slots):
    return over_lanes(client_info)(
      slots,
      cohort.id_hash,
      cohort.row,
      cohort.num_examples,
      cohort.num_steps,
      cohort.weight,
      cohort.rate,
    )

  def at_step(x, t):
    return jax.lax.dynamic_index_in_dim(x, t, axis=1, keepdims=False)

  def state_at(states, slots):
    return over_lanes(lambda s, i: jax.tree.map(lambda x: x[i], s))(
      states, slots
    )

  start_all = over_lanes(update.start, in_axes=(None, 0, 0))
  step_all = over_lanes(update.step, in_axes=(0, None, 0, 0))
  finish_all = over_lanes(update.finish, in_axes=(None, 0, 0))

  def step_key(lane_key, index):
    return jax.random.fold_in(lane_key, index)

  def batch_at(t):
    batch = jax.tree.map(lambda x: at_step(x, t), cohort.batches)
    return over_lanes(_mask_rows)(batch)

  def start_clients(carry, states, t):
    slots = at_step(cohort.slot, t)
    info = info_at(slots)
    fresh = start_all(broadcast, state_at(states, slots), info)
    if update.first is not None:
      keys = over_lanes(step_key, in_axes=(0, None))(info.key, 0)
      first_all = over_lanes(update.first, in_axes=(0, None, 0, 0))
      fresh = first_all(fresh, base, batch_at(t), keys)
    return _where_lane(at_step(cohort.start, t), fresh, carry)

  def local_step(t, carry_and_keys):
    carry, keys, started = carry_and_keys
    with jax.named_scope("local_step"):
      step_keys = over_lanes(step_key)(keys, t - started)
      carry = step_all(carry, base, batch_at(t), step_keys)
    return _split_lanes(carry), keys, started

  def put_slot(buffer, slot, write, value):
    def one(b, v):
      return b.at[slot].set(jnp.where(write, v, b[slot]))

    return jax.tree.map(one, buffer, value)

  put_all = over_lanes(put_slot)

  def finish_clients(carry, states, terms, per_client, t):
    slots = at_step(cohort.slot, t)
    ended = at_step(cohort.end, t)
    info = info_at(slots)
    message, weight, new_states, metrics = finish_all(broadcast, carry, info)
    weight = weight * info.weight
    # A loss that is not finite condemns a client whose message happens to be.
    finite = over_lanes(trees.all_finite)(
      (message, weight, new_states, metrics)
    )
    present = ended & (info.weight > 0)
    kept = present & finite & (weight > 0)
    weight = jnp.where(kept, weight, 0)
    message = _where_lane(kept, message, trees.zeros_like(message))
    if aggregator.stacking:
      terms = put_all(terms, slots, kept, message)
    else:
      assert aggregator.add is not None
      added = over_lanes(aggregator.add, in_axes=(None, 0, 0))(
        aggregator_state, message, weight
      )
      added = _where_lane(kept, added, trees.zeros_like(added))
      terms = trees.add(terms, added)
    states = put_all(states, slots, kept, new_states)
    record = (weight, present & ~finite, present, metrics)
    per_client = put_all(per_client, slots, ended, record)
    return states, terms, per_client

  def segment(index, loop):
    carry, states, keys, started, terms, per_client = loop
    begin, stop = cohort.boundaries[index], cohort.boundaries[index + 1]
    with jax.named_scope("start_clients"):
      carry = start_clients(carry, states, begin)
      keys = info_at(at_step(cohort.slot, begin)).key
      started = jnp.where(at_step(cohort.start, begin), begin, started)
    carry, keys, started = jax.lax.fori_loop(
      begin, stop, local_step, (carry, keys, started)
    )
    with jax.named_scope("finish_clients"):
      states, terms, per_client = finish_clients(
        carry, states, terms, per_client, stop - 1
      )
    return carry, states, keys, started, _split_lanes(terms), per_client

  # Zeros of the right shapes: every lane starts a client at step 0.
  first = jnp.zeros((num_lanes,), jnp.int32)
  carry = _split_lanes(
    _zeros(
      lambda s: start_all(broadcast, state_at(s, first), info_at(first)),
      client_states,
    )
  )
  sent = jax.eval_shape(
    lambda c: finish_all(broadcast, c, info_at(first)), carry
  )
  message, weight, _, metrics = sent

  def slots_like(x):
    return jnp.zeros((num_lanes, num_slots, *x.shape[1:]), x.dtype)

  if aggregator.stacking:
    terms = jax.tree.map(slots_like, message)
  else:
    assert aggregator.add is not None
    terms = _zeros(
      over_lanes(aggregator.add, in_axes=(None, 0, 0)),
      aggregator_state,
      message,
      weight,
    )
  flags = jnp.zeros((num_lanes, num_slots), bool)
  weight_slots = jnp.zeros(
    (num_lanes, num_slots), jnp.promote_types(weight.dtype, jnp.float32)
  )
  per_client = (weight_slots, flags, flags, jax.tree.map(slots_like, metrics))
  loop = (
    carry,
    client_states,
    info_at(first).key,
    first,
    _split_lanes(terms),
    per_client,
  )
  loop = jax.lax.fori_loop(0, cohort.num_segments, segment, loop)
  _, client_states, _, _, terms, per_client = loop

  return _collect(
    aggregator,
    cohort,
    deterministic.brought((client_states, terms, per_client)),
  )


def _collect(
  aggregator: Aggregator, cohort: Cohort, brought: PyTree
) -> CohortResult:
  """Puts what the lanes brought together."""
  client_states, terms, per_client = brought
  in_order = functools.partial(in_cohort_order, cohort)
  weights, nonfinite, present, metrics = jax.tree.map(in_order, per_client)
  if aggregator.stacking:
    collected = (jax.tree.map(in_order, terms), weights)
  else:
    with jax.named_scope("sum_over_lanes"):
      collected = jax.tree.map(lambda x: jnp.sum(x, axis=0), terms)
  return CohortResult(
    collected=collected,
    client_states=client_states,
    weights=weights,
    metrics=metrics,
    nonfinite=nonfinite,
    present=present,
  )


def message_like(
  update: ClientUpdate, broadcast: PyTree, client_state: PyTree
) -> PyTree:
  """Shapes of what one client sends; runs nothing.

  Args:
    update: One client's work.
    broadcast: What it is sent, arrays or shapes.
    client_state: Its state, arrays or shapes, or ().

  Returns:
    The message, a tree of `jax.ShapeDtypeStruct`.
  """

  def one(broadcast, client_state):
    number, share = jnp.zeros((), jnp.int32), jnp.zeros(())
    info = ClientInfo(
      key=jax.random.key(0),
      round=number,
      row=number,
      num_examples=number,
      num_steps=number,
      weight=share,
      rate=share,
    )
    carry = update.start(broadcast, client_state, info)
    return update.finish(broadcast, carry, info)[0]

  return jax.eval_shape(one, broadcast, client_state)


def in_cohort_order(cohort: Cohort, x: jax.Array) -> jax.Array:
  """Reorders slots to clients.

  Args:
    cohort: Says which client is where.
    x: [lanes, slots, ...].

  Returns:
    [clients, ...], zeros for padding.
  """
  flat = x.reshape((-1, *x.shape[2:]))
  rows = flat[jnp.maximum(cohort.order, 0)]
  exists = (cohort.order >= 0).reshape((-1,) + (1,) * (rows.ndim - 1))
  return jnp.where(exists, rows, jnp.zeros((), rows.dtype))
