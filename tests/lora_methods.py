"""Every LoRA method on the problem of `lora_problem`, built and compiled."""

import functools

import jax
import lora_by_hand as by_hand
import lora_problem as problem
from lora_problem import PATHS, SOURCE
import numpy as np
import optax

from fedfm import algorithms

FAST_COMPILE = {"xla_backend_optimization_level": "0"}
POPULATION = len(problem.SIZES)
EQUAL = {"ranks": by_hand.RANKS, "client_alpha": "equal"}
OPTIONS = {
  "fedit": {},
  "ffa_lora": {},
  "rolora": {},
  "flora": EQUAL,
  "fedex_lora": {},
  "flexlora": EQUAL,
  "fedsvd": {},
  "hetlora": {
    "ranks": by_hand.RANKS,
    "strength": by_hand.STRENGTH,
    "decay": by_hand.DECAY,
    "num_clients": POPULATION,
  },
  "zero_padding": {"ranks": by_hand.RANKS},
  "fedsa_lora": {"num_clients": POPULATION},
  "feddpa_t": {"num_clients": POPULATION},
  "feddpa_f": {"num_clients": POPULATION, "global_rounds": 1},
}


def build(name, loss=problem.loss, **changes):
  options = {
    "client_optimizer": optax.sgd(problem.RATE),
    "adapter": problem.adapter(),
  }
  factory = getattr(algorithms, name)
  return factory(loss, **(options | OPTIONS[name] | changes))


@functools.cache
def compiled(name):
  algorithm = build(name)
  return algorithm, jax.jit(algorithm.round, compiler_options=FAST_COMPILE)


def assert_same_clients(name, store, clients):
  """The rows of the store, of clients that took part and that did not."""
  for row, client_id in enumerate(SOURCE.ids):
    got = jax.tree.map(lambda x, row=row: np.asarray(x[row]), store)
    if name == "hetlora":
      assert got["rank"] == clients.get(client_id, 0)
      continue
    own = clients.get(client_id, problem.start())
    for path in PATHS:
      factors = "b" if name == "fedsa_lora" else "ab"
      expected = {f: own[path][f] for f in factors}
      problem.assert_close(got[path], expected)
    if name == "fedsa_lora":
      problem.assert_close(got["head"], own["head"])
