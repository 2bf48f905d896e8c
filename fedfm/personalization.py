"""Models of the clients' own: those that they keep, and fine-tuned ones."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from fedfm import baselines, errors, evaluation
from fedfm import data as data_lib
from fedfm.assembly import Experiment
from fedfm.clients import deterministic
from fedfm.types import FederatedAlgorithm, LossFn, ServerState

PyTree = Any


def evaluate_all(
  experiment: Experiment,
  state: ServerState,
  trainable: PyTree = None,
  base: PyTree = None,
  rate: float = 1.0,
) -> dict[str, float]:
  """Evaluates the global model, and those of `evaluate`.

  Args:
    experiment: Its populations, algorithm and settings.
    state: The server state.
    trainable: As in `evaluate`.
    base: As in `evaluate`.
    rate: As in `evaluate`.

  Returns:
    {"eval/<population>/<metric>": value over clients}, of all models.
  """
  own = evaluate(experiment, state, trainable, base, rate)
  base = experiment.base if base is None else base
  base = experiment.algorithm.effective_base(state, base)
  model = experiment.algorithm.effective_trainable(state)
  return experiment.evaluate(model, base) | own


def evaluate(
  experiment: Experiment,
  state: ServerState,
  trainable: PyTree = None,
  base: PyTree = None,
  rate: float = 1.0,
) -> dict[str, float]:
  """Evaluates the models of clients that have one of their own.

  Args:
    experiment: Its populations, algorithm and settings.
    state: The server state.
    trainable: What new clients are given; default the experiment's initial one.
    base: Frozen weights; default the experiment's.
    rate: Multiplies the learning rate of fine-tuning, as that of the rounds
      was.

  Returns:
    {"eval/<population>/personal_<metric>": value over clients} where the
    algorithm makes personal models, and `finetuned_<metric>` where
    `eval.finetune_steps` asks for them; as `Experiment.evaluate`.
  """
  trainable = experiment.trainable if trainable is None else trainable
  base = experiment.base if base is None else base
  values = {}
  for kind, found in (
    ("personal", evaluate_personal(experiment, state, trainable, base)),
    ("finetuned", evaluate_finetuned(experiment, state, base, rate)),
  ):
    for population, sums in found.items():
      for name, value in evaluation.summarise(sums).items():
        values[f"eval/{population}/{kind}_{name}"] = value
  return values


def evaluate_personal(
  experiment: Experiment, state: ServerState, trainable: PyTree, base: PyTree
) -> dict[str, dict[str, Any]]:
  """Evaluates every client with its personal model.

  Clients that never took part, and those of other populations than the one
  that trains, have the model of a new client.

  Args:
    experiment: Its populations and algorithm.
    state: The server state.
    trainable: What new clients are given.
    base: Frozen weights, before `effective_base`.

  Returns:
    As `Experiment.evaluate_clients`; nothing where the algorithm makes no
    personal models.
  """
  if experiment.algorithm.personal is None or not experiment.data.evals:
    return {}
  names, cohort = experiment.eval_cohort
  known = {c: row for row, c in enumerate(experiment.data.train.ids)}
  rows = np.array([known.get(client_id, -1) for _, client_id in names])
  run = _run_personal(
    experiment.algorithm,
    experiment.loss,
    experiment.mesh,
    experiment.settings.deterministic,
  )
  with jax.set_mesh(experiment.mesh):
    states = _states(experiment, state, trainable, rows)
    return experiment.by_population(
      jax.device_get(run(state, states, base, cohort))
    )


def personal_model(
  experiment: Experiment, state: ServerState, client_id: str
) -> PyTree:
  """Returns the personal model of one client.

  Args:
    experiment: Its population and an algorithm that makes personal models.
    state: The server state.
    client_id: The client; one that does not train has a new client's model.

  Returns:
    A trainable, for the base that `effective_base` gives.
  """
  personal = experiment.algorithm.personal
  assert personal is not None
  try:
    row = experiment.data.train.index(client_id)
  except errors.DataError:
    row = -1  # A new client.
  states = _states(experiment, state, experiment.trainable, np.array([row]))
  return personal(state, jax.tree.map(lambda x: x[0], states))


def _states(
  experiment: Experiment, state: ServerState, trainable: PyTree, rows: Any
) -> PyTree:
  """Reads clients' states [clients, ...]; row -1 is a new client."""
  if experiment.client_store == "device":
    pick = _pick(
      experiment.algorithm.client_state,
      experiment.mesh,
      experiment.settings.deterministic,
    )
    return pick(trainable, state.clients, rows)
  if experiment.host is None:
    raise errors.CheckpointError(
      "client.store: the run's folder has no 'clients', its clients' states"
    )
  known = rows >= 0
  found = experiment.host.read(rows[known], version=int(state.clients))

  def place(x, initial):
    states = np.empty((len(rows), *x.shape[1:]), x.dtype)
    states[~known], states[known] = initial, x
    return states

  return jax.tree.map(place, found, experiment.host.initial)


@functools.lru_cache(maxsize=4)  # So that one run compiles it once.
def _pick(
  new_client: Callable[[PyTree], PyTree], mesh: Mesh, is_deterministic: bool
) -> Any:
  """Jitted `(trainable, store, rows) -> states [clients, ...]`."""

  def pick(trainable, clients, rows):
    def one(x, initial):
      known = (rows >= 0).reshape((-1,) + (1,) * (x.ndim - 1))
      return jnp.where(known, x[rows], initial)

    return jax.tree.map(one, clients, new_client(trainable))

  if is_deterministic:
    return deterministic.on_one_device(pick, mesh)
  return jax.jit(pick)


@functools.lru_cache(maxsize=4)
def _run_personal(
  algorithm: FederatedAlgorithm,
  loss: LossFn,
  mesh: Mesh,
  is_deterministic: bool,
) -> Any:
  """Jitted `(state, states, base, cohort) -> sums [clients]`."""
  personal = algorithm.personal
  assert personal is not None

  def run(state, states, base, cohort):
    base = algorithm.effective_base(state, base)
    own = functools.partial(personal, state)
    return evaluation.evaluate_own(loss, states, base, cohort, own)

  return deterministic.jit_cohort(run, mesh, is_deterministic)


def evaluate_finetuned(
  experiment: Experiment,
  state: ServerState,
  base: PyTree,
  rate: float = 1.0,
) -> dict[str, dict[str, Any]]:
  """Evaluates every client that trains after it tuned the global model.

  That is the baseline of all personalization: the client's own optimizer for
  `eval.finetune_steps` steps on its own training data. Clients without such
  data, of an unseen population, are left out.

  Args:
    experiment: Its populations, algorithm and settings.
    state: The server state.
    base: Frozen weights, before `effective_base`.
    rate: As in `evaluate`.

  Returns:
    As `Experiment.evaluate_clients`; nothing where no steps are asked for.
  """
  steps = experiment.settings.eval.finetune_steps
  result = {}
  if not steps:
    return result
  base = experiment.algorithm.effective_base(state, base)
  trainable = experiment.algorithm.effective_trainable(state)
  trained = set(experiment.data.train.ids)
  for population, source in experiment.data.evals.items():
    ids = [client_id for client_id in source.ids if client_id in trained]
    if not ids:
      continue
    tuned = baselines.local_only(
      experiment, ids, steps, start=(trainable, base), rate=rate
    )
    cohort = experiment.pack_to_evaluate(data_lib.subset(source, ids))
    with jax.set_mesh(experiment.mesh):
      sums = jax.device_get(experiment.run_own_evaluation(tuned, base, cohort))
    sums = {name: x[: len(ids)] for name, x in sums.items()}
    result[population] = {**sums, "ids": ids}
  return result
