"""Evaluation of a global model, or of one's own, on every client apart."""

from collections.abc import Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedfm import aggregators, report
from fedfm.clients import engine
from fedfm.types import ClientUpdate, Cohort, LossFn

PyTree = Any


def client_evaluation(loss: LossFn) -> ClientUpdate:
  """A client update that trains nothing and reports sums.

  Args:
    loss: Returns `aux` with "tokens", "loss_sum" and "correct".

  Returns:
    A `ClientUpdate` for the lane engine. Its base is `(trainable, base)`: what
    is only read is shared by the lanes, not copied to each.
  """

  def start(broadcast, client_state, info):
    del broadcast, client_state, info
    zero = jnp.zeros((), jnp.float32)
    return {"tokens": zero, "loss_sum": zero, "correct": zero}

  def step(sums, trainable_and_base, batch, key):
    trainable, base = trainable_and_base
    _, aux = loss(trainable, base, batch, key)
    return {k: v + aux[k].astype(v.dtype) for k, v in sums.items()}

  def finish(broadcast, sums, info):
    del broadcast, info
    return (), jnp.ones((), jnp.float32), (), sums

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
    {"tokens", "loss_sum", "correct"}, each [clients] in the cohort's order;
    padding has 0 tokens.
  """
  result = engine.run_cohort(
    client_evaluation(loss),
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
  loss: LossFn, stacked: PyTree, base: PyTree, cohort: Cohort
) -> dict[str, jax.Array]:
  """Evaluates every client with a trainable of its own; jit it.

  Args:
    loss: As in `client_evaluation`.
    stacked: Trainables, leaves [clients, ...] in the cohort's order.
    base: Frozen weights.
    cohort: The clients, packed.

  Returns:
    As `evaluate_cohort`.
  """
  shared = client_evaluation(loss)
  num_lanes, num_slots = cohort.row.shape

  def to_slots(x):
    slots = jnp.zeros((num_lanes * num_slots, *x.shape[1:]), x.dtype)
    slots = slots.at[cohort.order[: len(x)]].set(x)
    return slots.reshape((num_lanes, num_slots, *x.shape[1:]))

  def start(broadcast, own, info):
    return own, shared.start(broadcast, (), info)

  def step(carry, base, batch, key):
    own, sums = carry
    return own, shared.step(sums, (own, base), batch, key)

  def finish(broadcast, carry, info):
    own, sums = carry
    message, weight, _, metrics = shared.finish(broadcast, sums, info)
    return message, weight, own, metrics

  result = engine.run_cohort(
    ClientUpdate(start, step, finish),
    aggregators.none(),
    (),
    (),
    base,
    cohort,
    jax.tree.map(to_slots, stacked),
    jax.random.key(0),
    jnp.zeros((), jnp.int32),
  )
  return result.metrics


def client_metrics(
  per_client: Mapping[str, Any], bytes_are_tokens: bool
) -> dict[str, np.ndarray]:
  """Turns sums per client into metrics per client.

  Args:
    per_client: From `evaluate_cohort`.
    bytes_are_tokens: Whether bits per byte follow from the loss a token.

  Returns:
    `loss` (nats a token), `accuracy`, `perplexity` and, for bytes,
    `bits_per_byte`, each [clients]; NaN for a client without tokens.
  """
  tokens = np.asarray(per_client["tokens"], np.float64)
  tokens = np.where(tokens > 0, tokens, np.nan)
  loss = np.asarray(per_client["loss_sum"], np.float64) / tokens
  metrics = {
    "loss": loss,
    "accuracy": np.asarray(per_client["correct"], np.float64) / tokens,
    "perplexity": np.exp(np.minimum(loss, 700)),
  }
  if bytes_are_tokens:
    metrics["bits_per_byte"] = loss / math.log(2)
  return metrics


def summarise(
  per_client: Mapping[str, Any], bytes_are_tokens: bool
) -> dict[str, float]:
  """Turns sums per client into metrics over clients.

  Args:
    per_client: From `evaluate_cohort`.
    bytes_are_tokens: As in `client_metrics`.

  Returns:
    The metrics of `client_metrics`: the plain mean over clients with tokens,
    and the 10th and 90th percentile under the name with `_p10` and `_p90`.
  """
  there = np.asarray(per_client["tokens"]) > 0
  metrics = {}
  for name, value in client_metrics(per_client, bytes_are_tokens).items():
    if not there.any():
      continue
    over_clients = report.percentiles(value[there])
    metrics[name] = over_clients["mean"]
    metrics[f"{name}_p10"] = over_clients["p10"]
    metrics[f"{name}_p90"] = over_clients["p90"]
  return metrics
