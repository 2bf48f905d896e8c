"""Streaming DiLoCo (Douillard et al. 2025, arXiv 2501.18512).

Fragment p of the weights is exchanged every H inner steps, at its own offset
t_p. With r_p the last result of its outer optimizer, at inner step t of replica
m:

  w_m <- AdamW(w_m)
  (t - t_p) mod H = 0:          D_p = mean_m (r_p - w_m,p)          is sent
  (t - t_p - tau) mod H = 0:    r_p <- OuterOpt_p(r_p, D_p)         has arrived
                                w_m,p <- alpha w_m,p + (1 - alpha) r_p

The next D_p is taken from r_p, not from the mixture. Replicas keep their own
weights between rounds. alpha = 1 lets them ignore each other, alpha = 0 drops
what they learnt in the last tau steps; one fragment, tau = 0 and alpha = 0 are
DiLoCo.

A round lasts from one exchange to the next, so it has H / fragments inner steps
where offsets are even. The outer step is computed at once and waits, in the
state, for tau steps: what training does is that of the paper, while whether the
exchange overlaps with it is up to the machine. Low-bit exchange is a compressor
on the way up (`compression.e3m0`); sums over replicas are float32.

A replica that was not in the round before (it joins, comes back, or was masked)
starts from r, with the inner moments that it last had.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedfm import errors, trees
from fedfm.algorithms import (
  algorithm,
  checks,
  fragment_schedule,
  fragments,
  schedule_clock,
)
from fedfm.algorithms.diloco import fresh_optimizer, outer_optimizer
from fedfm.algorithms.fragment_schedule import Schedule
from fedfm.clients import local
from fedfm.types import ClientUpdate, FederatedAlgorithm, LossFn

PyTree = Any
_NOTHING = -1  # The age of a fragment of which nothing is on its way.


def streaming_diloco(
  loss: LossFn,
  *,
  client_optimizer: local.ClientOptimizer,
  inner_steps: int,
  server_optimizer: optax.GradientTransformation | None = None,
  weighting: str = "uniform",
  num_fragments: int | None = None,
  pattern: str = "strided",
  layer_fragments: tuple[int, ...] = (),
  offsets: tuple[int, ...] = (),
  overlap: int = 0,
  mixing: float = 0.5,
  downlink: checks.Absent = None,
  **options,
) -> FederatedAlgorithm:
  """Exchanges a fragment at a time, while replicas go on.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Inner optimizer.
    inner_steps: H, from one exchange of a fragment to its next; pack a round
      with `local_steps=algorithm.local_steps(round)`.
    server_optimizer: Outer optimizer, of each fragment apart; default
      `diloco.outer_optimizer()`.
    weighting: "examples", "tokens" or "uniform".
    num_fragments: Default 4, or as many as `layer_fragments` names.
    pattern: How layers are dealt to fragments: "strided" or "sequential".
    layer_fragments: The fragment of each layer, in place of a pattern.
    offsets: t_p of each fragment; default even.
    overlap: tau, the steps until what was sent has arrived.
    mixing: alpha, in [0, 1].
    downlink: None: what comes back is a sum, not a message of a server.
    **options: `num_clients` (needed), `seed`, `aggregator` and others of
      `algorithm.federated`.

  Returns:
    A `FederatedAlgorithm`; `state.trainable` is r.

  Raises:
    ConfigError: Options out of range, fragments that do not cover the layers
      (from `init`), or a compressed way down.
  """
  checks.check_absent(
    "replicas of streaming DiLoCo exchange sums", downlink=downlink
  )
  if num_fragments is None:
    num_fragments = max(layer_fragments) + 1 if layer_fragments else 4
  if num_fragments < 1:
    raise errors.ConfigError(
      f"num_fragments: got {num_fragments}, expected at least 1"
    )
  if pattern not in fragments.PATTERNS:
    raise errors.ConfigError(
      f"pattern: got {pattern!r}{errors.nearest(pattern, fragments.PATTERNS)}"
    )
  times = fragment_schedule.schedule(inner_steps, num_fragments, offsets)
  if not 0 <= overlap < inner_steps:
    raise errors.ConfigError(
      f"overlap: got {overlap}, expected in [0, {inner_steps})"
    )
  if not 0 <= mixing <= 1:
    raise errors.ConfigError(f"mixing: got {mixing}, expected in [0, 1]")
  outer = server_optimizer or outer_optimizer()

  def split(trainable):
    return fragments.split(trainable, num_fragments, pattern, layer_fragments)

  def fragment_of(round_index):
    return jnp.asarray(times.order, jnp.int32)[round_index % num_fragments]

  def steps_of(round_index):
    gap = jnp.asarray(times.gaps, jnp.int32)[round_index % num_fragments]
    return jnp.where(round_index == 0, times.first, gap)

  def mix(weights, news, due):
    """alpha w + (1 - alpha) r on the fragments that are due."""
    return jax.tree.map(
      lambda rows, w, r: rows.select(
        due, (mixing * w + (1 - mixing) * r).astype(w.dtype), w
      ),
      split(weights),
      weights,
      news["weights"],
    )

  return algorithm.federated(
    _replica(
      local.local_update(loss, client_optimizer, weighting=weighting),
      mix,
      split,
      overlap,
    ),
    server=algorithm.Server(
      init=lambda trainable: {
        "outer": fragments.optimizer_rows(outer, split(trainable), trainable)[
          0
        ],
        "age": jnp.full(num_fragments, _NOTHING, jnp.int32),
      },
      broadcast=lambda state: {
        "weights": state.trainable,
        "age": state.extra["age"],
        "fragment": fragment_of(state.round),
        "steps": steps_of(state.round),
      },
      client_base=lambda state, base, heard: (
        base,
        {"weights": state.trainable, "age": state.extra["age"]},
      ),
      combine=_outer_step(outer, split, fragment_of, steps_of, overlap),
      wire=_wire(split, times),
    ),
    server_optimizer=optax.sgd(1.0),  # Adds what the outer step gives.
    client_state=lambda trainable: {
      "weights": trainable,
      "optimizer": fresh_optimizer(client_optimizer)(trainable),
      "last": jnp.full((), -1, jnp.int32),
    },
    local_steps=times.local_steps,
    aligned=True,
    **options,
  )


class _Carry(NamedTuple):
  """A replica in the middle of its round."""

  local: local.LocalState
  steps: jax.Array  # shape=(), dtype=int32: done in this round


def _replica(inner: ClientUpdate, mix, split, overlap: int) -> ClientUpdate:
  """A replica's work from one exchange to the next."""

  def start(news, kept, info):
    own = inner.start(news["weights"], (), info)
    weights = trees.select(
      kept["last"] + 1 == info.round, kept["weights"], news["weights"]
    )
    if not overlap:
      weights = mix(weights, news, news["age"] == 0)
    own = own._replace(trainable=weights, optimizer=kept["optimizer"])
    return _Carry(own, jnp.zeros((), jnp.int32))

  def step(carry, base_and_news, batch, key):
    base, news = base_and_news
    own = inner.step(carry.local, base, batch, key)
    steps = carry.steps + 1
    on_its_way = news["age"] >= 0
    due = on_its_way & (news["age"] + steps == overlap)
    if overlap:
      own = own._replace(trainable=mix(own.trainable, news, due))
    return _Carry(own, steps)

  def finish(news, carry, info):
    # A replica of fewer steps than the others has missed an arrival.
    left = overlap - news["age"] - carry.steps
    missed = (news["age"] >= 0) & (left > 0)
    missed &= overlap - news["age"] <= news["steps"]
    weights = mix(carry.local.trainable, news, missed)
    own = carry.local._replace(trainable=weights)
    delta, weight, _, metrics = inner.finish(news["weights"], own, info)
    sent = fragments.take(split(delta), delta, news["fragment"])
    metrics["delta_norm"] = trees.norm(sent)
    kept = {"weights": weights, "optimizer": own.optimizer, "last": info.round}
    return sent, weight, kept, metrics

  return inner._replace(start=start, step=step, finish=finish)


def _outer_step(outer, split, fragment_of, steps_of, overlap: int):
  """The outer optimizer on the fragment that was sent."""

  def combine(state, aggregate, result, cohort):
    del result, cohort
    rows, fragment = split(state.trainable), fragment_of(state.round)
    state_rows = fragments.optimizer_rows(outer, rows, state.trainable)[1]
    own = fragments.take(state_rows, state.extra["outer"], fragment)
    updates, part = outer.update(
      trees.scale(aggregate, -1),
      schedule_clock.at_round(own, state.round),
      fragments.take(rows, state.trainable, fragment),
    )
    delta = fragments.put(
      rows, trees.zeros_like(state.trainable), updates, fragment
    )
    outer_state = fragments.put(
      state_rows, state.extra["outer"], part, fragment
    )
    # What arrived in this round is no longer on its way.
    age = state.extra["age"]
    age = jnp.where(age >= 0, age + steps_of(state.round), age)
    age = jnp.where(age >= overlap, _NOTHING, age).at[fragment].set(0)
    return delta, {"outer": outer_state, "age": age}

  return combine


def _wire(split, times: Schedule):
  """What crosses the network in a round: one fragment, up and down."""

  def wire(state, sent, message):
    fragment = times.order[int(state.round) % len(times.order)]
    trainable = sent["weights"]
    part = jax.tree.map(
      lambda rows, x: rows.shape(x, fragment), split(trainable), trainable
    )
    return part, part

  return wire
