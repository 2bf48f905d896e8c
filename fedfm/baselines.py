"""What federation is measured against: training alone, and on pooled data.

Both start from the experiment's initial trainable and use its client optimizer
and batch size. `client.schedule` runs over their steps instead of rounds.
"""

from collections.abc import Iterator, Sequence
import logging
from typing import Any

import jax
from jax.sharding import NamedSharding
import numpy as np
import optax

from fedfm import choices
from fedfm import clients
from fedfm import data
from fedfm import errors
from fedfm import evaluation
from fedfm import planning
from fedfm import trees
from fedfm.assembly import Experiment
from fedfm.clients import engine
from fedfm.data import packing
from fedfm.data import sampling
from fedfm.types import Aggregator

PyTree = Any
_LOG = logging.getLogger("fedfm")


def _check_steps(name: str, steps: int) -> None:
  if steps < 1:
    raise errors.ConfigError(f"{name}: got {steps}, expected at least 1")


def _optimizer(
    experiment: Experiment, num_steps: int
) -> optax.GradientTransformation:
  c = experiment.settings.client
  rate = choices.schedule(c.schedule, c.learning_rate, num_steps)
  return choices.local_optimizer(c, rate)


def local_only(
    experiment: Experiment, ids: Sequence[str], local_steps: int
) -> PyTree:
  """Trains every client alone, on its own data, all in one cohort.

  Args:
    experiment: Gives the data, the loss and the client settings.
    ids: Clients of `experiment.data.train`.
    local_steps: Steps of each client, over as many epochs as they take.

  Returns:
    The clients' trainables stacked, leaves [len(ids), ...]. A client that
    became not finite keeps the initial one, with a warning.

  Raises:
    ConfigError: `local_steps` below 1.
    DataError: An unknown or repeated client, or one without examples.
  """
  _check_steps("local_steps", local_steps)
  s, source = experiment.settings, experiment.data.train
  options = planning.pack_options(s) | {"epochs": 1, "local_steps": None}
  epoch = [packing.steps_per_client(source.size(i), **options) for i in ids]
  options["epochs"] = -(-local_steps // max(1, min(epoch)))
  options["local_steps"] = local_steps
  packed = data.pack(
      source,
      ids,
      lanes=experiment.num_lanes,
      shuffle=True,
      seed=s.seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      **options,
  )
  update = clients.local_update(
      experiment.loss, _optimizer(experiment, local_steps)
  )
  keep_all = Aggregator(
      init=lambda message: (),
      add=None,
      finish=lambda state, collected: (collected[0], state),
      stacking=True,
  )

  def run(trainable, base, cohort):
    key = jax.random.key(s.seed)
    result = engine.run_cohort(
        update, keep_all, (), trainable, base, cohort, (), key, np.int32(0)
    )
    deltas, _ = keep_all.finish((), result.collected)
    stacked = jax.tree.map(
        lambda w, delta: w + delta[: len(ids)], trainable, deltas
    )
    return stacked, result.nonfinite.sum()

  with jax.set_mesh(experiment.mesh):
    stacked, nonfinite = jax.jit(run)(
        experiment.trainable,
        experiment.base,
        clients.put(packed, experiment.mesh),
    )
  if nonfinite:
    _LOG.warning("local only: %d clients were not finite", int(nonfinite))
  return stacked


def _indices(num_rows: int, size: int, steps: int, seed: int) -> Iterator:
  """Yields [size] rows a step, from one permutation after another."""
  rows, epoch = np.zeros((0,), np.int64), 0
  for _ in range(steps):
    while len(rows) < size:
      rng = sampling.generator("centralized", seed, epoch)
      rows, epoch = np.append(rows, rng.permutation(num_rows)), epoch + 1
    yield rows[:size]
    rows = rows[size:]


def centralized(experiment: Experiment, num_steps: int) -> PyTree:
  """Trains one model on the pooled data of all training clients.

  Args:
    experiment: Gives the data, the loss and the client settings. Its rows are
      all held in host memory.
    num_steps: Steps of `client.batch_size` rows, shuffled anew every epoch.

  Returns:
    The trainable.

  Raises:
    ConfigError: `num_steps` below 1.
  """
  _check_steps("num_steps", num_steps)
  s, source = experiment.settings, experiment.data.train
  read = [source.read(client_id) for client_id in source.ids]
  pool = {name: np.concatenate([x[name] for x in read]) for name in read[0]}
  num_rows = sum(map(source.size, source.ids))
  optimizer = _optimizer(experiment, num_steps)
  grad_fn = jax.grad(experiment.loss, has_aux=True)

  @jax.jit(donate_argnums=(0, 1))
  def step(trainable, state, base, batch, index):
    key = jax.random.fold_in(jax.random.key(s.seed), index)
    grads, _ = grad_fn(trainable, base, batch, key)
    updates, state = optimizer.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state

  size = s.client.batch_size
  sharding = NamedSharding(experiment.mesh, jax.P("fsdp"))
  with jax.set_mesh(experiment.mesh):
    trainable = trees.copy(experiment.trainable)
    state = jax.jit(optimizer.init)(trainable)
    batches = _indices(num_rows, size, num_steps, s.seed)
    for index, rows in enumerate(batches):
      batch = {name: x[rows] for name, x in pool.items()}
      batch["mask"] = np.ones(size, np.float32)
      batch = jax.device_put(batch, sharding)
      trainable, state = step(trainable, state, experiment.base, batch, index)
      # One dispatch at a time: virtual CPU devices deadlock with more queued.
      jax.block_until_ready(trainable)
  return trainable


def evaluate_each(
    experiment: Experiment, ids: Sequence[str], stacked: PyTree
) -> dict[str, float]:
  """Evaluates the trainables of clients that trained alone.

  Args:
    experiment: Gives the populations to evaluate on.
    ids: The clients.
    stacked: Their trainables, leaves [len(ids), ...], as of `local_only`.

  Returns:
    {"eval/<population>/<metric>": value over clients}, as
    `experiment.evaluate`. Where a population holds some of `ids`, each of them
    is evaluated with its own trainable, and the others are left out; clients of
    the other populations get the mean over all trainables' loss and accuracy.
  """
  metrics = {}
  row = {client_id: index for index, client_id in enumerate(ids)}
  for population, source in experiment.data.evals.items():
    own = [client_id for client_id in source.ids if client_id in row]
    with jax.set_mesh(experiment.mesh):
      if own:
        source = data.subset(source, own)
        mine = np.array([row[client_id] for client_id in own])
        sums = _evaluate_own(experiment, stacked, mine, source)
      else:
        sums = _evaluate_all(experiment, stacked, len(ids), source)
    in_bytes = experiment.tokenizer.name == "bytes"
    summary = evaluation.summarise(sums, in_bytes)
    metrics |= {f"eval/{population}/{k}": v for k, v in summary.items()}
  return metrics


def _evaluate_own(experiment, stacked, mine, source) -> dict[str, Any]:
  """Sums [clients] of clients that have a trainable each, at rows `mine`."""

  @jax.jit
  def evaluate(stacked, base, cohort):
    own = jax.tree.map(lambda x: x[mine], stacked)
    return evaluation.evaluate_own(experiment.loss, own, base, cohort)

  cohort = experiment.pack_to_evaluate(source)
  return jax.device_get(evaluate(stacked, experiment.base, cohort))


def _evaluate_all(experiment, stacked, count, source) -> dict[str, Any]:
  """Sums [clients], each the mean over all trainables."""

  @jax.jit
  def evaluate(stacked, index, base, cohort):
    one = jax.tree.map(lambda x: x[index], stacked)
    return evaluation.evaluate_cohort(experiment.loss, one, base, cohort)

  cohort = experiment.pack_to_evaluate(source)
  sums = [
      jax.device_get(evaluate(stacked, index, experiment.base, cohort))
      for index in range(count)
  ]
  return jax.tree.map(lambda *x: np.mean(x, axis=0), *sums)
