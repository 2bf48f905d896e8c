"""Secure aggregation (Bonawitz et al. 2017), simulated: it models, not secures.

  client i   x_i = quantise(clip(d_i))                   integers
             y_i = x_i + sum_j>i m_ij - sum_j<i m_ij     mod 2^b
  server     sum_i y_i - masks that dropouts left over   = sum_i x_i   mod 2^b

m_ij is drawn of a seed that clients i and j would agree on. Here one program
draws them all, so nothing is hidden from whoever runs it: what is modelled is
the arithmetic, what a round can and cannot do with a sum, and who may drop out.
Keys, signatures and secret shares are not. Each client has a mask with each
other one, so that a round draws clients^2 / 2 times the message's size.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fedfm import errors, sums, trees
from fedfm.privacy.clip import check_count, check_norm, check_positive, clip
from fedfm.privacy.mechanism import Mechanism, Release
from fedfm.types import Aggregator

PyTree = Any
ROUNDINGS = ("stochastic", "nearest")
_MOST_LEVELS = 2**22  # Integers that float32 still rounds well.
_ROUNDING_KEY, _MASK_KEY, _DROPOUT_KEY, _NOISE_KEY = range(4)


def secure_aggregation(
  *,
  clip_norm: float,
  max_clients: int,
  bits: int = 32,
  scale: float = 2.0**16,
  rounding: str = "stochastic",
  threshold: int = 1,
  dropout: float = 0.0,
  mechanism: Mechanism | None = None,
) -> Mechanism:
  """Sums integers under masks that cancel.

  Args:
    clip_norm: Largest norm of a client's message.
    max_clients: The most that a cohort can have.
    bits: b, of an integer of the masked sum, 2 to 32.
    scale: Integers to a unit.
    rounding: "stochastic" (unbiased) or "nearest".
    threshold: A round of fewer survivors is aborted and changes nothing.
    dropout: Chance of a client to leave after the masks were agreed on. Who
      leaves before is in no cohort, or masked as not finite.
    mechanism: What is done to the decoded sum, such as `gaussian` of the same
      clip norm; default the mean over survivors. As rounding lengthens a
      message, it is then clipped by so much more first.

  Returns:
    A stacking `Mechanism`; it is the simulation that sees every message.

  Raises:
    PrivacyError: A number out of range, or a modulus that the sum would
      overflow.
  """
  levels = check(clip_norm, max_clients, bits, scale, rounding, threshold)
  if not 0 <= dropout < 1:
    raise errors.PrivacyError(f"dropout: got {dropout}, expected 0 <= x < 1")

  def bound_of(message):
    """The norm before rounding, so that sensitivity holds after it."""
    if mechanism is None:
      return clip_norm
    error = (1.0 if rounding == "stochastic" else 0.5) / scale
    size = trees.num_elements(message)
    slack = error * math.sqrt(size)
    if slack >= clip_norm / 2:
      raise errors.PrivacyError(
        f"scale: got {scale:g}, with which rounding {size} values may add "
        f"{slack:.3g} to a norm of {clip_norm:g}, expected a larger one"
      )
    return clip_norm - slack

  def init(message):
    bound_of(message)
    return () if mechanism is None else mechanism.aggregator.init(message)

  def release(collected, state, weights, key):
    wide, agreed = sums.widen(collected[0]), weights > 0
    messages = wide.tree
    keys = [jax.random.fold_in(key, purpose) for purpose in range(4)]
    bound = bound_of(jax.tree.map(lambda x: x[0], messages))

    def client(message_and_index):
      message, index = message_and_index
      message, clipped = clip(message, bound)
      own = jax.random.fold_in(keys[_ROUNDING_KEY], index)
      return quantise(message, scale, levels, rounding, own), clipped

    index = jnp.arange(agreed.shape[0], dtype=jnp.int32)
    integers, clipped = jax.lax.map(client, (messages, index))
    draw = jax.random.uniform(keys[_DROPOUT_KEY], agreed.shape)
    survived = agreed & (draw >= dropout)
    uploads = mask(integers, agreed, keys[_MASK_KEY], bits)
    total = unmask(uploads, agreed, survived, keys[_MASK_KEY], bits)
    decoded = decode(total, bits, scale)
    decoded = jax.tree.map(lambda x, m: x.astype(m.dtype), decoded, messages)
    decoded = dataclasses.replace(wide, tree=decoded)
    count = jnp.sum(survived)
    enough = count >= threshold
    metrics = {
      "privacy/survivors": count,
      "privacy/aborted": (~enough).astype(jnp.int32),
    }
    if mechanism is None:
      update = trees.scale(decoded, 1 / jnp.maximum(count, 1)).narrow()
      return Release(update, state, enough, metrics)
    total = {"sum": decoded, "clipped": jnp.sum(clipped & survived)}
    noised = mechanism.release(
      total, state, jnp.where(survived, weights, 0), keys[_NOISE_KEY]
    )
    done, metrics = enough & noised.done, metrics | noised.metrics
    return noised._replace(done=done, metrics=metrics)

  aggregator = Aggregator(
    init=init,
    add=None,
    finish=lambda state, collected: (collected, state),
    stacking=True,
    min_clients=0,
  )

  def num_bytes(message):
    return -(-trees.num_elements(message) * bits // 8)

  return Mechanism(aggregator, release, num_bytes)


def check(
  clip_norm: float,
  max_clients: int,
  bits: int,
  scale: float,
  rounding: str = "stochastic",
  threshold: int = 1,
) -> int:
  """Checks that a sum of integers cannot overflow its modulus.

  Args:
    clip_norm: As in `secure_aggregation`, and so are the others.
    max_clients: n.
    bits: b.
    scale: Integers to a unit.
    rounding: "stochastic" or "nearest".
    threshold: Fewest survivors.

  Returns:
    L = ceil(clip_norm scale), the largest integer of a client; 2 n L + 1 sums
    are possible, which is at most 2^b.

  Raises:
    PrivacyError: A number out of range, or a modulus too small; names them.

  Examples:
    >>> check(clip_norm=1.0, max_clients=10, bits=12, scale=100.0)
    100
  """
  check_norm("clip_norm", clip_norm)
  check_positive("scale", scale)
  check_count("max_clients", max_clients)
  if not 2 <= bits <= 32:
    raise errors.PrivacyError(f"bits: got {bits}, expected 2 to 32")
  if rounding not in ROUNDINGS:
    hint = errors.nearest(rounding, ROUNDINGS)
    raise errors.PrivacyError(f"rounding: got {rounding!r}{hint}")
  if not 1 <= threshold <= max_clients:
    raise errors.PrivacyError(
      f"threshold: got {threshold}, expected 1 to the {max_clients} clients "
      "that a cohort can have"
    )
  levels = math.ceil(clip_norm * scale)
  if levels > _MOST_LEVELS:
    raise errors.PrivacyError(
      f"scale: got {scale:g}, times a clip norm of {clip_norm:g}, expected at "
      f"most {_MOST_LEVELS}, the integers that float32 rounds to"
    )
  needed = (2 * max_clients * levels).bit_length()
  if needed > bits:
    raise errors.PrivacyError(
      f"bits: got {bits}, but sums of {max_clients} clients, each up to clip "
      f"norm {clip_norm:g} x scale {scale:g}, expect at least {needed}"
    )
  return levels


def quantise(
  message: PyTree, scale: float, levels: int, rounding: str, key: jax.Array
) -> PyTree:
  """Rounds a message to integers in [-levels, levels].

  Args:
    message: Floats.
    scale: Integers to a unit.
    levels: The largest.
    rounding: "stochastic" or "nearest".
    key: Typed key.

  Returns:
    int32 leaves.
  """
  leaves, treedef = jax.tree.flatten(message)
  rounded = []
  for index, x in enumerate(leaves):
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32)) * scale
    if rounding == "stochastic":
      own = jax.random.fold_in(key, index)
      x = jnp.floor(x + jax.random.uniform(own, x.shape, x.dtype))
    else:
      x = jnp.round(x)
    rounded.append(jnp.clip(x, -levels, levels).astype(jnp.int32))
  return treedef.unflatten(rounded)


def mask(
  integers: PyTree, agreed: jax.Array, key: jax.Array, bits: int
) -> PyTree:
  """Adds each client's masks.

  Args:
    integers: int32 leaves [clients, ...].
    agreed: [clients] bool, who has masks with whom.
    key: Typed key of the round.
    bits: b.

  Returns:
    uint32 leaves [clients, ...] below 2^b, what each client sends.
  """

  def client(row_and_index):
    row, index = row_and_index
    masks = _net_mask(row, index, agreed, key)
    return _modulo(trees.add(_unsigned(row), masks), bits)

  index = jnp.arange(agreed.shape[0], dtype=jnp.int32)
  return jax.lax.map(client, (integers, index))


def unmask(
  uploads: PyTree,
  agreed: jax.Array,
  survived: jax.Array,
  key: jax.Array,
  bits: int,
) -> PyTree:
  """Sums what came, and takes off the masks of those who left.

  Args:
    uploads: From `mask`.
    agreed: [clients] bool, as there.
    survived: [clients] bool, whose upload came.
    key: As there.
    bits: b.

  Returns:
    uint32 leaves [...]: the survivors' integers, summed modulo 2^b.
  """
  kept = jax.tree.map(
    lambda y: jnp.where(
      survived.reshape((-1,) + (1,) * (y.ndim - 1)), y, jnp.uint32(0)
    ),
    uploads,
  )
  total = jax.tree.map(lambda y: jnp.sum(y, axis=0, dtype=jnp.uint32), kept)
  left = agreed & ~survived

  def take_off(index, total):
    masks = _net_mask(total, index, left, key)
    without = trees.sub(total, masks)
    return trees.select(survived[index], without, total)

  total = jax.lax.cond(
    jnp.any(left),
    lambda t: jax.lax.fori_loop(0, agreed.shape[0], take_off, t),
    lambda t: t,
    total,
  )
  return _modulo(total, bits)


def decode(total: PyTree, bits: int, scale: float) -> PyTree:
  """Reads a sum modulo 2^b as a signed number.

  Args:
    total: uint32 leaves, from `unmask`.
    bits: b.
    scale: Integers to a unit.

  Returns:
    float32 leaves; each is the sum of the clipped messages to n / (2 scale)
    where rounding was to the nearest.
  """
  shift = 32 - bits

  def one(x):
    # The sign bit of b moves to that of int32, and is copied on the way back.
    signed = jax.lax.bitcast_convert_type(x << shift, jnp.int32) >> shift
    return signed.astype(jnp.float32) / scale

  return jax.tree.map(one, total)


def _unsigned(row: PyTree) -> PyTree:
  return jax.tree.map(
    lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32), row
  )


def _modulo(tree: PyTree, bits: int) -> PyTree:
  return jax.tree.map(lambda x: x & jnp.uint32(2**bits - 1), tree)


def _net_mask(
  like: PyTree, index: jax.Array, others: jax.Array, key: jax.Array
) -> PyTree:
  """Client `index`'s masks with others, signed and summed modulo 2^32."""
  leaves, treedef = jax.tree.flatten(like)

  def add_pair(other, sums):
    first = jnp.minimum(index, other)
    second = jnp.maximum(index, other)
    pair = jax.random.fold_in(jax.random.fold_in(key, first), second)
    # Zero with itself, as with those who are not there.
    sign = jnp.where(index < other, jnp.uint32(1), jnp.uint32(2**32 - 1))
    factor = jnp.where(others[other] & (index != other), sign, jnp.uint32(0))
    return [
      s
      + factor * jax.random.bits(jax.random.fold_in(pair, n), s.shape, s.dtype)
      for n, s in enumerate(sums)
    ]

  zeros = [jnp.zeros(x.shape, jnp.uint32) for x in leaves]
  masks = jax.lax.fori_loop(0, others.shape[0], add_pair, zeros)
  return treedef.unflatten(masks)
