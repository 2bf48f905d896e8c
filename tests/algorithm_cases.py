"""What every algorithm is tried with: a row of options by name, tiny problems.

A new algorithm needs a row in `CASES` only where its defaults don't do.
"""

from collections.abc import Callable, Sequence
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lora_problem
import numpy as np
import optax

from fedfm import algorithms, data
from fedfm.types import FederatedAlgorithm

BATCH, EPOCHS, RATE = 2, 2, 0.05
# Of unequal sizes, one smaller than a batch; not all take part in a round.
SIZES = (7, 4, 3, 2, 1)
IDS = [f"client {c}" for c in range(len(SIZES))]
ROUNDS = [[IDS[0], IDS[3], IDS[2]], [IDS[4], IDS[0], IDS[1]]]


class Problem(NamedTuple):
  """A population and a loss.

  Attributes:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    start: dtype -> trainable.
    base: Frozen weights, float64.
    rounds: Two cohorts of client ids.
    rest: A client that is not in the second cohort.
    num_clients: Size of the population.
    pack: `pack(ids, lanes=2) -> Cohort`, for lanes of 1, 2 and 4.
    adapter: For algorithms that take one.
  """

  loss: Callable[..., Any]
  start: Callable[[Any], Any]
  base: Any
  rounds: Sequence[Sequence[str]]
  rest: str
  num_clients: int
  pack: Callable[..., Any]
  adapter: Any = None


class Case(NamedTuple):
  """How to build an algorithm.

  Attributes:
    options: Of the factory.
    config: Changes to `tiny.config` for a run by name; options that are not
      given here are `options` again.
    problem: A name in `PROBLEMS`.
    client_optimizer: The clients' optimizer; None for those without one.
  """

  options: dict[str, Any] = {}
  config: dict[str, Any] = {}
  problem: str = "linear"
  client_optimizer: optax.GradientTransformation | None = optax.sgd(RATE)


def linear_loss(params, base, batch, key):
  """Mean squared error of a linear model; base is a shift of its output."""
  del key
  guess = batch["x"] @ params["w"] + params["b"] + base
  residual = (guess - batch["y"]) * batch["mask"]
  count = jnp.sum(batch["mask"])
  return jnp.sum(residual**2) / jnp.maximum(count, 1), {"tokens": 10 * count}


def linear_start(dtype=jnp.float64):
  return {"w": jnp.asarray([0.5, -0.2, 0.1], dtype), "b": jnp.zeros((), dtype)}


LINEAR = data.from_arrays(
  {
    client_id: {
      "x": np.random.default_rng(c).normal(size=(n, 3)),
      "y": np.random.default_rng(c + 50).normal(size=n) + c,
    }
    for c, (client_id, n) in enumerate(zip(IDS, SIZES))
  }
)


def pack(ids, lanes=2, source=LINEAR, **options):
  """Packs a cohort of the source, always into buffers of the same sizes."""
  options = {
    "batch_size": BATCH,
    "epochs": EPOCHS,
    "step_buckets": [24],
    "slot_buckets": [4],
  } | options
  return data.pack(source, ids, lanes=lanes, **options)


REPLICAS = data.subset(LINEAR, IDS[:4])


def pack_replicas(ids, lanes=2):
  """Packs a cohort in which every client has a place of its own."""
  places = {"slot_buckets": [4 // lanes], "aligned": True}
  return pack(ids, lanes, REPLICAS, local_steps=3, **places)


def layers_loss(params, base, batch, key):
  """The linear model's, its weights in a stack of three layers."""
  flat = {"w": params["layers"]["w"].reshape(-1), "b": params["b"]}
  return linear_loss(flat, base, batch, key)


def layers_start(dtype=jnp.float64):
  flat = linear_start(dtype)
  return {"layers": {"w": flat["w"][:, None]}, "b": flat["b"]}


PROBLEMS = {
  "linear": Problem(
    linear_loss, linear_start, 0.0, ROUNDS, IDS[3], len(IDS), pack
  ),
  "replicas": Problem(
    linear_loss,
    linear_start,
    0.0,
    [IDS[:3], [IDS[0], IDS[3], IDS[1]]],
    IDS[2],
    len(REPLICAS),
    pack_replicas,
  ),
  "layers": Problem(
    layers_loss,
    layers_start,
    0.0,
    [IDS[:3], [IDS[0], IDS[3], IDS[1]]],
    IDS[2],
    len(REPLICAS),
    pack_replicas,
  ),
  "lora": Problem(
    lora_problem.loss,
    lambda dtype: jax.tree.map(
      lambda x: jnp.asarray(x, dtype), lora_problem.start()
    ),
    lora_problem.base(),
    lora_problem.ROUNDS[:2],
    "client 3",
    len(lora_problem.SIZES),
    lora_problem.pack,
    lora_problem.adapter(),
  ),
}


def delay_by_row(info):
  """Client number n arrives n server steps late."""
  return info.row


_FULL = {"adapter": {"kind": "full"}}
_MOMENTUM = optax.sgd(RATE, momentum=0.5)
CASES = {
  "fedprox": Case({"mu": 0.3}),
  "fedopt": Case({"server_optimizer": optax.adam(0.1)}, {"options": {}}),
  "feddpa_f": Case({"global_rounds": 1}, problem="lora"),
  "diloco": Case({"weighting": "examples"}, {"options": {}}, "replicas"),
  "photon": Case(problem="replicas", client_optimizer=optax.adamw(RATE)),
  # Rounds of 3 steps, as `pack_replicas` has them; what was sent in one arrives
  # in the next.
  "streaming_diloco": Case(
    {"num_fragments": 2, "inner_steps": 6, "overlap": 4, "mixing": 0.3},
    # There the steps are `client.local_steps`, and a fragment its one layer.
    {"options": {"num_fragments": 1, "overlap": 1, "mixing": 0.3}}
    | {"clients_per_round": 8}
    | _FULL,
    problem="layers",
    client_optimizer=optax.adamw(RATE),
  ),
  "fedkseed": Case(
    {"client_learning_rate": RATE, "num_seeds": 7},
    # A rate for slopes along directions as long as the tiny model is large.
    {"options": {"num_seeds": 7}, "client": {"learning_rate": 1e-3}},
    client_optimizer=None,
  ),
  "fedmezo": Case(config={"client": {"learning_rate": 1e-3}}),
  "forward_gradients": Case(config={"client": {"learning_rate": 1e-3}}),
  **dict.fromkeys(
    (
      "fedit",
      "ffa_lora",
      "rolora",
      "flora",
      "fedex_lora",
      "flexlora",
      "fedsvd",
      "hetlora",
      "zero_padding",
      "fedsa_lora",
      "feddpa_t",
    ),
    Case(problem="lora"),
  ),
  "scaffold": Case({"weighting": "examples"}, {"options": {}}),
  "feddyn": Case(
    {"alpha": 0.2, "weighting": "examples"}, {"options": {"alpha": 0.2}}
  ),
  "mimelite": Case(client_optimizer=_MOMENTUM),
  "qfedavg": Case({"q": 2.0}),
  "afl": Case({"mixture_learning_rate": 0.05}),
  "fedbuff": Case({"delay": delay_by_row}, {"options": {}}),
  "ditto": Case({"lam": 0.7}),
  "per_fedavg": Case({"inner_learning_rate": 0.1}),
  "first_order_per_fedavg": Case({"inner_learning_rate": 0.1}),
  "fedper": Case(
    {"local_parts": ("b",)}, {"options": {"local_parts": ["norm"]}} | _FULL
  ),
  "fedbn": Case({"local_parts": ("b",)}, {"options": {}} | _FULL),
  "fedrep": Case(
    {"local_parts": ("b",), "local_share": 0.4},
    {"options": {"local_parts": ["norm"]}} | _FULL,
  ),
  "ifca": Case({"num_clusters": 2, "spread": 0.5}),
}


def case_of(name: str) -> Case:
  return CASES.get(name, Case())


def problem_of(name: str) -> Problem:
  return PROBLEMS[case_of(name).problem]


def takes_any(parameters) -> bool:
  return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def build(name: str, **changes: Any) -> FederatedAlgorithm:
  """Builds an algorithm by name, on its problem's whole population."""
  case, problem = case_of(name), problem_of(name)
  factory = getattr(algorithms, name)
  takes = inspect.signature(factory).parameters
  options: dict[str, Any] = {}
  if case.client_optimizer is not None:
    options["client_optimizer"] = case.client_optimizer
  if "adapter" in takes:
    options["adapter"] = problem.adapter
  if "num_clients" in takes or takes_any(takes):
    options["num_clients"] = problem.num_clients
  return factory(problem.loss, **(options | case.options | changes))


def config_of(name: str) -> dict[str, Any]:
  """Changes to `tiny.config` that run an algorithm by name."""
  case = case_of(name)
  changes = {k: v for k, v in case.config.items() if k != "options"}
  options = case.config.get("options", case.options)
  return {"algorithm": name, "algorithm_options": options} | changes


def flat(tree):
  """All leaves as one vector, in the order of the tree."""
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
