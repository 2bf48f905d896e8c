"""LoRA pairs in a trainable, and the low-rank products that they stand for.

A pair is a subtree {"a": [..., in, rank], "b": [..., rank, out]}; it adds
s (a b) to its kernel, s = alpha / rank. Of a whole cohort its leaves are
[clients, ..., in, rank]. Products are handled by their factors: where
a = Q_a R_a and b^T = Q_b R_b, the product is Q_a (R_a R_b^T) Q_b^T, whose
middle has no more than rank rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedfm import errors
from fedfm.adapters import Adapter

PyTree = Any
Pair = dict[str, Any]
SPLITS = ("b", "sqrt")


def scale_of(adapter: Adapter, algorithm: str) -> float:
  """Returns s of an adapter: alpha / rank, or alpha / sqrt(rank) of rsLoRA.

  Args:
    adapter: What clients train.
    algorithm: The algorithm's name, for the message.

  Returns:
    The scale.

  Raises:
    ConfigError: Another adapter than LoRA.
  """
  if adapter.kind != "lora":
    raise errors.ConfigError(
      f"adapter.kind: got {adapter.kind!r}, but algorithm {algorithm!r} needs "
      "'lora'"
    )
  return adapter.config["scale"]


def is_pair(x: Any) -> bool:
  """Whether a subtree is a LoRA pair.

  Examples:
    >>> is_pair({"a": jnp.zeros((5, 2)), "b": jnp.zeros((2, 3))})
    True
    >>> is_pair({"a": jnp.zeros(5), "b": jnp.zeros(2)})
    False
  """
  if not isinstance(x, dict) or set(x) != {"a", "b"}:
    return False
  a, b = (tuple(getattr(x[name], "shape", ())) for name in ("a", "b"))
  return len(a) >= 2 and len(b) >= 2 and a[-1] == b[-2]


def map_pairs(
  on_pair: Callable, on_rest: Callable, tree: PyTree, *others: PyTree
) -> PyTree:
  """Maps over pairs as a whole, and over every other leaf.

  Args:
    on_pair: `on_pair(pair, *of others)`.
    on_rest: `on_rest(leaf, *of others)`, for a head and the like.
    tree: A trainable.
    *others: Trees like it, down to its pairs and leaves.

  Returns:
    The tree of what they return.
  """

  def one(x, *rest):
    return on_pair(x, *rest) if is_pair(x) else on_rest(x, *rest)

  return jax.tree.map(one, tree, *others, is_leaf=is_pair)


def pairs_of(tree: PyTree) -> dict[str, Pair]:
  """Finds the pairs of a trainable.

  Args:
    tree: A trainable, arrays or shapes.

  Returns:
    Path -> pair, in the tree's order.

  Raises:
    ConfigError: There is none.

  Examples:
    >>> pair = {"a": jnp.zeros((5, 2)), "b": jnp.zeros((2, 3))}
    >>> list(pairs_of({"layers/q_proj": pair, "head": jnp.zeros(3)}))
    ['layers/q_proj']
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_pair)
  pairs = {
    jax.tree_util.keystr(path, simple=True, separator="/"): x
    for path, x in flat
    if is_pair(x)
  }
  if not pairs:
    raise errors.ConfigError(
      "trainable: got no LoRA pair, expected a subtree {'a': [..., in, rank], "
      "'b': [..., rank, out]}"
    )
  return pairs


def select(tree: PyTree, factor: str, rest: bool = True) -> PyTree:
  """Drops the other factor of every pair.

  Args:
    tree: A trainable.
    factor: "a" or "b": the one that stays.
    rest: Whether what is in no pair stays.

  Returns:
    The tree, without leaves for what is dropped.
  """
  return map_pairs(
    lambda pair: {factor: pair[factor]}, lambda x: x if rest else None, tree
  )


def join(tree: PyTree, part: PyTree) -> PyTree:
  """Puts what `select` kept back into its place.

  Args:
    tree: A trainable.
    part: From `select`, of a trainable like it.

  Returns:
    `tree`, changed where `part` has a leaf.
  """
  return map_pairs(
    lambda pair, some: {**pair, **some},
    lambda x, new: x if new is None else new,
    tree,
    part,
  )


def merge(part: PyTree, other: PyTree) -> PyTree:
  """Puts two parts of a trainable together.

  Args:
    part: From `select`, one factor alone.
    other: From `select`, the other factor and the rest.

  Returns:
    A trainable.

  Examples:
    >>> pair = {"a": jnp.zeros((5, 2)), "b": jnp.zeros((2, 3))}
    >>> tree = {"q_proj": pair, "head": jnp.zeros(3)}
    >>> parts = select(tree, "a", rest=False), select(tree, "b")
    >>> jax.tree.structure(merge(*parts)) == jax.tree.structure(tree)
    True
  """

  def is_part(x):
    return x is None or (isinstance(x, dict) and set(x) in ({"a"}, {"b"}))

  return jax.tree.map(
    lambda x, y: y if x is None else {**x, **y}, part, other, is_leaf=is_part
  )


def only(
  optimizer: optax.GradientTransformation, factor: str, rest: bool = True
) -> optax.GradientTransformation:
  """Shows an optimizer one factor of every pair; zeros pass by it unchanged.

  Args:
    optimizer: Any optax transformation.
    factor: "a" or "b".
    rest: Whether it is shown what is in no pair.

  Returns:
    An optax transformation for the whole trainable.
  """

  def mask(tree):
    return map_pairs(
      lambda pair: {name: name == factor for name in pair},
      lambda x: rest,
      tree,
    )

  return optax.masked(optimizer, mask)


def product(pair: Pair) -> jax.Array:
  """Returns a b, [..., in, out]."""
  return pair["a"] @ pair["b"]


def scaled(pair: Pair, factor: Any) -> Pair:
  """Multiplies a product by a number: one factor only, here b.

  Args:
    pair: A pair.
    factor: A scalar, or [clients] for as many products, of one a.

  Returns:
    A pair.
  """
  b = pair["b"]
  factor = jnp.asarray(factor, b.dtype)
  return pair | {"b": factor.reshape(factor.shape + (1,) * b.ndim) * b}


def concat(*pairs: Pair) -> Pair:
  """Returns the sum of products, as the product of stacked factors.

  Args:
    *pairs: Of the same kernel, of any ranks.

  Returns:
    A pair whose rank is the sum of theirs.
  """
  return {
    "a": jnp.concatenate([p["a"] for p in pairs], axis=-1),
    "b": jnp.concatenate([p["b"] for p in pairs], axis=-2),
  }


def plus(pair: Pair, other: Any) -> Any:
  """Returns a b plus another pair, as a pair, or an array, as an array."""
  if isinstance(other, dict):
    return concat(pair, other)
  return product(pair) + other


def weighted_sum(stacked: Pair, weights: jax.Array) -> Pair:
  """Returns sum_i w_i a_i b_i, as the product of stacked factors.

  Args:
    stacked: Leaves [clients, ..., in, rank] and [clients, ..., rank, out]; a
      may be one for all, [..., in, rank].
    weights: [clients]; they multiply b alone.

  Returns:
    A pair of rank clients * rank.
  """
  a, b = stacked["a"], stacked["b"]
  if a.ndim < b.ndim:
    a = jnp.broadcast_to(a, (b.shape[0], *a.shape))
  b = b * weights.reshape((-1,) + (1,) * (b.ndim - 1)).astype(b.dtype)
  a, b = jnp.moveaxis(a, 0, -2), jnp.moveaxis(b, 0, -3)
  return {
    "a": a.reshape((*a.shape[:-2], -1)),
    "b": b.reshape((*b.shape[:-3], -1, b.shape[-1])),
  }


def squared_norms(pair: Pair) -> jax.Array:
  """Returns the sum of squares of a b, kernel by kernel.

  By QR, not by a^T a and b b^T: these would lose half of the digits where
  stacked factors cancel, as they do in the error of an exact method.

  Args:
    pair: A pair.

  Returns:
    [...], the leading axes of the pair.
  """
  r_a = jnp.linalg.qr(pair["a"], mode="r")
  r_b = jnp.linalg.qr(jnp.swapaxes(pair["b"], -1, -2), mode="r")
  core = r_a @ jnp.swapaxes(r_b, -1, -2)
  return jnp.sum(jnp.square(core), axis=(-2, -1))


def squared_norm(pair: Pair) -> jax.Array:
  """Returns the sum of squares of a b, over all kernels of the stack."""
  return jnp.sum(squared_norms(pair))


def squared_distance(pair: Pair, other: Any) -> jax.Array:
  """Returns the sum of squares of a b less another matrix.

  Args:
    pair: A pair.
    other: A pair of any rank, or an array [..., in, out].

  Returns:
    A scalar.
  """
  if isinstance(other, dict):
    return squared_norm(concat(pair, scaled(other, -1)))
  return jnp.sum(jnp.square(plus(pair, -other)))


def truncate(pair: Pair, rank: int, split: str = "b") -> Pair:
  """Finds the nearest product of a lower rank (Eckart and Young).

  Args:
    pair: A pair of any rank.
    rank: Rank of the result, at most the kernel's smaller side.
    split: Where the singular values go: "b" leaves a with orthonormal columns,
      "sqrt" gives both factors their square roots.

  Returns:
    A pair. A column of a has its largest entry positive, as an SVD leaves the
    signs open; columns beyond the product's own rank are zero in b (and, with
    "sqrt", in a, where they could never train again).

  Examples:
    >>> key = jax.random.key(0)
    >>> pair = {"a": jax.random.normal(key, (5, 3)), "b": jnp.ones((3, 4))}
    >>> one = truncate(pair, 1)  # The rows of b are equal: rank 1.
    >>> bool(jnp.allclose(product(one), product(pair), atol=1e-5))
    True
  """
  q_a, r_a = jnp.linalg.qr(pair["a"])
  q_b, r_b = jnp.linalg.qr(jnp.swapaxes(pair["b"], -1, -2))
  core = r_a @ jnp.swapaxes(r_b, -1, -2)
  u, sigma, v = jnp.linalg.svd(core, full_matrices=False)
  kept = min(rank, sigma.shape[-1])
  sigma = sigma[..., :kept]
  a = q_a @ u[..., :kept]
  b = v[..., :kept, :] @ jnp.swapaxes(q_b, -1, -2)
  largest = jnp.argmax(jnp.abs(a), axis=-2, keepdims=True)
  sign = jnp.where(jnp.take_along_axis(a, largest, axis=-2) < 0, -1, 1)
  a, b = a * sign, b * jnp.swapaxes(sign, -1, -2)
  if split == "sqrt":
    a, b = a * jnp.sqrt(sigma)[..., None, :], b * jnp.sqrt(sigma)[..., None]
  else:
    b = b * sigma[..., None]
  lead = [(0, 0)] * (a.ndim - 2)
  return {
    "a": jnp.pad(a, [*lead, (0, 0), (0, rank - kept)]),
    "b": jnp.pad(b, [*lead, (0, rank - kept), (0, 0)]),
  }
