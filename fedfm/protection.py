"""From settings to the privacy of a run, refused where it would not hold."""

import dataclasses
from typing import Any

from fedfm import errors, privacy
from fedfm import settings as settings_lib
from fedfm.settings import Settings

_SECURE = "privacy.secure_aggregation"
# Whose server sees the mean of the clients' deltas and nothing else of theirs.
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
  "diloco",
  "photon",
  "per_fedavg",
  "first_order_per_fedavg",
  "reptile",
  "fedmezo",
  "forward_gradients",
)


def mechanism(settings: Settings, num_clients: int) -> privacy.Mechanism | None:
  """Builds the mechanism that a config names.

  Args:
    settings: The run's settings.
    num_clients: Size of the population.

  Returns:
    A mechanism, in the place of an aggregator; None for none.

  Raises:
    ConfigError: An algorithm, aggregator, sampler or other field that it would
      not hold with.
    PrivacyError: A number out of range, or no dp-accounting.
  """
  p, secure = settings.privacy, settings.privacy.secure_aggregation
  if p.kind == "none" and not secure.enabled:
    return None
  what = f"privacy.kind {p.kind!r}"
  if secure.enabled:
    what = "privacy.secure_aggregation, which shows sums alone,"
  if settings.algorithm not in ALGORITHMS:
    raise errors.ConfigError(
      f"algorithm: got {settings.algorithm!r}, whose clients send more than a "
      f"delta to average, but {what} expects one of {', '.join(ALGORITHMS)}"
    )
  settings_lib.expect(settings, "aggregator", "mean", what)
  if settings.client.weighting != "auto":
    settings_lib.expect(settings, "client.weighting", "uniform", what)
  if secure.enabled:
    settings_lib.expect(settings, "communication.up", "none", what)
  central = None
  if (counted := accounting(settings, num_clients)) is not None:
    settings_lib.expect(settings, "realism.availability", 1.0, what)
    settings_lib.expect(settings, "data.schedule", "static", what)
    if settings.safety.on_bad_loss == "roll_back":
      raise errors.ConfigError(
        "safety.on_bad_loss: got 'roll_back', which decides by losses without "
        f"noise, but {what} expects 'continue' or 'stop'"
      )
    # Of the clip norm, where accountants count in sensitivities.
    noise = counted.event.noise_multiplier
    noise *= privacy.sensitivity(settings.sampler)
    try:
      central = privacy.gaussian(
        clip_norm=p.clip_norm,
        noise_multiplier=noise,
        expected_clients=settings.clients_per_round,
      )
    except errors.PrivacyError as e:
      raise errors.PrivacyError(f"privacy.{e}") from None
  if not secure.enabled:
    return central
  largest = settings.clients_per_round
  if settings.sampler == "poisson":
    largest = num_clients
  options: dict[str, Any] = {
    f.name: getattr(secure, f.name)
    for f in dataclasses.fields(secure)
    if f.name != "enabled"
  }
  try:
    return privacy.secure_aggregation(
      clip_norm=p.clip_norm,
      max_clients=largest,
      mechanism=central,
      **options,
    )
  except errors.PrivacyError as e:
    group = "privacy" if str(e).startswith("clip_norm") else _SECURE
    raise errors.PrivacyError(f"{group}.{e}") from None


def accounting(
  settings: Settings, num_clients: int
) -> privacy.Accounting | None:
  """Says how the rounds of a run are counted.

  Args:
    settings: The run's settings; where they give an epsilon, the noise is
      chosen for their rounds.
    num_clients: Size of the population.

  Returns:
    An `Accounting`; None for a run without differential privacy.

  Raises:
    PrivacyError: An accountant that does not match the sampler, a number out
      of range, or no dp-accounting.
  """
  p = settings.privacy
  if p.kind == "none":
    return None
  try:
    rate = min(1.0, settings.clients_per_round / num_clients)
    sampling = {
      "sampler": settings.sampler,
      "sampling_rate": rate,
      "accountant": p.accountant,
      "delta": p.delta,
    }
    if p.epsilon is not None:
      noise = privacy.noise_multiplier(
        epsilon=p.epsilon, rounds=settings.rounds, **sampling
      )
    else:
      noise = (p.noise_multiplier or 0.0) / privacy.sensitivity(
        settings.sampler
      )
      privacy.epsilon(noise_multiplier=noise, rounds=1, **sampling)
  except errors.PrivacyError as e:
    name = str(e).partition(":")[0]
    is_field = name in ("accountant", "epsilon", "delta", "noise_multiplier")
    raise errors.PrivacyError(f"privacy.{e}" if is_field else str(e)) from None
  event = privacy.Event(settings.sampler, rate, noise)
  return privacy.Accounting(event, p.delta, p.accountant)


def describe(settings: Settings, accounting: privacy.Accounting) -> str:
  """Says in one line what is promised.

  Args:
    settings: The run's settings.
    accounting: Of the run.

  Returns:
    Noise, epsilon and delta of all rounds, and for which neighbours.
  """
  event, p = accounting.event, settings.privacy
  noise = event.noise_multiplier * privacy.sensitivity(event.sampler)
  one = "one more or less" if event.sampler == "poisson" else "another one"
  return (
    f"privacy of clients ({one}): epsilon "
    f"{accounting.epsilon(settings.rounds):.4g} at delta {accounting.delta:g} "
    f"after {settings.rounds} rounds ({accounting.accountant}); the sum of "
    f"deltas of norm {p.clip_norm:g} gets noise of {noise:.4g} times that, "
    f"over {settings.clients_per_round} clients; losses and other metrics are "
    "not private"
  )
