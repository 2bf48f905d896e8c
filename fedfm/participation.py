"""From settings to who takes part: samplers, schedules, devices' behaviour."""

from collections.abc import Callable, Sequence
import dataclasses
import inspect
from typing import Any

from fedfm import errors
from fedfm import settings as settings_lib
from fedfm.data import continual, sampling
from fedfm.data.continual import Schedule
from fedfm.data.realism import Devices, Realism
from fedfm.data.source import ClientSource
from fedfm.settings import Settings

SAMPLERS = {
  "uniform": sampling.uniform,
  "poisson": sampling.poisson,
  "weighted": sampling.weighted,
  "round_robin": sampling.round_robin,
  "elastic": sampling.elastic,
}


def sampler(
  settings: Settings,
  ids: Sequence[str],
  size: Callable[[str], int],
  eligible: Callable[[int], Sequence[str]] | None = None,
) -> sampling.Sampler:
  """Builds the sampler that a config names.

  Args:
    settings: The run's settings; Poisson takes each client with probability
      `clients_per_round / population`.
    ids: The population.
    size: Client id -> examples, read for "weighted" only.
    eligible: Round -> the clients that are there; None for always all.

  Returns:
    A `Sampler`.

  Raises:
    ConfigError: A cohort larger than the population, or a bad option.
  """
  n = settings.clients_per_round
  if n > len(ids):
    raise errors.ConfigError(
      f"clients_per_round: got {n}, but the population has {len(ids)} clients"
    )
  factory = SAMPLERS[settings.sampler]
  takes = inspect.signature(factory).parameters

  def make(some: Sequence[str]) -> sampling.Sampler:
    arguments: dict[str, Any] = {
      "ids": some,
      "clients_per_round": min(n, len(some)),
      "rate": n / len(ids),
      "seed": settings.seed,
    }
    arguments = {k: v for k, v in arguments.items() if k in takes}
    if "weights" in takes:
      arguments["weights"] = [size(i) for i in some]
    return settings_lib.call_with_options(
      factory, arguments, settings.sampler_options, "sampler_options"
    )

  if eligible is None:
    return make(ids)
  return sampling.among(make, ids, eligible)


def realism(settings: Settings) -> Realism:
  """Builds how clients behave; names the field that is out of range."""
  groups = {
    f.name: group
    for group in ("devices", "realism")
    for f in dataclasses.fields(getattr(settings, group))
  }
  try:
    return Realism(
      seed=settings.seed,
      devices=Devices(**dataclasses.asdict(settings.devices)),
      **dataclasses.asdict(settings.realism),
    )
  except errors.ConfigError as e:
    raise errors.ConfigError(
      f"{groups[str(e).partition(':')[0]]}.{e}"
    ) from None


def schedule_of(settings: Settings, source: ClientSource) -> Schedule:
  """Builds how a population changes over rounds.

  Args:
    settings: The run's settings.
    source: The population.

  Returns:
    A `Schedule`.

  Raises:
    ConfigError: An option that is unknown or out of range.
  """
  factory = getattr(continual, settings.data.schedule)
  arguments: dict[str, Any] = {"source": source}
  if "seed" in inspect.signature(factory).parameters:
    arguments["seed"] = settings.seed
  return settings_lib.call_with_options(
    factory, arguments, settings.data.schedule_options, "data.schedule_options"
  )


def eligible(
  settings: Settings, schedule: Schedule, realism_of_run: Realism
) -> Callable[[int], Sequence[str]] | None:
  """Says which clients may be sampled in a round.

  Args:
    settings: The run's settings.
    schedule: Who is there.
    realism_of_run: Who is online.

  Returns:
    Round -> ids; None where it is all of them in every round.
  """
  if settings.data.schedule == "static" and realism_of_run.availability == 1:
    return None
  return lambda r: realism_of_run.online(schedule.present(r), r)
