"""What the rounds of LoRA methods report.

The aggregation error says how far the server's kernels are from the mean of the
clients':

  D* = sum_i p_i s_i A_i B_i,    error = |D* - D| / |D*|

p_i are the clients' shares of the weight, D what the server makes of them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import aggregators, trees
from fedfm.algorithms import algorithm, low_rank
from fedfm.types import Aggregator, ServerState

PyTree = Any
ERROR = "lora/aggregation_error"


def aggregation_error(
  trained: PyTree, weights: jax.Array, got: Mapping[str, Any]
) -> jax.Array:
  """Measures an aggregate.

  Args:
    trained: The clients' trainables, leaves [clients, ...].
    weights: [clients], p_i times what multiplies the product of client i.
    got: Path -> what the server made of them: a pair, or an array [..., in,
      out].

  Returns:
    The error over all kernels together; 0 where D* is 0.
  """
  missed, total = jnp.zeros(()), jnp.zeros(())
  for path, pair in low_rank.pairs_of(trained).items():
    ideal = low_rank.weighted_sum(pair, weights)
    total = total + low_rank.squared_norm(ideal)
    missed = missed + low_rank.squared_distance(ideal, got[path])
  positive = total > 0
  error = jnp.sqrt(missed / jnp.where(positive, total, 1))
  return jnp.where(positive, error, 0)


def product_norms(
  trained: PyTree, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Norms of the clients' products, and of their sum.

  Args:
    trained: The clients' trainables, leaves [clients, ...].
    weights: [clients], as in `aggregation_error`.

  Returns:
    |A_i B_i| over all kernels, [clients], and |sum_i w_i A_i B_i|.
  """
  each, total = 0.0, 0.0
  for pair in low_rank.pairs_of(trained).values():
    squares = low_rank.squared_norms(pair)
    each = each + squares.reshape((len(squares), -1)).sum(axis=1)
    total = total + low_rank.squared_norm(low_rank.weighted_sum(pair, weights))
  return jnp.sqrt(each), jnp.sqrt(total)


def reported(
  aggregator: Aggregator | None,
  server: algorithm.Server,
  expand: Callable[[ServerState, PyTree], PyTree],
) -> tuple[Aggregator, algorithm.Server]:
  """Reports the error of a server whose clients send deltas.

  Clients are taken to have moved by their deltas from the server's weights,
  also where a compressed way down told them others.

  Args:
    aggregator: Default the weighted mean.
    server: What it does with the aggregate.
    expand: `expand(state, delta) -> delta` of the whole trainable, of a delta
      or of the clients' [clients, ...].

  Returns:
    An aggregator that keeps all messages, and the server for it.
  """

  def combine(state, kept, result, cohort):
    return server.combine(state, kept.update, result, cohort)

  def metrics(state, new_state, kept, result, cohort):
    trained = trees.add(state.trainable, expand(state, kept.messages))
    mean = trees.add(state.trainable, expand(state, kept.update))
    error = aggregation_error(trained, kept.shares, low_rank.pairs_of(mean))
    rest = server.metrics(state, new_state, kept.update, result, cohort)
    return {ERROR: error, **rest}

  reporting = server._replace(combine=combine, metrics=metrics)
  return aggregators.keep(aggregator), reporting


def update_norm(
  scale: float,
  state: ServerState,
  new_state: ServerState,
  added: Mapping[str, Any] | None = None,
) -> jax.Array:
  """Norm of what a round changed, where factors may stand for the same product.

  Args:
    scale: s of the adapter.
    state: Before the round.
    new_state: After it.
    added: What came to the base's kernels, path -> pair or array.

  Returns:
    The norm of the change of the kernels and of what is in no pair.
  """
  rest = trees.squared_norm(
    low_rank.map_pairs(
      lambda pair, new: None,
      lambda x, new: new - x,
      state.trainable,
      new_state.trainable,
    )
  )
  after = low_rank.pairs_of(new_state.trainable)
  for path, before in low_rank.pairs_of(state.trainable).items():
    change = low_rank.concat(
      low_rank.scaled(after[path], scale), low_rank.scaled(before, -scale)
    )
    if added is None:
      rest = rest + low_rank.squared_norm(change)
    else:
      change = low_rank.scaled(change, -1)
      rest = rest + low_rank.squared_distance(change, added[path])
  return jnp.sqrt(rest)
