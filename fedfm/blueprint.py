"""The parts of a run that need neither data nor weights: shapes suffice.

`assembly` fills them with arrays and runs them; `scaling` compiles them for
machines that are not there.
"""

from collections.abc import Callable
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
  model_folders,
  models,
  planning,
  sharding,
  trees,
  types,
)
from fedfm import settings as settings_lib
from fedfm.clients import deterministic, store
from fedfm.models import attention, families, quantization
from fedfm.settings import Settings

PyTree = Any
_TASKS = {
  models.DecoderConfig: "language_model",
  models.CLIPConfig: "contrastive",
}
# They differentiate forward, or twice, which derivatives by hand do not know.
_OTHER_DERIVATIVES = ("forward_gradients", "per_fedavg")
BUILTIN_MODEL = pathlib.Path(__file__).parent / "models" / "byte_llama"


def check_rows(settings: Settings, mesh: Mesh) -> None:
  """Raises ConfigError for batches that `mesh.fsdp` does not divide."""
  fsdp = mesh.shape["fsdp"]
  rows, parts = settings.client.batch_size, settings.client.accumulate
  of = f" in each of client.accumulate {parts}" if parts > 1 else ""
  for field, size in (
    ("client.batch_size", rows // parts),
    ("eval.batch_size", settings.eval.batch_size),
  ):
    if size % fsdp:
      where = of if field.startswith("client") else ""
      raise errors.ConfigError(
        f"{field}: mesh.fsdp = {fsdp} does not divide {size}{where}"
      )


def model_folder(settings: Settings) -> pathlib.Path:
  """The folder that holds the model's config and, if read, its weights."""
  return pathlib.Path(settings.model.path or BUILTIN_MODEL)


def make_model(settings: Settings, mesh: Mesh) -> models.Model:
  """Builds the model from its config alone; reads no weights."""
  m, kernel = settings.model, attention_kernel(settings)
  folder = model_folder(settings)
  with errors.at("model.path", folder, (errors.FedFMError,)):
    config = model_folders.read_config(folder)
  if m.num_classes not in (0, getattr(config, "num_classes", 0)):
    config = families.with_classifier(config, m.num_classes)
  check_task(settings, config)
  execution = {
    "dtype": m.dtype,
    "param_dtype": m.dtype,
    "scan_layers": m.scan_layers,
    "remat": m.remat,
    "attention_kernel": kernel,
  }
  has = {field.name for field in dataclasses.fields(config)}
  model = models.build(
    dataclasses.replace(
      config, **{k: v for k, v in execution.items() if k in has}
    )
  )
  if m.quantize:
    model = quantization.quantized(model, m.quantize, mesh)
  return model


def attention_kernel(settings: Settings) -> str:
  """Returns a kernel that the algorithm can differentiate.

  Args:
    settings: The run's settings.

  Returns:
    The one that they name, or "xla" where "auto" might choose another.

  Raises:
    ConfigError: There is none, or another field stands in the way.
  """
  kernel, length = (
    settings.model.attention_kernel,
    settings.data.sequence_length,
  )
  if settings.algorithm not in _OTHER_DERIVATIVES:
    return kernel
  what = f"but algorithm {settings.algorithm!r} differentiates forward or twice"
  if kernel not in ("auto", "xla"):
    raise errors.ConfigError(
      f"model.attention_kernel: got {kernel!r}, {what}: expected 'xla'"
    )
  if not settings.data.image_key and length > attention.MAX_UNROLLED:
    raise errors.ConfigError(
      f"data.sequence_length: got {length}, {what}: expected at most "
      f"{attention.MAX_UNROLLED}"
    )
  parts = settings.client.accumulate
  if settings.algorithm == "forward_gradients" and parts > 1:
    raise errors.ConfigError(
      f"client.accumulate: got {parts}, {what}: expected 1"
    )
  return "xla"


def load_weights(settings: Settings, mesh: Mesh, model: models.Model) -> PyTree:
  """Reads the weights of the model that `make_model` built.

  Args:
    settings: The run's settings.
    mesh: Where to put them.
    model: The model.

  Returns:
    Its parameters.
  """
  classes = getattr(model.config, "num_classes", 0)
  overrides: dict[str, Any] = {"num_classes": classes} if classes else {}
  folder = model_folder(settings)
  with errors.at("model.path", folder):
    return model_folders.load(
      folder,
      mesh=mesh,
      dtype=settings.model.dtype,
      quantize=settings.model.quantize,
      **overrides,
    )[1]


def check_task(settings: Settings, config: Any) -> None:
  """Raises ConfigError for a model that cannot do `data.task`.

  Args:
    settings: The run's settings.
    config: The model's.
  """
  d, kind = settings.data, type(config).__name__.removesuffix("Config")
  expected = _TASKS.get(type(config), "classification")
  if d.task not in ("classification", expected):
    raise errors.ConfigError(
      f"data.task: got {d.task!r}, but model.path is a {kind}, which expects "
      f"{expected!r}"
    )
  if d.task == "language_model":
    if d.image_key:
      raise errors.ConfigError(
        f"data.image_key: got {d.image_key!r}, but data.task 'language_model' "
        "expects ''"
      )
  elif d.task == "classification" and not getattr(config, "num_classes", 0):
    raise errors.ConfigError(
      f"model.num_classes: data.task 'classification' needs a classifier, and "
      f"model.path is a {kind} without one; expected at least 2, on an encoder "
      "or a vision model"
    )
  of_texts = hasattr(config, "vocab_size")
  of_images = not of_texts or d.task == "contrastive"
  if bool(d.image_key) != of_images:
    raise errors.ConfigError(
      f"data.image_key: got {d.image_key!r}, but model.path is a {kind}, which "
      f"expects {'the field of the images' if of_images else 'text'}"
    )
  if of_texts and d.sequence_length > config.max_length:
    raise errors.ConfigError(
      f"data.sequence_length: got {d.sequence_length}, but the model's longest "
      f"is {config.max_length}"
    )


def make_adapter(settings: Settings, model: models.Model) -> adapters.Adapter:
  """Builds what clients train; a mistake is named as the config has it."""
  a = settings.adapter
  arguments: dict[str, Any] = {"model": model}
  if a.kind in ("lora", "dora"):
    arguments |= {"rank": a.rank, "alpha": a.alpha, "targets": a.targets}
  try:
    adapter = settings_lib.call_with_options(
      getattr(adapters, a.kind), arguments, a.options, "adapter.options"
    )
    if a.also:
      arguments["also"] = a.also
      adapter = adapters.with_parameters(model, adapter, a.also)
  except errors.ConfigError as e:
    if str(e).partition(":")[0] in arguments:
      raise errors.ConfigError(f"adapter.{e}") from None
    raise
  virtual = adapter.config.get("num_tokens", 0)
  length = getattr(model.config, "max_length", 0)
  if length and virtual and virtual + settings.data.sequence_length > length:
    raise errors.ConfigError(
      f"adapter.options.num_tokens: {virtual} virtual tokens before rows of "
      f"data.sequence_length = {settings.data.sequence_length}, but the "
      f"model's longest is {length}"
    )
  return adapter


def losses(
  settings: Settings,
  model: models.Model,
  adapter: adapters.Adapter,
  mesh: Mesh,
) -> tuple[types.LossFn, types.LossFn]:
  """Builds the losses, their logits in chunks where they would be many.

  Args:
    settings: The run's settings.
    model: The foundation model.
    adapter: What clients train.
    mesh: The mesh.

  Returns:
    `loss(trainable, base, batch, key) -> (scalar, aux)`, to evaluate with; and
    to train with, which has the adapter's dropout.
  """
  make_loss: Any = models.losses.classification
  if settings.data.task == "contrastive":
    make_loss = models.losses.contrastive
  if settings.data.task == "language_model":
    make_loss = functools.partial(
      models.losses.language_model,
      unembed=adapters.loss_unembed(adapter, model),
      chunk=planning.loss_chunk(settings, mesh, model.config.vocab_size),
    )
  loss = make_loss(adapters.loss_apply(adapter))
  return loss, adapters.train_loss(adapter, make_loss)


def algorithm(
  settings: Settings,
  loss: types.LossFn,
  adapter: adapters.Adapter,
  num_clients: int,
) -> types.FederatedAlgorithm:
  """Builds the algorithm, its local steps in microbatches where asked for.

  Args:
    settings: The run's settings.
    loss: The one to train with, from `losses`.
    adapter: What clients train.
    num_clients: Size of the population.

  Returns:
    The algorithm.

  Raises:
    ConfigError: As `choices.algorithm`.
  """
  loss = clients.accumulated(loss, settings.client.accumulate)
  return choices.algorithm(settings, loss, adapter, num_clients)


def trainable_shardings(
  mesh: Mesh, model: models.Model, adapter: adapters.Adapter
) -> PyTree:
  """A sharding per leaf of the trainable: by its axes, or like the model's."""
  shapes = jax.eval_shape(adapter.init, jax.random.key(0), model.shapes)
  if adapter.axes is not None:
    return sharding.shardings(mesh, adapter.axes, shapes)
  places = sharding.shardings(mesh, model.axes, model.shapes)
  return sharding.shardings_like(mesh, shapes, model.shapes, places)


def state_shardings(
  mesh: Mesh,
  algorithm: types.FederatedAlgorithm,
  base: PyTree,
  trainable: PyTree,
  num_clients: int,
  client_store: str = "device",
) -> types.ServerState:
  """A sharding per leaf of the server's state.

  Like the trainable's, like the base's (what algorithms add to its kernels), or
  replicated; the client store's rows are split over `clients`, where they
  divide. With the store on the host, its slots lie on their lanes.

  Args:
    mesh: The mesh.
    algorithm: The algorithm.
    base: Arrays or shapes, each with its sharding; or None.
    trainable: Likewise.
    num_clients: Size of the population.
    client_store: "device" or "host".

  Returns:
    A `ServerState` of shardings.
  """
  known = trees.by_path(base) | trees.by_path(trainable)
  like_known = functools.partial(
    sharding.shardings_like,
    mesh,
    reference=known,
    reference_shardings={path: x.sharding for path, x in known.items()},
  )
  state = jax.eval_shape(algorithm.init, trainable)
  new_client = algorithm.client_state or (lambda trainable: ())
  row = jax.eval_shape(new_client, trainable)
  if client_store == "host":
    lanes = NamedSharding(mesh, jax.P("clients"))
    rows: PyTree = store.InSlots(jax.tree.map(lambda _: lanes, row))
  else:
    rows = store.shardings(mesh, like_known(row), num_clients)
  return dataclasses.replace(like_known(state), clients=rows)


def jit_round(
  mesh: Mesh, round_fn: Callable[..., Any], shardings: types.ServerState
) -> Any:
  """Jits a round; its state is donated, its metrics are replicated.

  Args:
    mesh: The mesh.
    round_fn: The algorithm's `round`, or one that is called like it.
    shardings: From `state_shardings`.

  Returns:
    The jitted `round(state, base, cohort)`.
  """
  return jax.jit(
    round_fn,
    donate_argnums=0,
    out_shardings=(shardings, NamedSharding(mesh, jax.P())),
  )


def jit_for(settings: Settings, mesh: Mesh) -> Any:
  """Returns `jit(fn, out_shardings)` for what runs no clients."""
  if settings.deterministic:
    return lambda fn, _: deterministic.on_one_device(fn, mesh)
  return lambda fn, places: jax.jit(fn, out_shardings=places)
