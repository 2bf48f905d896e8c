"""Evaluation of a global model, or of one's own, on every client apart."""

from collections.abc import Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedfm import aggregators
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
    _, aux = loss(*trainable_and_base, batch, key)
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


def summarise(
    per_client: Mapping[str, Any], bytes_are_tokens: bool
) -> dict[str, float]:
  """Turns sums per client into metrics over clients.

  Args:
    per_client: From `evaluate_cohort`.
    bytes_are_tokens: Whether bits per byte follow from the loss a token.

  Returns:
    `loss` (nats a token), `accuracy`, `perplexity` and, for bytes,
    `bits_per_byte`: the plain mean over clients, and the 10th and 90th
    percentile under the name with `_p10` and `_p90`.
  """
  tokens = np.asarray(per_client["tokens"], np.float64)
  there = tokens > 0
  loss = np.asarray(per_client["loss_sum"], np.float64)[there] / tokens[there]
  correct = np.asarray(per_client["correct"], np.float64)[there]
  values = {
      "loss": loss,
      "accuracy": correct / tokens[there],
      "perplexity": np.exp(np.minimum(loss, 700)),
  }
  if bytes_are_tokens:
    values["bits_per_byte"] = loss / math.log(2)
  metrics = {}
  for name, value in values.items():
    if not len(value):
      continue
    metrics[name] = float(np.mean(value))
    metrics[f"{name}_p10"] = float(np.percentile(value, 10))
    metrics[f"{name}_p90"] = float(np.percentile(value, 90))
  return metrics
