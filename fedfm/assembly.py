"""From settings to the pieces of a run, checked and placed on the mesh."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from fedfm import (
  adapters,
  blueprint,
  checkpoint,
  choices,
  clients,
  dispatch,
  errors,
  evaluation,
  models,
  participation,
  planning,
  privacy,
  protection,
  sharding,
  types,
)
from fedfm import data as data_lib
from fedfm import ledger as ledger_lib
from fedfm import population as population_lib
from fedfm.clients import deterministic
from fedfm.clients.host_store import HostStore
from fedfm.clients.hosted import hosted
from fedfm.data import continual, resident
from fedfm.settings import Settings

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """The pieces that a config names, built and placed on the mesh.

  Attributes:
    settings: What it was built from.
    mesh: The mesh; run under `jax.set_mesh(mesh)`.
    model: The foundation model.
    base: Its weights, frozen; None where all weights are trained.
    adapter: What clients train.
    trainable: The initial trainable.
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`, to evaluate.
    train_loss: Likewise, to train: with dropout where the adapter has it.
    algorithm: The federated algorithm.
    data: Tokenized clients to train on, populations to evaluate on.
    tokenizer: Text to tokens and back; None of images.
    sampler: Round -> the ids of its cohort.
    schedule: Round -> who of the population is there, and with which data.
    plan: Round -> who works in it, and how much.
    ledger: What rounds cost.
    accounting: What a round costs in privacy; None where nobody promises any.
    buckets: Sizes that cohorts are padded to: (steps, slots).
    table: All rows to train on, where they stay on the device; else None.
    client_store: Where clients' states are between rounds: device or host.
    host: The store on the host, once `hosting.open_store` opened it.
    items: State on the host that is checkpointed along, by name.
  """

  settings: Settings
  mesh: Mesh
  model: models.Model
  base: PyTree
  adapter: adapters.Adapter
  trainable: PyTree
  loss: types.LossFn
  train_loss: types.LossFn
  algorithm: types.FederatedAlgorithm
  data: data_lib.FederatedData
  tokenizer: data_lib.Tokenizer | None
  sampler: data_lib.sampling.Sampler
  schedule: continual.Schedule
  plan: Callable[[int], planning.Work]
  ledger: ledger_lib.Ledger
  buckets: tuple[tuple[int, ...], tuple[int, ...]]
  accounting: privacy.Accounting | None = None
  table: dict[str, jax.Array] | None = None
  client_store: str = "device"
  host: HostStore | None = None
  items: Mapping[str, checkpoint.Item] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def state_shardings(self) -> types.ServerState:
    """A sharding per leaf of the state; see `blueprint.state_shardings`."""
    return blueprint.state_shardings(
      self.mesh,
      self.algorithm,
      self.base,
      self.trainable,
      len(self.data.train),
      self.client_store,
    )

  @functools.cached_property
  def run_round(self) -> Any:
    """The jitted round; its state is donated, its metrics are replicated."""
    return self._jit_round(self._round_fn)

  @functools.cached_property
  def run_naming_round(self) -> Any:
    """As `run_round`; its metrics name bad clients, so not all are scalars."""
    return self._jit_round(clients.naming_clients(self._round_fn))

  @functools.cached_property
  def run_rounds(self) -> Any:
    """As `run_naming_round`, of `cohorts`; see `dispatch.many_rounds`."""
    return self._jit_round(dispatch.many_rounds(self._round_fn))

  @property
  def _round_fn(self) -> Any:
    round_fn = self.algorithm.round
    return round_fn if self.table is None else resident.looked_up(round_fn)

  def _jit_round(self, round_fn: Any) -> Any:
    if self.settings.deterministic:
      run_round = deterministic.deterministic(round_fn, self.mesh)
    else:
      run_round = blueprint.jit_round(self.mesh, round_fn, self.state_shardings)
    if self.client_store == "host":
      if self.host is None:
        raise errors.ConfigError(
          "client.store: 'host' needs the folder of a run, expected 'device'"
        )
      run_round = hosted(run_round, self.host, self.mesh)
    if self.table is not None:
      return lambda s, base, cohort: run_round(s, (base, self.table), cohort)
    return run_round

  @functools.cached_property
  def run_evaluation(self) -> Any:
    """Jitted `(trainable, base, cohort) -> sums [clients]`, replicated."""
    return deterministic.jit_cohort(
      functools.partial(evaluation.evaluate_cohort, self.loss),
      self.mesh,
      self.settings.deterministic,
    )

  @functools.cached_property
  def run_own_evaluation(self) -> Any:
    """As `run_evaluation`, of trainables stacked [clients, ...], one each."""
    return deterministic.jit_cohort(
      functools.partial(evaluation.evaluate_own, self.loss),
      self.mesh,
      self.settings.deterministic,
    )

  @functools.cached_property
  def _init_state(self) -> Any:
    places = self.state_shardings
    jit = blueprint.jit_for(self.settings, self.mesh)
    if self.client_store == "device":
      return jit(self.algorithm.init, places)

    def init(trainable):
      return dataclasses.replace(self.algorithm.init(trainable), clients=())

    run = jit(init, dataclasses.replace(places, clients=()))
    first = np.zeros((), np.int32)  # The store's version.
    return lambda t: dataclasses.replace(run(t), clients=first)

  def initial_state(self, trainable: PyTree = None) -> types.ServerState:
    """Returns the server state of round 0, placed on the mesh.

    Args:
      trainable: Where to start; default the experiment's own.
    """
    with jax.set_mesh(self.mesh):
      return self._init_state(
        self.trainable if trainable is None else trainable
      )

  @functools.cached_property
  def eval_cohort(self) -> tuple[tuple[tuple[str, str], ...], types.Cohort]:
    """All populations as one cohort, packed and placed once.

    One program serves them all. The first of the pair names each client of the
    cohort, as (population, client id).
    """
    names = tuple(
      (population, client_id)
      for population, source in self.data.evals.items()
      for client_id in source.ids
    )
    return names, self.pack_to_evaluate(data_lib.union(self.data.evals))

  def pack_to_evaluate(self, source: data_lib.ClientSource) -> types.Cohort:
    """Packs and places all clients of a source as `settings.eval` says."""
    e = self.settings.eval
    if e.max_examples:
      source = data_lib.spread(source, e.max_examples)
    packed = data_lib.pack(
      source,
      source.ids,
      batch_size=e.batch_size,
      lanes=self.num_lanes,
      own_lanes=clients.own_lanes(self.mesh, self.num_lanes),
    )
    return clients.put(packed, self.mesh)

  @functools.cached_property
  def aligned(self) -> bool:
    """Whether every client keeps its place on the lanes."""
    return planning.is_aligned(self.settings, self.algorithm, self.data.train)

  @functools.cached_property
  def num_lanes(self) -> int:
    """Lanes of every cohort of the run."""
    return planning.choose_lanes(
      self.settings, self.data.train, self.plan, self.mesh, self.aligned
    )

  def client_ids(self, round_index: int) -> Sequence[str]:
    """Names the clients of a round, in the cohort's order."""
    return self.plan(round_index).ids

  def cohort(self, round_index: int) -> types.Cohort:
    """Samples, reads, packs and places the cohort of a round."""
    (packed,) = self._pack(range(round_index, round_index + 1))
    return clients.put(packed, self.mesh)

  def cohorts(self, rounds: range) -> types.Cohort:
    """The cohorts of several rounds, in buffers of one size [rounds, ...]."""
    return clients.put_rounds(self._pack(rounds), self.mesh)

  def _pack(self, rounds: range) -> list[types.Cohort]:
    sizes = planning.Sizes(*self.buckets, (self.settings.clients_per_round,))
    return planning.pack(
      self.settings,
      [self.schedule.source(r) for r in rounds],
      rounds,
      [self.plan(r) for r in rounds],
      sizes,
      self.num_lanes,
      self.mesh,
      self.aligned,
    )

  def evaluate(
    self, trainable: PyTree, base: PyTree = None
  ) -> dict[str, float]:
    """Evaluates on all populations.

    Args:
      trainable: The weights to evaluate.
      base: Default the experiment's own; what `effective_base` gives.

    Returns:
      {"eval/<population>/<metric>": value over clients}.
    """
    values = {}
    for name, sums in self.evaluate_clients(trainable, base).items():
      summary = evaluation.summarise(sums)
      values |= {f"eval/{name}/{k}": v for k, v in summary.items()}
    return values

  def evaluate_clients(
    self, trainable: PyTree, base: PyTree = None
  ) -> dict[str, dict[str, Any]]:
    """Evaluates on all populations, and keeps clients apart.

    Args:
      trainable: The weights to evaluate.
      base: As in `evaluate`.

    Returns:
      {population: {"ids": list, "tokens", "loss_sum", "correct": [clients]}}.
    """
    if not self.data.evals:  # Nothing is held out.
      return {}
    _, cohort = self.eval_cohort
    base = self.base if base is None else base
    with jax.set_mesh(self.mesh):
      sums = jax.device_get(self.run_evaluation(trainable, base, cohort))
    return self.by_population(sums)

  def by_population(self, sums: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sorts sums [clients] of `eval_cohort` by population, with their ids."""
    names, result = self.eval_cohort[0], {}
    for population in self.data.evals:
      rows = [i for i, (name, _) in enumerate(names) if name == population]
      result[population] = {k: v[rows] for k, v in sums.items()}
      result[population]["ids"] = [names[i][1] for i in rows]
    return result


def build(settings: Settings) -> Experiment:
  """Builds everything that a run needs; checks all of it first.

  Args:
    settings: The run's settings.

  Returns:
    An `Experiment`. Nothing is compiled before every check has passed.

  Raises:
    ConfigError: A bad field, named.
    DataError: Bad data.
    CheckpointError: Bad weights.
  """
  mesh = sharding.make_mesh(dataclasses.asdict(settings.mesh))
  blueprint.check_rows(settings, mesh)
  if settings.deterministic and mesh.size != mesh.shape["clients"]:
    raise errors.ConfigError(
      f"deterministic: got a mesh of fsdp = {mesh.shape['fsdp']}, tensor = "
      f"{mesh.shape['tensor']}, expected 1 and 1"
    )
  model = blueprint.make_model(settings, mesh)
  adapter = blueprint.make_adapter(settings, model)
  loss, train_loss = blueprint.losses(settings, model, adapter, mesh)
  data, tokenizer = population_lib.load(settings, model.config)
  algorithm = blueprint.algorithm(
    settings, train_loss, adapter, len(data.train.ids)
  )
  key_shape = jax.eval_shape(jax.random.key, 0)
  trainable_shapes = jax.eval_shape(adapter.init, key_shape, model.shapes)
  base = None if adapter.kind == "full" else model.shapes
  state = choices.check_trainable(settings, algorithm, trainable_shapes, base)
  client_store = planning.choose_store(settings, state.clients)
  realism = participation.realism(settings)
  ledger = ledger_lib.make_ledger(
    settings, model, adapter.kind, trainable_shapes, algorithm.passes, realism
  )
  rows, table = data.train, None
  if settings.data.resident:
    rows, table = resident.rows(data.train)
  schedule = participation.schedule_of(settings, rows)
  data = data._replace(evals=schedule.evals(data.evals))
  sampler = participation.sampler(
    settings,
    data.train.ids,
    data.train.size,
    participation.eligible(settings, schedule, realism),
  )
  plan = planning.plan(
    settings,
    algorithm,
    sampler,
    schedule,
    realism,
    ledger.planned_costs(
      trainable_shapes,
      choices.compressor(settings, "up"),
      choices.compressor(settings, "down"),
    ),
  )
  aligned = planning.is_aligned(settings, algorithm, data.train)
  lanes = planning.choose_lanes(settings, data.train, plan, mesh, aligned)
  buckets = planning.plan_buckets(settings, data.train, plan, lanes, aligned)
  places = sharding.shardings(mesh, model.axes, model.shapes)
  params: PyTree = None  # Set below, by one of two places.
  if settings.model.init == "pretrained":
    params = blueprint.load_weights(settings, mesh, model)
  evaluation.check_name(
    "checkpoint.keep_best",
    settings.checkpoint.keep_best,
    data.evals,
    settings.data.task == "language_model" and not settings.data.token_key,
    personal=algorithm.personal is not None,
    finetuned=data.train.ids if settings.eval.finetune_steps else (),
  )
  # All is checked; from here on things are compiled.
  key, jit = jax.random.key(settings.seed), blueprint.jit_for(settings, mesh)
  if settings.model.init == "random":
    params = jit(model.init, places)(key)
  trainable_shardings = blueprint.trainable_shardings(mesh, model, adapter)
  trainable = jit(adapter.init, trainable_shardings)(
    jax.random.fold_in(key, 1), params
  )
  return Experiment(
    settings=settings,
    mesh=mesh,
    model=model,
    base=None if adapter.kind == "full" else params,
    adapter=adapter,
    trainable=trainable,
    loss=loss,
    train_loss=train_loss,
    algorithm=algorithm,
    data=data,
    tokenizer=tokenizer,
    sampler=sampler,
    schedule=schedule,
    plan=plan,
    ledger=ledger,
    buckets=buckets,
    accounting=protection.accounting(settings, len(data.train.ids)),
    table=None if table is None else resident.place(table, mesh),
    client_store=client_store,
  )
