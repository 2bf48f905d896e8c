"""Evaluation of a global model, or of one's own, on every client apart."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedfm import aggregators, errors, report, sums
from fedfm.clients import engine
from fedfm.types import ClientUpdate, Cohort, LossFn

PyTree = Any
_SUMS = ("tokens", "loss_sum", "correct")


def client_evaluation(
  loss: LossFn, names: Sequence[str] = _SUMS
) -> ClientUpdate:
  """A client update that trains nothing and reports sums.

  Args:
    loss: Returns `aux` with "tokens", "loss_sum" and "correct".
    names: What of `aux` to sum.

  Returns:
    A `ClientUpdate` for the lane engine. Its base is `(trainable, base)`: what
    is only read is shared by the lanes, not copied to each.
  """

  def start(broadcast, client_state, info):
    del broadcast, client_state, info
    zero = jnp.zeros((), jnp.float32)
    # Each with what rounding lost of it.
    return {name: (zero, zero) for name in names}

  def step(totals, trainable_and_base, batch, key):
    trainable, base = trainable_and_base
    _, aux = loss(trainable, base, batch, key)
    return {
      name: sums.add(total, lost, aux[name].astype(total.dtype))
      for name, (total, lost) in totals.items()
    }

  def finish(broadcast, totals, info):
    del broadcast, info
    metrics = {name: total for name, (total, _) in totals.items()}
    return (), jnp.ones((), jnp.float32), (), metrics

  return ClientUpdate(start, step, finish)


def evaluate_cohort(
  loss: LossFn, trainable: PyTree, base: PyTree, cohort: Cohort
) -> dict[str, jax.Array]:
  """Evaluates on every client of a packed population; jit it.

  Args:
    loss: As in `client_evaluation`.
    trainable: The weights to evaluate.
    base: Frozen weights.
    cohort: The population, packed.

  Returns:
    {"tokens", "loss_sum", "correct"}, and "bytes" where the cohort's rows say
    how many they are; each [clients] in the cohort's order; padding has 0
    tokens.
  """
  result = engine.run_cohort(
    client_evaluation(loss, _names(cohort)),
    aggregators.none(),
    (),
    (),
    (trainable, base),
    cohort,
    (),
    jax.random.key(0),
    jnp.zeros((), jnp.int32),
  )
  return result.metrics


def evaluate_own(
  loss: LossFn,
  stacked: PyTree,
  base: PyTree,
  cohort: Cohort,
  personal: Callable[[PyTree], PyTree] = lambda own: own,
) -> dict[str, jax.Array]:
  """Evaluates every client with a trainable of its own; jit it.

  Args:
    loss: As in `client_evaluation`.
    stacked: Trainables, or what `personal` makes one of, leaves [clients, ...]
      in the order of the source.
    base: Frozen weights.
    cohort: All clients of a source, packed in its order.
    personal: `personal(own) -> trainable`.

  Returns:
    As `evaluate_cohort`.
  """
  shared = client_evaluation(loss, _names(cohort))

  def start(broadcast, own, info):
    return own, shared.start(broadcast, (), info)

  def step(carry, base, batch, key):
    own, totals = carry
    return own, shared.step(totals, (personal(own), base), batch, key)

  def finish(broadcast, carry, info):
    own, totals = carry
    message, weight, _, metrics = shared.finish(broadcast, totals, info)
    return message, weight, own, metrics

  result = engine.run_cohort(
    ClientUpdate(start, step, finish),
    aggregators.none(),
    (),
    (),
    base,
    cohort,
    jax.tree.map(lambda x: x[cohort.row], stacked),
    jax.random.key(0),
    jnp.zeros((), jnp.int32),
  )
  return result.metrics


def _names(cohort: Cohort) -> tuple[str, ...]:
  """What to sum: bytes too, where the rows know theirs."""
  return (*_SUMS, "bytes") if "num_bytes" in cohort.batches else _SUMS


def client_metrics(per_client: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Turns sums per client into metrics per client.

  Args:
    per_client: From `evaluate_cohort`.

  Returns:
    `loss` (nats a token), `accuracy`, `perplexity` and, where bytes were
    counted, `bits_per_byte`, each [clients]; NaN for a client without tokens.

  Examples:
    >>> sums = {"tokens": [2.0], "loss_sum": [4.0], "correct": [1.0]}
    >>> round(client_metrics(sums | {"bytes": [8]})["bits_per_byte"].item(), 3)
    0.721
  """
  tokens = np.asarray(per_client["tokens"], np.float64)
  tokens = np.where(tokens > 0, tokens, np.nan)
  loss = np.asarray(per_client["loss_sum"], np.float64) / tokens
  metrics = {
    "loss": loss,
    "accuracy": np.asarray(per_client["correct"], np.float64) / tokens,
    "perplexity": np.exp(np.minimum(loss, 700)),
  }
  if "bytes" in per_client:
    num_bytes = np.asarray(per_client["bytes"], np.float64)
    num_bytes = np.where((tokens > 0) & (num_bytes > 0), num_bytes, np.nan)
    nats = np.asarray(per_client["loss_sum"], np.float64)
    metrics["bits_per_byte"] = nats / math.log(2) / num_bytes
  return metrics


def check_name(
  field: str,
  name: str,
  populations: Mapping[str, Any],
  counts_bytes: bool,
  *,
  personal: bool = False,
  finetuned: Iterable[str] = (),
) -> None:
  """Raises ConfigError unless a run reports a metric of this name.

  Args:
    field: The config's field, for the message.
    name: Such as `eval/unseen/loss`; "" for none.
    populations: The sources that are evaluated on, by name.
    counts_bytes: Whether rows say how many bytes they are.
    personal: Whether the algorithm makes personal models.
    finetuned: Clients that tune the model before it is evaluated on them.
  """
  names = (*_SUMS, "bytes") if counts_bytes else _SUMS
  sums = dict.fromkeys(names, np.zeros(0))
  tuned, known = set(finetuned), []
  for population, source in populations.items():
    models = ["", *(["personal_"] if personal else [])]
    if not tuned.isdisjoint(source.ids):
      models.append("finetuned_")
    known += [
      f"eval/{population}/{model}{metric}{suffix}"
      for model in models
      for metric in client_metrics(sums)
      for suffix in ("", "_p10", "_p90")
    ]
  if name and not populations:
    raise errors.ConfigError(
      f"{field}: got {name!r}, but nothing is held out to evaluate on; "
      "expected data.heldout_fraction or data.unseen_fraction above 0"
    )
  if name and name not in known:
    raise errors.ConfigError(
      f"{field}: got {name!r}{errors.nearest(name, known)}"
    )


def summarise(per_client: Mapping[str, Any]) -> dict[str, float]:
  """Turns sums per client into metrics over clients.

  Args:
    per_client: From `evaluate_cohort`.

  Returns:
    The metrics of `client_metrics`: the plain mean over clients with tokens,
    and the 10th and 90th percentile under the name with `_p10` and `_p90`.
  """
  metrics = {}
  for name, value in client_metrics(per_client).items():
    unit = "bytes" if name == "bits_per_byte" else "tokens"
    there = np.asarray(per_client[unit]) > 0
    if not there.any():
      continue
    over_clients = report.percentiles(value[there])
    metrics[name] = over_clients["mean"]
    metrics[f"{name}_p10"] = over_clients["p10"]
    metrics[f"{name}_p90"] = over_clients["p90"]
  return metrics
