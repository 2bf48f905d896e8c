"""What the names in a config stand for: optimizers, algorithms, compressors."""

from collections.abc import Callable
import dataclasses
import inspect
from typing import Any

import jax
import optax

from fedfm import (
  adapters,
  aggregators,
  algorithms,
  compression,
  errors,
  protection,
)
from fedfm import settings as settings_lib
from fedfm.clients import local
from fedfm.clients.transforms import MessageTransform
from fedfm.settings import ClientSettings, ServerSettings, Settings
from fedfm.types import Aggregator, FederatedAlgorithm, LossFn, ServerState

ALGORITHMS = (
  "fedavg",
  "fedprox",
  "fedavgm",
  "fedadagrad",
  "fedadam",
  "fedyogi",
  "fedopt",
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
  "feddpa_f",
  "feddpa_t",
  "diloco",
  "photon",
  "scaffold",
  "fednova",
  "feddyn",
  "mimelite",
  "qfedavg",
  "afl",
  "fedbuff",
  "fedper",
  "fedbn",
  "fedrep",
  "ditto",
  "per_fedavg",
  "first_order_per_fedavg",
  "reptile",
  "ifca",
  "streaming_diloco",
  "fedkseed",
  "fedmezo",
  "forward_gradients",
)
AGGREGATORS = {
  "mean": aggregators.weighted_mean,
  "median": aggregators.median,
  "trimmed_mean": aggregators.trimmed_mean,
  "krum": aggregators.krum,
  "bulyan": aggregators.bulyan,
  "geometric_median": aggregators.geometric_median,
}
# Arguments of algorithms, and the fields that they are from.
_FIELDS = {
  "client_optimizer": "client.optimizer",
  "inner_steps": "client.local_steps",
  "downlink": "communication.down",
}
COMPRESSORS = {
  "bfloat16": compression.bfloat16,
  "int8": compression.int8,
  "int4": compression.int4,
  "e3m0": compression.e3m0,
  "top_k": compression.top_k,
  "random_k": compression.random_k,
  "sign": compression.sign,
  "rotation": compression.rotation,
  "power_sgd": compression.power_sgd,
}


def schedule(name: str, peak: float, rounds: int) -> optax.Schedule:
  """A learning rate over rounds or steps: constant, or falling to 0.

  Args:
    name: "constant", "linear" or "cosine".
    peak: Rate of the first.
    rounds: How many there are.

  Returns:
    `schedule(index) -> rate`.
  """
  if name == "linear":
    return optax.schedules.linear_schedule(peak, 0.0, rounds)
  if name == "cosine":
    return optax.schedules.cosine_decay_schedule(peak, rounds)
  return optax.schedules.constant_schedule(peak)


def client_optimizer(
  settings: ClientSettings, rounds: int
) -> local.ClientOptimizer:
  """Builds the local optimizer as a function of the round.

  Args:
    settings: Name, rate, schedule over rounds, clipping.
    rounds: Rounds of the run.

  Returns:
    `optimizer(round) -> optax.GradientTransformation`.
  """
  rate = schedule(settings.schedule, settings.learning_rate, rounds)
  # pyrefly: ignore[bad-argument-type]
  return lambda round_index: local_optimizer(settings, rate(round_index))


def local_optimizer(
  settings: ClientSettings, rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
  """Builds the local optimizer.

  Args:
    settings: Name, momentum, clipping; its rate and schedule are not read.
    rate: Learning rate, or a schedule of it over steps.

  Returns:
    An optax transformation.
  """
  tx = {
    "sgd": lambda: optax.sgd(rate),
    "momentum": lambda: optax.sgd(rate, settings.momentum),
    "adam": lambda: optax.adam(rate),
    "adamw": lambda: optax.adamw(rate, weight_decay=settings.weight_decay),
  }[settings.optimizer]()
  if settings.clip_norm:
    tx = optax.chain(optax.clip_by_global_norm(settings.clip_norm), tx)
  return tx


def server_optimizer(
  algorithm: str, settings: ServerSettings, rounds: int
) -> optax.GradientTransformation:
  """Builds the server optimizer of an algorithm.

  Args:
    algorithm: One of `ALGORITHMS`; those named after a server optimizer take
      the form of their paper, the others the optax one that `settings` names.
    settings: Name, rate, schedule over rounds, momentum, tau.
    rounds: Rounds of the run.

  Returns:
    An optax transformation for the pseudo-gradient.
  """
  rate = schedule(settings.schedule, settings.learning_rate, rounds)
  tau = settings.tau
  by_name: dict[str, Callable[[], optax.GradientTransformation]] = {
    "fedavgm": lambda: optax.sgd(rate, settings.momentum),
    "fedadagrad": lambda: algorithms.server_adagrad(rate, tau=tau),
    "fedadam": lambda: algorithms.server_adam(rate, tau=tau),
    "fedyogi": lambda: algorithms.server_yogi(rate, tau=tau),
    "diloco": lambda: algorithms.outer_optimizer(rate, settings.momentum),
    "photon": lambda: optax.sgd(rate),
    "streaming_diloco": lambda: algorithms.outer_optimizer(
      rate, settings.momentum
    ),
  }
  optimizers: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(rate),
    "momentum": lambda: optax.sgd(rate, settings.momentum),
    "adam": lambda: optax.adam(rate, eps=tau),
    "adagrad": lambda: optax.adagrad(rate),
    "yogi": lambda: optax.yogi(rate),
  }
  return by_name.get(algorithm, optimizers[settings.optimizer])()


def algorithm(
  settings: Settings,
  loss: LossFn,
  adapter: adapters.Adapter,
  num_clients: int,
) -> FederatedAlgorithm:
  """Builds the algorithm that a config names.

  Args:
    settings: The run's settings.
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    adapter: What clients train, for factories that ask for an `adapter`.
    num_clients: Size of the population.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: Unknown name, options that contradict it, or an aggregator or a
      server optimizer where it has none to choose.
    PrivacyError: As `protection.mechanism`.
  """
  name = settings.algorithm
  if name not in ALGORITHMS:
    raise errors.ConfigError(
      f"algorithm: got {name!r}{errors.nearest(name, ALGORITHMS)}"
    )
  factory = getattr(algorithms, name)
  takes = inspect.signature(factory).parameters
  takes_all = any(p.kind is p.VAR_KEYWORD for p in takes.values())
  if "aggregator" not in takes and not takes_all:
    _check_default(settings, "aggregator", name)
  if "server_optimizer" not in takes and not takes_all:
    for field in dataclasses.fields(settings.server):
      _check_default(settings, f"server.{field.name}", name)
  for direction, argument in (("up", "transforms"), ("down", "downlink")):
    if argument not in takes and not takes_all:
      _check_default(settings, f"communication.{direction}", name)
  arguments: dict[str, Any] = {
    "loss": loss,
    "client_optimizer": client_optimizer(settings.client, settings.rounds),
    "server_optimizer": server_optimizer(
      name, settings.server, settings.rounds
    ),
    "aggregator": aggregator(settings),
    "weighting": settings.client.weighting,
    "seed": settings.seed,
    "num_clients": num_clients,
  }
  if mechanism := protection.mechanism(settings, num_clients):
    del arguments["aggregator"]
    arguments |= {"mechanism": mechanism, "weighting": "uniform"}
  if up := compressor(settings, "up"):
    arguments["transforms"] = (compression.uplink(up),)
  if down := compressor(settings, "down"):
    arguments["downlink"] = down
  if not takes_all:
    arguments = {k: v for k, v in arguments.items() if k in takes}
  if "adapter" in takes:
    arguments["adapter"] = adapter
  if "client_learning_rate" in takes:
    for field in ("optimizer", "schedule", "clip_norm"):
      _check_default(settings, f"client.{field}", name)
    arguments["client_learning_rate"] = settings.client.learning_rate
  if "inner_steps" in takes:
    arguments["inner_steps"] = settings.client.local_steps
  try:
    built = settings_lib.call_with_options(
      factory, arguments, settings.algorithm_options, "algorithm_options"
    )
  except errors.ConfigError as e:
    argument, _, reason = str(e).partition(": ")
    if argument == "client_optimizer":
      reason = f"got {settings.client.optimizer!r}, which {reason}"
    if argument not in _FIELDS:
      raise
    raise errors.ConfigError(f"{_FIELDS[argument]}: {reason}") from None
  if settings.server.average:
    built = algorithms.averaged(built, settings.server.average)
  return built


def check_trainable(
  settings: Settings,
  algorithm: FederatedAlgorithm,
  trainable: Any,
  base: Any,
) -> ServerState:
  """Asks an algorithm whether it can train this; runs nothing.

  Args:
    settings: The run's settings.
    algorithm: What they name.
    trainable: Shapes.
    base: Shapes of the frozen weights, or None.

  Returns:
    Shapes of its initial state.

  Raises:
    ConfigError: It cannot; names the option.
    PrivacyError: The integers of secure aggregation are too coarse for it.
  """

  def start(trainable, base):
    state = algorithm.init(trainable)
    return state, algorithm.effective_base(state, base)

  try:
    return jax.eval_shape(start, trainable, base)[0]
  except errors.ConfigError as e:
    name = str(e).partition(":")[0]
    factory = getattr(algorithms, settings.algorithm)
    is_option = (
      name in settings.algorithm_options
      or name in inspect.signature(factory).parameters
    )
    raise errors.ConfigError(
      f"algorithm_options.{e}" if is_option else str(e)
    ) from None
  except errors.PrivacyError as e:  # By how much a message is rounded.
    raise errors.PrivacyError(f"privacy.secure_aggregation.{e}") from None


def _check_default(settings: Settings, path: str, algorithm: str) -> None:
  """Refuses a field that an algorithm would not read."""
  got = settings_lib.get(settings, path)
  default = settings_lib.get(Settings(), path)
  if got != default:
    raise errors.ConfigError(
      f"{path}: got {got!r}, but algorithm {algorithm!r} expects {default!r}"
    )


def aggregator(settings: Settings) -> Aggregator:
  """Builds the aggregator that a config names.

  Args:
    settings: The run's settings.

  Returns:
    An `Aggregator`.

  Raises:
    ConfigError: Unknown name or option, an option out of range, or too few
      clients a round for it.
  """
  name = settings.aggregator
  if name not in AGGREGATORS:
    raise errors.ConfigError(
      f"aggregator: got {name!r}{errors.nearest(name, AGGREGATORS)}"
    )
  built = settings_lib.call_with_options(
    AGGREGATORS[name], {}, settings.aggregator_options, "aggregator_options"
  )
  if settings.clients_per_round < built.min_clients:
    raise errors.ConfigError(
      f"clients_per_round: got {settings.clients_per_round}, but aggregator "
      f"{name!r} expects at least {built.min_clients}"
    )
  return built


def compressor(settings: Settings, way: str) -> MessageTransform | None:
  """Builds the compressor that a config names.

  Args:
    settings: The run's settings.
    way: "up" or "down".

  Returns:
    A `MessageTransform`, or None for "none".

  Raises:
    ConfigError: Unknown name or option, or an option out of range.
  """
  name = getattr(settings.communication, way)
  options = getattr(settings.communication, f"{way}_options")
  if name == "none" and not options:
    return None
  if name not in COMPRESSORS:
    hint = errors.nearest(name, ["none", *COMPRESSORS])
    raise errors.ConfigError(f"communication.{way}: got {name!r}{hint}")
  return settings_lib.call_with_options(
    COMPRESSORS[name], {}, options, f"communication.{way}_options"
  )
