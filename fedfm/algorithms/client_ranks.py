"""Clients of different LoRA ranks in one compiled program.

All clients hold pairs of the adapter's rank; a client of rank r has zeros in
the columns of a and the rows of b from r on. Their gradients are zero then, so
that any optimizer that leaves alone what is zero and has no gradient (plain,
with momentum, Adam, weight decay) trains exactly the smaller adapter.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import aggregators, errors, sums, trees
from fedfm.adapters import Adapter
from fedfm.algorithms import low_rank, round_metrics
from fedfm.clients import engine, local
from fedfm.types import ClientUpdate, LossFn

PyTree = Any
CLIENT_ALPHAS = ("proportional", "equal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientRanks:
  """The ranks of a population.

  Attributes:
    ranks: Rank of client i is `ranks[i % len(ranks)]`, i its row in the order
      of `ClientSource.ids`.
    highest: The adapter's rank.
    client_alpha: "proportional": alpha_i grows with the rank r_i, and all have
      the adapter's scale s. "equal": alpha_i = alpha, and s_i = alpha / r_i.
    rslora: Whether scales are by the root of the rank (arXiv 2312.03732), so
      that "equal" means s_i = alpha / sqrt(r_i).
  """

  ranks: tuple[int, ...]
  highest: int
  client_alpha: str
  rslora: bool = False

  def of(self, row: jax.Array) -> jax.Array:
    """Returns the rank of the client in a row of the population, int32."""
    return jnp.asarray(self.ranks, jnp.int32)[row % len(self.ranks)]

  def relative_scale(self, rank: jax.Array) -> jax.Array:
    """Returns s_i / s of a client of some rank; 1 for rank 0, of no client."""
    if self.client_alpha == "proportional":
      return jnp.ones(jnp.shape(rank))
    relative = self.highest / jnp.where(rank > 0, rank, self.highest)
    return jnp.sqrt(relative) if self.rslora else relative

  def cut(self, tree: PyTree, rank: jax.Array) -> PyTree:
    """Cuts every pair to a rank, by zeros; the rest stays.

    Args:
      tree: A trainable.
      rank: shape=() or (clients,).

    Returns:
      The trainable; for several ranks, with pairs [clients, ...].
    """
    inside = jnp.arange(self.highest) < rank[..., None]

    def one(pair):
      ones = (1,) * (pair["a"].ndim - 2)
      shape = (*rank.shape, *ones)
      return {
        "a": jnp.where(inside.reshape((*shape, 1, -1)), pair["a"], 0),
        "b": jnp.where(inside.reshape((*shape, -1, 1)), pair["b"], 0),
      }

    return low_rank.map_pairs(one, lambda x: x, tree)

  def num_bytes(self, tree: PyTree, ranks: Sequence[float] = ()) -> int:
    """Returns the bytes that a client's trainable takes, cut to its rank.

    Args:
      tree: A trainable, arrays or shapes.
      ranks: Ranks to take the mean over, default those of the population.

    Returns:
      The mean over clients, rounded.
    """
    ranks = ranks or self.ranks
    pairs = trees.num_bytes(low_rank.pairs_of(tree))
    mean = pairs * sum(ranks) / (len(ranks) * self.highest)
    return trees.num_bytes(tree) - pairs + round(mean)


def client_ranks(
  adapter: Adapter, ranks: Sequence[int], client_alpha: str
) -> ClientRanks:
  """Checks the ranks of a population.

  Args:
    adapter: Its rank is the highest that a client may have.
    ranks: Ranks, given to clients in turn; () for the adapter's own.
    client_alpha: "proportional" or "equal".

  Returns:
    The ranks.

  Raises:
    ConfigError: A rank out of range, or an unknown `client_alpha`.
  """
  highest = adapter.config["rank"]
  for rank in ranks:
    if isinstance(rank, bool) or not isinstance(rank, int):
      raise errors.ConfigError(f"ranks: got {rank!r}, expected integers")
    if not 1 <= rank <= highest:
      raise errors.ConfigError(
        f"ranks: got {rank}, expected 1 to adapter.rank, which is {highest}"
      )
  if client_alpha not in CLIENT_ALPHAS:
    raise errors.ConfigError(
      f"client_alpha: got {client_alpha!r}"
      f"{errors.nearest(client_alpha, CLIENT_ALPHAS)}"
    )
  return ClientRanks(
    ranks=tuple(ranks) or (highest,),
    highest=highest,
    client_alpha=client_alpha,
    rslora=adapter.config.get("use_rslora", False),
  )


def ranked_drift(
  first: PyTree, kept: aggregators.Kept, result: engine.CohortResult
) -> dict[str, jax.Array]:
  """Returns `round_metrics.drift` of clients that each start from a part.

  Args:
    first: What the clients started from; pairs are [clients, ...], the rest is
      as the server has it.
    kept: The messages of `ranked_update`.
    result: What the cohort brought back.

  Returns:
    The drift, in the space of the factors.
  """
  delta = sums.weighted(
    kept.shares,
    jax.tree.map(jnp.subtract, kept.messages["trained"], first),
  )
  norms = result.metrics["delta_norm"]
  return round_metrics.drift(result, trees.norm(delta), norms)


def ranked_update(
  loss: LossFn,
  client_optimizer: local.ClientOptimizer,
  ranks: ClientRanks,
  *,
  weighting: str,
  begin: Callable[..., PyTree] | None = None,
  rank_of: Callable[..., jax.Array] | None = None,
  penalty: Callable[[PyTree, jax.Array], jax.Array] | None = None,
) -> ClientUpdate:
  """Builds the local work of clients that each have a rank and a scale.

  Args:
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Local optimizer, or a function of the round giving one.
    ranks: The ranks of the population.
    weighting: "examples", "tokens" or "uniform".
    begin: `begin(broadcast, rank, info) -> trainable` that a client starts
      from; default what it was sent, cut to its rank.
    rank_of: `rank_of(client_state, info) -> rank`; default by its row.
    penalty: `penalty(trainable, rank)`, a scalar added to what is minimised but
      not to the loss that is reported.

  Returns:
    A `ClientUpdate` whose carry is (local state, start, rank) and whose message
    is {"trained": trainable, "rank": rank as float32}.
  """
  begin = begin or (lambda broadcast, rank, info: ranks.cut(broadcast, rank))
  rank_of = rank_of or (lambda client_state, info: ranks.of(info.row))

  def own_loss(trainable, base_and_rank, batch, key):
    base, rank = base_and_rank
    relative = ranks.relative_scale(rank)
    value, aux = loss(
      low_rank.map_pairs(
        lambda pair: low_rank.scaled(pair, relative), lambda x: x, trainable
      ),
      base,
      batch,
      key,
    )
    if penalty is not None:
      added = penalty(trainable, rank)
      value = value + added - jax.lax.stop_gradient(added)
    return value, aux

  own = local.local_update(own_loss, client_optimizer, weighting=weighting)

  def start(broadcast, client_state, info):
    rank = rank_of(client_state, info)
    first = begin(broadcast, rank, info)
    return own.start(first, (), info), first, rank

  def step(carry, base, batch, key):
    state, first, rank = carry
    return own.step(state, (base, rank), batch, key), first, rank

  def finish(broadcast, carry, info):
    del broadcast
    state, first, rank = carry
    _, weight, _, metrics = own.finish(first, state, info)
    message = {"trained": state.trainable, "rank": rank.astype(jnp.float32)}
    return message, weight, (), metrics

  return ClientUpdate(start, step, finish)
