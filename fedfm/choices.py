"""What names in a config stand for: algorithms, aggregators, compressors."""

import dataclasses
import inspect
from typing import Any

import jax

from fedfm import (
  adapters,
  aggregators,
  algorithms,
  compression,
  errors,
  optimizers,
  protection,
)
from fedfm import settings as settings_lib
from fedfm.algorithms import checks
from fedfm.clients.transforms import MessageTransform
from fedfm.settings import Settings, expect_default
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
  optimizers.check_read(settings)
  factory = getattr(algorithms, name)
  takes = inspect.signature(factory).parameters
  takes_all = any(p.kind is p.VAR_KEYWORD for p in takes.values())

  def reads(argument):
    if argument in takes:
      return takes[argument].annotation is not checks.Absent
    return takes_all

  if not reads("aggregator"):
    expect_default(settings, "aggregator", f"algorithm {name!r}")
  if not reads("server_optimizer"):
    for field in dataclasses.fields(settings.server):
      expect_default(settings, f"server.{field.name}", f"algorithm {name!r}")
  for direction, argument in (("up", "transforms"), ("down", "downlink")):
    if not reads(argument):
      expect_default(
        settings, f"communication.{direction}", f"algorithm {name!r}"
      )
  arguments: dict[str, Any] = {
    "loss": loss,
    "client_optimizer": optimizers.client_optimizer(
      settings.client, settings.rounds
    ),
    "server_optimizer": optimizers.server_optimizer(settings),
    "aggregator": aggregator(settings),
    "seed": settings.seed,
    "num_clients": num_clients,
  }
  if settings.client.weighting != "auto":
    if name == "afl":  # Its mixture is the weight.
      expect_default(settings, "client.weighting", "algorithm 'afl'")
    arguments["weighting"] = settings.client.weighting
  if mechanism := protection.mechanism(settings, num_clients):
    del arguments["aggregator"]
    arguments |= {"mechanism": mechanism, "weighting": "uniform"}
  if up := compressor(settings, "up"):
    arguments["transforms"] = (compression.uplink(up),)
  if down := compressor(settings, "down"):
    arguments["downlink"] = down
  arguments = {k: v for k, v in arguments.items() if reads(k)}
  if "adapter" in takes:
    arguments["adapter"] = adapter
  if "client_learning_rate" in takes:
    for field in ("optimizer", "schedule", "clip_norm"):
      expect_default(settings, f"client.{field}", f"algorithm {name!r}")
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
