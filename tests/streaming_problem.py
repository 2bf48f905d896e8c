"""A linear model in layers for Streaming DiLoCo, and its paper in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference

from fedfm import algorithms, data

# A stack of four layers of two weights, and a tensor outside of it.
LAYERS = np.array([[0.5, -0.2], [0.1, 0.3], [-0.4, 0.2], [0.05, -0.1]])
OTHER = np.array([0.3, -0.6])
NUM_REPLICAS, EXAMPLES = 3, 24
RATE, DECAY, BETA1, BETA2 = 0.05, 0.1, 0.9, 0.95
ADAMW = optax.adamw(RATE, b1=BETA1, b2=BETA2, weight_decay=DECAY)
SOURCE = data.from_arrays(
  {
    f"replica {c}": {
      "x": np.random.default_rng(c).normal(size=(EXAMPLES, 10)),
      "y": np.random.default_rng(c + 50).normal(size=EXAMPLES) + c,
    }
    for c in range(NUM_REPLICAS)
  }
)
FAST = {"xla_backend_optimization_level": "0"}


def loss(w, base, batch, key):
  """Squared error of a linear model, whose weights are in layers."""
  del key
  flat = jnp.concatenate([w["layers"]["a"].reshape(-1), w["other"]])
  residual = (batch["x"] @ flat - batch["y"] + base) * batch["mask"]
  return jnp.sum(residual**2) / jnp.maximum(jnp.sum(batch["mask"]), 1), {}


def start():
  return {"layers": {"a": jnp.asarray(LAYERS)}, "other": jnp.asarray(OTHER)}


def flat(tree):
  return np.append(np.ravel(tree["layers"]["a"]), tree["other"])


@functools.cache
def round_of(algorithm):
  return jax.jit(algorithm.round, compiler_options=FAST)


@functools.cache
def streaming(**options):
  defaults = {
    "client_optimizer": ADAMW,
    "num_clients": NUM_REPLICAS,
    "inner_steps": 7,
    "num_fragments": 2,
  }
  return algorithms.streaming_diloco(loss, **(defaults | options))


def cohort_of(algorithm, round_index, done, ids=SOURCE.ids, lanes=3):
  """The next steps of every replica: its examples, one a step, in order."""
  steps = algorithm.local_steps(round_index)
  rows = np.arange(done, done + steps) % EXAMPLES
  part = data.ClientSource(
    SOURCE.ids,
    lambda i: steps,
    lambda i: {k: x[rows] for k, x in SOURCE.read(i).items()},
  )
  packed = data.pack(
      part, ids, lanes=lanes, batch_size=1, aligned=lanes != 2,
      step_buckets=[16], slot_buckets=[3],
  )  # fmt: skip
  return packed, done + steps


def run(algorithm, rounds, ids=SOURCE.ids, lanes=3, weights=None):
  """All states; `ids` may be a list of the cohorts of the rounds.

  Weights by id multiply those of the replicas.
  """
  round_fn = round_of(algorithm)
  states, done = [algorithm.init(start())], 0
  for index in range(rounds):
    now = ids[index] if isinstance(ids, list) else ids
    cohort, done = cohort_of(algorithm, index, done, now, lanes)
    if weights is not None:
      of_order = {position: weights[i] for position, i in enumerate(now)}
      cohort = reference.with_weights(cohort, of_order)
    states.append(round_fn(states[-1], jnp.zeros(()), cohort)[0])
  return states


def owners(of_layer, other):
  """Fragment of each of the ten weights."""
  return np.append(np.repeat(of_layer, 2), [other] * 2)


def adamw(w, m, v, count, examples, position):
  """Inner step number `count` of a replica, on one of its examples."""
  x, y = (examples[k][position % EXAMPLES] for k in "xy")
  gradient = 2 * (x @ w - y) * x
  m = BETA1 * m + (1 - BETA1) * gradient
  v = BETA2 * v + (1 - BETA2) * gradient**2
  step = m / (1 - BETA1**count) / (np.sqrt(v / (1 - BETA2**count)) + 1e-8)
  return w - RATE * (step + DECAY * w), m, v


def by_the_paper(
  steps, owner, inner_steps, offsets, overlap, mixing, weights=None
):
  """Algorithm 2 of the paper: one loop over inner steps, all replicas.

  Those of weight 0 in a step, of `weights` [steps, replicas], are away: they
  neither train nor send nor hear, and come back with the outer weights.

  Returns:
    The outer weights r, and every replica's own, after the last step.
  """
  eta, mu = 0.7, 0.9
  r = np.concatenate([LAYERS.ravel(), OTHER])
  w = np.tile(r, (NUM_REPLICAS, 1))
  m, v, buf = np.zeros_like(w), np.zeros_like(w), np.zeros_like(r)
  ahead, on_its_way, counts = r.copy(), set(), np.zeros(NUM_REPLICAS, int)
  weights = np.ones((steps, NUM_REPLICAS)) if weights is None else weights
  for t in range(1, steps + 1):
    here, before = weights[t - 1] > 0, weights[max(t - 2, 0)] > 0
    w[here & ~before] = ahead
    counts += here
    for c in np.flatnonzero(here):
      read = SOURCE.read(SOURCE.ids[c])
      w[c], m[c], v[c] = adamw(w[c], m[c], v[c], counts[c], read, t - 1)
    for p, offset in enumerate(offsets):
      if (t - offset) % inner_steps == 0:
        outer, own = (
          np.average(r - w, axis=0, weights=weights[t - 1]),
          owner == p,
        )
        buf = np.where(own, mu * buf + outer, buf)
        ahead = np.where(own, r - eta * (outer + mu * buf), ahead)
        on_its_way.add(p)
    for p, offset in enumerate(offsets):
      if (t - offset - overlap) % inner_steps == 0 and p in on_its_way:
        own = owner == p
        on_its_way.remove(p)
        r = np.where(own, ahead, r)
        mixed = mixing * w + (1 - mixing) * r
        w = np.where(here[:, None] & own, mixed, w)
  return r, w
