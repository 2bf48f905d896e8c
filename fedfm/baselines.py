"""What federation is measured against: training alone, and on pooled data.

Both start from the experiment's initial trainable and use its client optimizer
and batch size; `client.schedule` runs over their steps instead of rounds, and
their learning rate may be their own, as what is best for one is not for all.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import logging
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
import numpy as np
import optax

from fedfm import (
  clients,
  data,
  errors,
  evaluation,
  optimizers,
  planning,
  sharding,
  trees,
)
from fedfm.assembly import Experiment
from fedfm.clients import deterministic
from fedfm.data import packing, sampling
from fedfm.settings import ClientSettings
from fedfm.types import Aggregator, LossFn

PyTree = Any
_LOG = logging.getLogger("fedfm")
_KEEP_ALL = Aggregator(
  init=lambda message: (),
  add=None,
  finish=lambda state, collected: (collected[0], state),
  stacking=True,
)


def local_only(
  experiment: Experiment,
  ids: Sequence[str],
  local_steps: int,
  learning_rate: float | None = None,
  start: tuple[PyTree, PyTree] | None = None,
  rate: float = 1.0,
) -> PyTree:
  """Trains every client alone, on its own data, all in one cohort.

  Args:
    experiment: Gives the data, the loss and the client settings.
    ids: Clients of `experiment.data.train`.
    local_steps: Steps of each client, over as many epochs as they take.
    learning_rate: Default the clients' in the federation.
    start: The trainable that all start from, and its base; default the
      experiment's own.
    rate: Multiplies the learning rate, as a cohort's does, without another
      compilation.

  Returns:
    The clients' trainables stacked, leaves [len(ids), ...]. A client that
    became not finite keeps the initial one, with a warning.

  Raises:
    ConfigError: `local_steps` below 1.
    DataError: No client, or one that is unknown or repeated.
  """
  _check_steps("local_steps", local_steps)
  s, source = experiment.settings, experiment.data.train
  source = data.subset(source, ids)
  options = planning.pack_options(s) | {"epochs": 1, "local_steps": None}
  epoch = [packing.steps_per_client(source.size(i), **options) for i in ids]
  options["epochs"] = -(-local_steps // min(epoch))
  options["local_steps"] = local_steps
  packed = data.pack(
    source,
    ids,
    lanes=experiment.num_lanes,
    shuffle=True,
    seed=s.seed,
    own_lanes=clients.own_lanes(experiment.mesh, experiment.num_lanes),
    rates=[rate] * len(ids),
    **options,
  )
  run = _train_alone(
    experiment.train_loss,
    _at_rate(s.client, learning_rate),
    local_steps,
    s.seed,
    experiment.mesh,
    s.deterministic,
  )
  trainable, base = start or (experiment.trainable, experiment.base)
  with jax.set_mesh(experiment.mesh):
    stacked, nonfinite = run(
      trainable, base, clients.put(packed, experiment.mesh)
    )
  if nonfinite:
    _LOG.warning("local only: %d clients were not finite", int(nonfinite))
  return jax.tree.map(lambda x: x[: len(ids)], stacked)


@functools.lru_cache(maxsize=4)  # So that one run compiles it once.
def _train_alone(
  loss: LossFn,
  settings: ClientSettings,
  local_steps: int,
  seed: int,
  mesh: Mesh,
  is_deterministic: bool,
) -> Any:
  """Jitted `(trainable, base, cohort) -> (trainables, number not finite)`."""
  optimizer = _optimizer(settings, local_steps)
  update = clients.local_update(loss, optimizer)

  def run(trainable, base, cohort):
    key, first = jax.random.key(seed), np.int32(0)
    result = clients.run_cohort(
      update, _KEEP_ALL, (), trainable, base, cohort, (), key, first
    )
    deltas, _ = _KEEP_ALL.finish((), result.collected)
    return trees.add(trainable, deltas), result.nonfinite.sum()

  return deterministic.jit_cohort(run, mesh, is_deterministic)


def centralized(
  experiment: Experiment, num_steps: int, learning_rate: float | None = None
) -> PyTree:
  """Trains one model on the pooled data of all training clients.

  All devices share each batch, as nothing is to be gained from lanes here.

  Args:
    experiment: Gives the data, the loss and the client settings. All rows are
      held in host memory.
    num_steps: Steps of `client.batch_size` rows, shuffled anew every epoch.
    learning_rate: Default the clients' in the federation.

  Returns:
    The trainable.

  Raises:
    ConfigError: `num_steps` below 1.
  """
  _check_steps("num_steps", num_steps)
  s, source = experiment.settings, experiment.data.train
  optimizer = _optimizer(_at_rate(s.client, learning_rate), num_steps)
  read = [source.read(client_id) for client_id in source.ids]
  pool = {name: np.concatenate([x[name] for x in read]) for name in read[0]}
  grad_fn = jax.grad(experiment.train_loss, has_aux=True)

  @jax.jit(donate_argnums=(0, 1))
  def step(trainable, state, base, batch, index):
    key = jax.random.fold_in(jax.random.key(s.seed), index)
    grads, _ = grad_fn(trainable, base, batch, key)
    updates, state = optimizer.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state

  size = s.client.batch_size
  mesh = _without_lanes(experiment.mesh, size)
  place = NamedSharding(mesh, jax.P("fsdp"))
  num_rows = sum(source.size(client_id) for client_id in source.ids)
  base, trainable = _move((experiment.base, experiment.trainable), mesh)
  with jax.set_mesh(mesh):
    trainable = trees.copy(trainable)
    state = jax.jit(optimizer.init)(trainable)
    for index, rows in enumerate(_shuffled(num_rows, size, num_steps, s.seed)):
      batch = {name: x[rows] for name, x in pool.items()}
      batch = jax.device_put(batch | {"mask": np.ones(size, np.float32)}, place)
      trainable, state = step(trainable, state, base, batch, index)
      # One dispatch at a time: virtual CPU devices deadlock with more queued.
      jax.block_until_ready(trainable)
  return _move(trainable, experiment.mesh)


def evaluate_each(
  experiment: Experiment,
  ids: Sequence[str],
  stacked: PyTree,
  populations: Sequence[str] | None = None,
) -> dict[str, float]:
  """Evaluates clients that trained alone.

  Args:
    experiment: Gives the populations to evaluate on.
    ids: The clients.
    stacked: Their trainables, leaves [len(ids), ...], as of `local_only`.
    populations: Which of the experiment's; default all.

  Returns:
    {"eval/<population>/<metric>": value over clients}, as
    `experiment.evaluate`. In a population that holds some of `ids`, each of
    these is evaluated with its own trainable and the others are left out; a
    client of another population gets the mean over all the trainables.
  """
  metrics, row = {}, {client_id: i for i, client_id in enumerate(ids)}
  for population, source in experiment.data.evals.items():
    if populations is not None and population not in populations:
      continue
    own = [client_id for client_id in source.ids if client_id in row]
    cohort = experiment.pack_to_evaluate(data.subset(source, own or source.ids))
    with jax.set_mesh(experiment.mesh):
      if own:
        rows = np.array([row[client_id] for client_id in own])
        mine = jax.tree.map(lambda x, rows=rows: x[rows], stacked)
        sums = jax.device_get(
          experiment.run_own_evaluation(mine, experiment.base, cohort)
        )
      else:
        each = []
        for i in range(len(ids)):
          one = jax.tree.map(lambda x, i=i: x[i], stacked)
          sums = experiment.run_evaluation(one, experiment.base, cohort)
          each.append(jax.device_get(sums))
        sums = jax.tree.map(lambda *x: np.mean(x, axis=0), *each)
    summary = evaluation.summarise(sums)
    metrics |= {f"eval/{population}/{k}": v for k, v in summary.items()}
  return metrics


def _check_steps(name: str, steps: int) -> None:
  if steps < 1:
    raise errors.ConfigError(f"{name}: got {steps}, expected at least 1")


def _at_rate(settings: ClientSettings, rate: float | None) -> ClientSettings:
  """Client settings at another learning rate, or at their own."""
  if rate is None:
    return settings
  return dataclasses.replace(settings, learning_rate=rate)


def _optimizer(
  settings: ClientSettings, steps: int
) -> optax.GradientTransformation:
  """The client optimizer, its schedule over `steps`."""
  rate = optimizers.schedule(settings.schedule, settings.learning_rate, steps)
  return optimizers.local_optimizer(settings, rate)


def _without_lanes(mesh: Mesh, batch_size: int) -> Mesh:
  """The same devices, `clients` added to `fsdp` where the batch divides."""
  shape = dict(mesh.shape)
  fsdp = shape["clients"] * shape["fsdp"]
  if batch_size % fsdp or mesh.shape["fsdp"] > 1:
    return mesh
  return sharding.make_mesh(
    shape | {"clients": 1, "fsdp": fsdp}, mesh.devices.flatten()
  )


def _move(tree: PyTree, mesh: Mesh) -> PyTree:
  """Puts arrays on another mesh; what was whole over `fsdp` stays whole."""

  def place(x):
    old = x.sharding
    whole = old.mesh.shape["fsdp"] == 1 or mesh.shape["fsdp"] == 1
    spec = [None if a == "fsdp" and whole else a for a in old.spec]
    return jax.device_put(x, NamedSharding(mesh, jax.P(*spec)))

  return jax.tree.map(place, tree)


def _everywhere(experiment: Experiment) -> NamedSharding:
  return NamedSharding(experiment.mesh, jax.P())


def _shuffled(num_rows: int, size: int, steps: int, seed: int) -> Iterator:
  """Yields [size] row numbers a step, from one permutation after another."""
  rows, epoch = np.zeros((0,), np.int64), 0
  for _ in range(steps):
    while len(rows) < size:
      rng = sampling.generator("centralized", seed, epoch)
      rows, epoch = np.append(rows, rng.permutation(num_rows)), epoch + 1
    yield rows[:size]
    rows = rows[size:]
