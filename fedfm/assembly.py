"""From settings to the pieces of a run, checked and placed on the mesh."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from fedfm import (
  adapters,
  choices,
  clients,
  errors,
  evaluation,
  models,
  planning,
  sharding,
  types,
)
from fedfm import data as data_lib
from fedfm import settings as settings_lib
from fedfm.data import holdout, text
from fedfm.models import families
from fedfm.settings import Settings

PyTree = Any
BUILTIN_MODEL = pathlib.Path(__file__).parent / "models" / "byte_llama"


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
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    algorithm: The federated algorithm.
    data: Tokenized clients to train on, populations to evaluate on.
    tokenizer: Text to tokens and back.
    sampler: Round -> the ids of its cohort.
    buckets: Sizes that cohorts are padded to: (steps, slots).
  """

  settings: Settings
  mesh: Mesh
  model: models.Model
  base: PyTree
  adapter: adapters.Adapter
  trainable: PyTree
  loss: types.LossFn
  algorithm: types.FederatedAlgorithm
  data: data_lib.FederatedData
  tokenizer: data_lib.Tokenizer
  sampler: data_lib.sampling.Sampler
  buckets: tuple[tuple[int, ...], tuple[int, ...]]

  @functools.cached_property
  def state_shardings(self) -> types.ServerState:
    """A sharding per leaf of the state: like the trainable, or replicated."""
    return sharding.shardings_like(
      self.mesh,
      jax.eval_shape(self.algorithm.init, self.trainable),
      self.trainable,
      jax.tree.map(lambda x: x.sharding, self.trainable),
    )

  @functools.cached_property
  def run_round(self) -> Any:
    """The jitted round; its state is donated, its metrics are replicated."""
    return jax.jit(
      self.algorithm.round,
      donate_argnums=0,
      out_shardings=(
        self.state_shardings,
        NamedSharding(self.mesh, jax.P()),
      ),
    )

  @functools.cached_property
  def run_evaluation(self) -> Any:
    """Jitted `(trainable, base, cohort) -> sums [clients]`, replicated."""
    return jax.jit(
      functools.partial(evaluation.evaluate_cohort, self.loss),
      out_shardings=NamedSharding(self.mesh, jax.P()),
    )

  def initial_state(self) -> types.ServerState:
    """Returns the server state of round 0, placed on the mesh."""
    with jax.set_mesh(self.mesh):
      return jax.jit(self.algorithm.init, out_shardings=self.state_shardings)(
        self.trainable
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
    packed = data_lib.pack(
      source,
      source.ids,
      batch_size=e.batch_size,
      max_examples=e.max_examples or None,
      lanes=self.num_lanes,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    return clients.put(packed, self.mesh)

  @functools.cached_property
  def num_lanes(self) -> int:
    """Lanes of every cohort of the run."""
    return planning.choose_lanes(
      self.settings, self.data.train, self.sampler, self.mesh
    )

  def cohort(self, round_index: int) -> types.Cohort:
    """Samples, reads, packs and places the cohort of a round."""
    ids = self.sampler.sample(round_index)
    packed = data_lib.pack(
      self.data.train,
      ids,
      lanes=self.num_lanes,
      shuffle=True,
      seed=self.settings.seed,
      round=round_index,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      step_buckets=self.buckets[0],
      slot_buckets=self.buckets[1],
      **planning.pack_options(self.settings),
    )
    return clients.put(packed, self.mesh)

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
      summary = evaluation.summarise(sums, self.tokenizer.name == "bytes")
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
    names, cohort = self.eval_cohort
    base = self.base if base is None else base
    with jax.set_mesh(self.mesh):
      sums = jax.device_get(self.run_evaluation(trainable, base, cohort))
    result = {}
    for population in self.data.evals:
      rows = [i for i, (name, _) in enumerate(names) if name == population]
      result[population] = {k: v[rows] for k, v in sums.items()}
      result[population]["ids"] = [names[i][1] for i in rows]
    return result


def load_data(
  settings: Settings,
) -> tuple[data_lib.FederatedData, data_lib.Tokenizer]:
  """Loads and tokenizes the population that the settings name.

  Args:
    settings: The run's settings.

  Returns:
    Numeric clients, and the tokenizer.

  Raises:
    DataError: Missing or malformed data.
  """
  d = settings.data
  if d.name == "python_stdlib":
    raw, key = data_lib.python_stdlib.load(d.path or None), "text"
  elif d.name == "jsonl":
    source = data_lib.from_jsonl(d.path, d.client_key, d.text_key)
    raw = holdout.hold_out(source, d.unseen_fraction, d.heldout_fraction)
    key = d.text_key
  else:
    source = data_lib.from_tfds(d.name, d.split, d.client_key, d.path or None)
    raw = holdout.hold_out(source, d.unseen_fraction, d.heldout_fraction)
    key = d.text_key
  tokenizer = data_lib.byte_tokenizer()
  tokenize = functools.partial(
    text.tokenize,
    tokenizer=tokenizer,
    sequence_length=d.sequence_length,
    text_key=key,
  )
  numeric = data_lib.FederatedData(
    train=tokenize(raw.train),
    evals={name: tokenize(source) for name, source in raw.evals.items()},
  )
  return numeric, tokenizer


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
  for field in ("client.batch_size", "eval.batch_size"):
    if settings_lib.get(settings, field) % mesh.shape["fsdp"]:
      raise errors.ConfigError(
        f"{field}: mesh.fsdp = {mesh.shape['fsdp']} does not divide "
        f"{settings_lib.get(settings, field)}"
      )
  model = _model(settings)
  adapter = _adapter(settings, model)
  loss = models.losses.language_model(adapters.loss_apply(adapter))
  data, tokenizer = load_data(settings)
  if tokenizer.vocab_size > model.config.vocab_size:
    raise errors.ConfigError(
      f"model.path: vocabulary of {model.config.vocab_size} is smaller than "
      f"the tokenizer's {tokenizer.vocab_size}"
    )
  algorithm = choices.algorithm(settings, loss, len(data.train.ids))
  sampler = choices.sampler(
    settings,
    data.train.ids,
    lambda: [data.train.size(i) for i in data.train.ids],
  )
  lanes = planning.choose_lanes(settings, data.train, sampler, mesh)
  buckets = planning.plan_buckets(settings, data.train, sampler, lanes)
  places = sharding.shardings(mesh, model.axes, model.shapes)
  params: PyTree = None  # Set below, by one of two places.
  if settings.model.init == "pretrained":
    params = models.huggingface.load(
      _model_folder(settings), mesh=mesh, dtype=settings.model.dtype
    )[1]
  # All is checked; from here on things are compiled.
  key = jax.random.key(settings.seed)
  if settings.model.init == "random":
    params = jax.jit(model.init, out_shardings=places)(key)
  trainable_shardings = sharding.shardings_like(
    mesh,
    jax.eval_shape(adapter.init, key, model.shapes),
    model.shapes,
    places,
  )
  trainable = jax.jit(adapter.init, out_shardings=trainable_shardings)(
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
    algorithm=algorithm,
    data=data,
    tokenizer=tokenizer,
    sampler=sampler,
    buckets=buckets,
  )


def _model_folder(settings: Settings) -> pathlib.Path:
  return pathlib.Path(settings.model.path or BUILTIN_MODEL)


def _model(settings: Settings) -> models.Model:
  """Builds the model from its config.json alone; reads no weights."""
  m = settings.model
  file = _model_folder(settings) / models.huggingface.CONFIG
  _, config = families.read_config(file)
  if settings.data.sequence_length > config.max_length:
    raise errors.ConfigError(
      f"data.sequence_length: got {settings.data.sequence_length}, but the "
      f"model's longest is {config.max_length}"
    )
  return models.decoder(
    dataclasses.replace(
      config,
      dtype=m.dtype,
      param_dtype=m.dtype,
      scan_layers=m.scan_layers,
      remat=m.remat,
    )
  )


def _adapter(settings: Settings, model: models.Model) -> adapters.Adapter:
  a = settings.adapter
  if a.kind == "full":
    return adapters.full(model)
  if a.kind == "head":
    return adapters.head(model)
  try:
    return adapters.lora(model, rank=a.rank, alpha=a.alpha, targets=a.targets)
  except errors.ConfigError as e:
    raise errors.ConfigError(f"adapter.{e}") from None
