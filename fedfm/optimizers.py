"""What configs say of optimizers: the clients' and the server's."""

from collections.abc import Callable
from typing import NamedTuple

import optax

from fedfm import algorithms
from fedfm import settings as settings_lib
from fedfm.algorithms.diloco import OUTER_RATE
from fedfm.clients import local
from fedfm.settings import ClientSettings, Settings


class _Server(NamedTuple):
  """A server optimizer.

  Attributes:
    build: `build(rate)`, or `build(rate, value)` of the field that it reads.
    reads: That field of `server`: "momentum", "tau", or "" for none.
    rate: Its rate where the config gives none.
  """

  build: Callable[..., optax.GradientTransformation]
  reads: str = ""
  rate: float = 1.0


# Those of algorithms with one of their own.
_BY_ALGORITHM = {
  "fedavgm": _Server(optax.sgd, "momentum"),
  "fedadagrad": _Server(
    lambda rate, tau: algorithms.server_adagrad(rate, tau=tau), "tau", 0.1
  ),
  "fedadam": _Server(
    lambda rate, tau: algorithms.server_adam(rate, tau=tau), "tau", 0.1
  ),
  "fedyogi": _Server(
    lambda rate, tau: algorithms.server_yogi(rate, tau=tau), "tau", 0.1
  ),
  "diloco": _Server(algorithms.outer_optimizer, "momentum", OUTER_RATE),
  "photon": _Server(optax.sgd),
  "streaming_diloco": _Server(
    algorithms.outer_optimizer, "momentum", OUTER_RATE
  ),
}
# Those that `server.optimizer` names, for all other algorithms.
_BY_NAME = {
  "sgd": _Server(optax.sgd),
  "momentum": _Server(optax.sgd, "momentum"),
  "adam": _Server(lambda rate, tau: optax.adam(rate, eps=tau), "tau", 0.1),
  "adagrad": _Server(
    lambda rate, tau: optax.adagrad(rate, eps=tau), "tau", 0.1
  ),
  "yogi": _Server(lambda rate, tau: optax.yogi(rate, eps=tau), "tau", 0.1),
}
_REPTILE_RATE = 0.5  # Its epsilon, with whatever optimizer.


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
  if settings.algorithm == "reptile":
    return _REPTILE_RATE
  return _server(settings).rate


def _server(settings: Settings) -> _Server:
  by_name = _BY_NAME[settings.server.optimizer]
  return _BY_ALGORITHM.get(settings.algorithm, by_name)


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
  server = _server(settings)
  values = [getattr(s, server.reads)] if server.reads else []
  return server.build(rate, *values)


def check_read(settings: Settings) -> None:
  """Refuses settings of optimizers that nothing would read.

  Args:
    settings: The run's settings.

  Raises:
    ConfigError: A field that differs from its default; names what reads it.
  """
  name, reads = settings.algorithm, _server(settings).reads
  server = f"server.optimizer {settings.server.optimizer!r}"
  if name in _BY_ALGORITHM:
    server = f"algorithm {name!r}"
    settings_lib.expect_default(settings, "server.optimizer", server)
  client = settings.client.optimizer
  for path, is_read, reader in (
    ("client.momentum", client == "momentum", f"client.optimizer {client!r}"),
    ("client.weight_decay", client == "adamw", f"client.optimizer {client!r}"),
    ("server.momentum", reads == "momentum", server),
    ("server.tau", reads == "tau", server),
  ):
    if not is_read:
      settings_lib.expect_default(settings, path, reader)
