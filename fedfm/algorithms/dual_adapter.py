"""A global and a local adapter at once, weighed for each text (FedDPA).

Source: arXiv 2403.19211.
"""

import jax
import jax.numpy as jnp

from fedfm.algorithms import low_rank
from fedfm.types import PyTree


def mixed(shared: PyTree, own: PyTree, weight: jax.Array | float) -> PyTree:
  """Puts both adapters into one, of twice the rank.

  Args:
    shared: The global trainable.
    own: The client's pairs.
    weight: a, of the client's own; a scalar, or [batch]: one for each row, for
      a forward pass over these rows.

  Returns:
    A trainable. Where weights are [batch], b is [..., batch, rank, out].
  """
  weight = jnp.asarray(weight)

  def of_rows(pair, factor):
    if not factor.ndim:
      return low_rank.scaled(pair, factor)
    b = pair["b"][..., None, :, :]
    return pair | {"b": b * factor[:, None, None].astype(b.dtype)}

  def one(first, second):
    return low_rank.concat(of_rows(first, 1 - weight), of_rows(second, weight))

  return low_rank.map_pairs(one, lambda x, none: x, shared, own)


def instance_weights(
  embeddings: jax.Array, samples: jax.Array, highest: float = 0.5
) -> jax.Array:
  """Weighs the local adapter by how near a text is to the client's own.

  Args:
    embeddings: [batch, width], such as the last token's last hidden state.
    samples: [samples, width], of some of the client's own texts.
    highest: lambda, the weight of a text like all the samples.

  Returns:
    a, [batch]: lambda times the mean cosine, for `mixed`.

  Examples:
    >>> own = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> instance_weights(jnp.array([[3.0, 0.0], [1.0, 1.0]]), own)
    Array([0.25      , 0.35355338], dtype=float32)
  """

  def unit(x):
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1)

  return highest * jnp.mean(unit(embeddings) @ unit(samples).T, axis=-1)
