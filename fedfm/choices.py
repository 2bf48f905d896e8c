"""What the names in a config stand for: optimizers, algorithms, samplers."""

from collections.abc import Callable
from typing import Any

import optax

from fedfm import algorithms, errors
from fedfm.clients import local
from fedfm.data import sampling
from fedfm.settings import ClientSettings, ServerSettings, Settings
from fedfm.types import FederatedAlgorithm, LossFn

ALGORITHMS = (
  "fedavg",
  "fedprox",
  "fedavgm",
  "fedadagrad",
  "fedadam",
  "fedyogi",
  "fedopt",
)


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
    algorithm: One of `ALGORITHMS`; `fedopt` reads `settings.optimizer` and
      takes optax's forms, the others those of their paper.
    settings: Rate, schedule over rounds, momentum, tau.
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
  }
  optimizers: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(rate),
    "momentum": lambda: optax.sgd(rate, settings.momentum),
    "adam": lambda: optax.adam(rate, eps=tau),
    "adagrad": lambda: optax.adagrad(rate),
    "yogi": lambda: optax.yogi(rate),
  }
  if algorithm == "fedopt":
    return optimizers[settings.optimizer]()
  return by_name.get(algorithm, optimizers["sgd"])()


def algorithm(
  settings: Settings, loss: LossFn, num_clients: int
) -> FederatedAlgorithm:
  """Builds the algorithm that a config names.

  Args:
    settings: The run's settings.
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    num_clients: Size of the population.

  Returns:
    A `FederatedAlgorithm`.

  Raises:
    ConfigError: Unknown name, or options that contradict it.
  """
  name, client = settings.algorithm, settings.client
  if name not in ALGORITHMS:
    raise errors.ConfigError(
      f"algorithm: got {name!r}{errors.nearest(name, ALGORITHMS)}"
    )
  options: dict[str, Any] = {
    "client_optimizer": client_optimizer(client, settings.rounds),
    "server_optimizer": server_optimizer(
      name, settings.server, settings.rounds
    ),
    "weighting": client.weighting,
    "seed": settings.seed,
    "num_clients": num_clients,
  }
  if name == "fedprox":
    if not client.proximal:
      raise errors.ConfigError(
        "client.proximal: got 0.0, but algorithm 'fedprox' expects above 0"
      )
    options["mu"] = client.proximal
  else:
    options["proximal"] = client.proximal
  return getattr(algorithms, name)(loss, **options)


def sampler(settings: Settings, ids: Any, sizes: Any) -> sampling.Sampler:
  """Builds the sampler that a config names.

  Args:
    settings: The run's settings; Poisson takes each client with probability
      `clients_per_round / population`.
    ids: The population.
    sizes: `sizes() -> [population]`, examples, read for "weighted" only.

  Returns:
    A `Sampler`.

  Raises:
    ConfigError: A cohort larger than the population.
  """
  n, seed = settings.clients_per_round, settings.seed
  if n > len(ids):
    raise errors.ConfigError(
      f"clients_per_round: got {n}, but the population has {len(ids)} clients"
    )
  if settings.sampler == "poisson":
    return sampling.poisson(ids, n / len(ids), seed)
  if settings.sampler == "weighted":
    return sampling.weighted(ids, sizes(), n, seed)
  if settings.sampler == "round_robin":
    return sampling.round_robin(ids, n, seed)
  return sampling.uniform(ids, n, seed)
