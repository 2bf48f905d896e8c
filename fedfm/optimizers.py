"""What configs say of optimizers: the clients' and the server's."""

from collections.abc import Callable
from typing import Any

import optax

from fedfm import algorithms
from fedfm import settings as settings_lib
from fedfm.algorithms.diloco import OUTER_RATE
from fedfm.clients import local
from fedfm.settings import ClientSettings, Settings

_Build = Callable[[optax.ScalarOrSchedule, float, float], Any]
# Algorithms with a server optimizer of their own, by rate, momentum and tau.
_BY_ALGORITHM: dict[str, _Build] = {
  "fedavgm": lambda rate, momentum, tau: optax.sgd(rate, momentum),
  "fedadagrad": lambda rate, momentum, tau: algorithms.server_adagrad(
    rate, tau=tau
  ),
  "fedadam": lambda rate, momentum, tau: algorithms.server_adam(rate, tau=tau),
  "fedyogi": lambda rate, momentum, tau: algorithms.server_yogi(rate, tau=tau),
  "diloco": lambda rate, momentum, tau: algorithms.outer_optimizer(
    rate, momentum
  ),
  "photon": lambda rate, momentum, tau: optax.sgd(rate),
  "streaming_diloco": lambda rate, momentum, tau: algorithms.outer_optimizer(
    rate, momentum
  ),
}
# Those that `server.optimizer` names, for all other algorithms.
_BY_NAME: dict[str, _Build] = {
  "sgd": lambda rate, momentum, tau: optax.sgd(rate),
  "momentum": lambda rate, momentum, tau: optax.sgd(rate, momentum),
  "adam": lambda rate, momentum, tau: optax.adam(rate, eps=tau),
  "adagrad": lambda rate, momentum, tau: optax.adagrad(rate, eps=tau),
  "yogi": lambda rate, momentum, tau: optax.yogi(rate, eps=tau),
}
_WITH_MOMENTUM = ("fedavgm", "diloco", "streaming_diloco", "momentum")
_WITH_TAU = ("fedadagrad", "fedadam", "fedyogi", "adam", "adagrad", "yogi")
# Rates where the config gives none; all others start from 1.
_OWN_RATES = {
  **dict.fromkeys(_WITH_TAU, 0.1),
  "diloco": OUTER_RATE,
  "streaming_diloco": OUTER_RATE,
  "reptile": 0.5,
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


def server_rate(settings: Settings) -> float:
  """Returns the server's learning rate: as given, or the algorithm's own.

  Args:
    settings: The run's settings.

  Examples:
    >>> server_rate(Settings()), server_rate(Settings(algorithm="fedadam"))
    (1.0, 0.1)
  """
  given = settings.server.learning_rate
  if given is not None:
    return given
  own = _OWN_RATES.get(settings.server.optimizer, 1.0)
  return _OWN_RATES.get(settings.algorithm, own)


def server_optimizer(settings: Settings) -> optax.GradientTransformation:
  """Builds the server optimizer of an algorithm.

  Args:
    settings: The run's settings. Algorithms named after a server optimizer take
      the form of their paper, the others the optax one that `server` names.

  Returns:
    An optax transformation for the pseudo-gradient.
  """
  s = settings.server
  rate = schedule(s.schedule, server_rate(settings), settings.rounds)
  build = _BY_ALGORITHM.get(settings.algorithm, _BY_NAME[s.optimizer])
  return build(rate, s.momentum, s.tau)


def check_read(settings: Settings) -> None:
  """Refuses settings of optimizers that nothing would read.

  Args:
    settings: The run's settings.

  Raises:
    ConfigError: A field that differs from its default; names what reads it.
  """
  client, name = settings.client.optimizer, settings.algorithm
  server = settings.server.optimizer
  if name in _BY_ALGORITHM:
    settings_lib.expect_default(
      settings, "server.optimizer", f"algorithm {name!r}"
    )
    server = name
  for path, reader, readers in (
    ("client.momentum", client, ("momentum",)),
    ("client.weight_decay", client, ("adamw",)),
    ("server.momentum", server, _WITH_MOMENTUM),
    ("server.tau", server, _WITH_TAU),
  ):
    if reader not in readers:
      kind = (
        "algorithm" if reader == name else f"{path.split('.')[0]}.optimizer"
      )
      settings_lib.expect_default(settings, path, f"{kind} {reader!r}")
