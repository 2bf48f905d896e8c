"""A digest of an array that is the same wherever its parts are.

Every 32-bit word of the array is mixed with its position, and the results are
summed modulo 2**32, in four lanes that make 128 bits. A sum has no order: each
process digests the shards that it holds, on the device where there is one, and
only 16 bytes a leaf travel, however large the model. For a given position the
mix is a bijection, so one changed word always changes the digest. It finds
accidents; it is no signature.
"""

from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)  # odd: xxHash's
_BLOCK = 1 << 16  # Words that stay in the cache.


def digests(leaves: dict[str, Any]) -> dict[str, str]:
  """Digests arrays by content; all processes call it together.

  Args:
    leaves: Path -> jax or numpy array, on any mesh; keys count as their data.

  Returns:
    Path -> 32 hex digits.

  Examples:
    >>> x = np.arange(6, dtype=np.float32)
    >>> a, b = digests({"a": x, "b": jnp.asarray(x)}).values()
    >>> a == b, digests({"a": x[::-1]})["a"] == a
    (True, False)
  """
  sums = [_own_sum(x) for x in leaves.values()]
  table = np.stack([np.asarray(x, np.uint32) for x in sums])
  if jax.process_count() > 1:
    # What every process holds whole is not summed over them.
    split = [not _is_whole(x) for x in leaves.values()]
    everyone = multihost_utils.process_allgather(table)
    with np.errstate(over="ignore"):
      added = everyone.sum(axis=0, dtype=np.uint32)
    table = np.where(np.array(split)[:, None], added, table)
  return {
    path: "".join(f"{word:08x}" for word in row.tolist())
    for path, row in zip(leaves, table)
  }


def _is_whole(x: jax.Array | np.ndarray) -> bool:
  return not isinstance(x, jax.Array) or x.is_fully_addressable


def _own_sum(x: jax.Array | np.ndarray) -> np.ndarray | jax.Array:
  """The sum over the parts that this process holds, each part once."""
  if not isinstance(x, jax.Array):
    return _sum_on_host(np.asarray(x), (0,) * max(1, np.ndim(x)))
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  total = np.zeros(len(_MULTIPLIERS), np.uint32)
  parts = []
  for shard in x.addressable_shards:
    if shard.replica_id == 0 and x.size:
      start = tuple(s.start or 0 for s in shard.index) or (0,)
      if shard.device.platform == "cpu":
        parts.append(_sum_on_host(np.asarray(shard.data), start))
      else:
        parts.append(_sum_on_device(shard.data, np.array(start, np.uint32)))
  for part in parts:  # All are under way before the first is waited for.
    total = total + np.asarray(part)
  return total


def _mix(h, xp):
  """A bijection of 32-bit words (MurmurHash3's finalizer)."""
  h = h ^ (h >> xp.uint32(16))
  h = h * xp.uint32(0x85EBCA6B)
  h = h ^ (h >> xp.uint32(13))
  h = h * xp.uint32(0xC2B2AE35)
  return h ^ (h >> xp.uint32(16))


def _positions(shape, start, xp):
  """Hashes the leading indices: [d0, d1, ..., 1], for words [d0, ..., dn]."""
  hashed = xp.zeros((1,) * len(shape), xp.uint32)
  for axis, size in enumerate(shape[:-1]):
    index = xp.arange(size, dtype=xp.uint32) + xp.uint32(start[axis])
    index = index.reshape((1,) * axis + (-1,) + (1,) * (len(shape) - axis - 1))
    hashed = _mix(hashed ^ (index * xp.uint32(_MULTIPLIERS[0])), xp)
  return hashed


def _words(x: np.ndarray) -> np.ndarray:
  """The bits of an array as uint32, wide elements as several words."""
  x = np.ascontiguousarray(x).reshape(x.shape or (1,))
  if x.dtype.itemsize % 4:
    return x.view(f"u{x.dtype.itemsize}").astype(np.uint32)
  words = x.dtype.itemsize // 4
  shape = (*x.shape[:-1], x.shape[-1] * words)
  return x.view(np.uint32).reshape(shape)


def _sum_on_host(x: np.ndarray, start: tuple[int, ...]) -> np.ndarray:
  """The sum over one part whose first element is at `start` of the whole."""
  total = np.zeros(len(_MULTIPLIERS), np.uint32)
  if not x.size:
    return total
  words = _words(x)
  elements = x.shape[-1] if x.ndim else 1
  lead = np.broadcast_to(
    _positions(words.shape, start, np), (*words.shape[:-1], 1)
  ).reshape(-1, 1)
  words = words.reshape(-1, words.shape[-1])
  last = np.arange(words.shape[1], dtype=np.uint32)
  last += np.uint32(start[-1] * (words.shape[1] // elements))
  rows = max(1, _BLOCK // words.shape[1])
  columns = min(words.shape[1], _BLOCK)
  for row in range(0, len(words), rows):
    for column in range(0, words.shape[1], columns):
      here = slice(row, row + rows), slice(column, column + columns)
      position = _mix(lead[here[0]] ^ last[here[1]], np)
      total += np.stack(
        [
          _mix((words[here] ^ position) * np.uint32(f), np).sum(dtype=np.uint32)
          for f in _MULTIPLIERS
        ]
      )
  return total


@jax.jit
def _sum_on_device(x: jax.Array, start: jax.Array) -> jax.Array:
  """What `_sum_on_host` gives, where the array is."""
  x = x.reshape(x.shape or (1,))
  *lead, elements = x.shape
  size = x.dtype.itemsize
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    x = jnp.stack([x.real, x.imag], axis=-1)
  if x.dtype == jnp.bool_:
    words = x.astype(jnp.uint32)
  elif size % 4:
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * size}"))
    words = words.astype(jnp.uint32)
  else:
    words = jax.lax.bitcast_convert_type(x, jnp.uint32)
  words = words.reshape(*lead, -1)
  last = jnp.arange(words.shape[-1], dtype=jnp.uint32)
  last = last + start[-1] * jnp.uint32(words.shape[-1] // elements)
  position = _mix(_positions(words.shape, start, jnp) ^ last, jnp)
  return jnp.stack(
    [
      jnp.sum(_mix((words ^ position) * jnp.uint32(f), jnp), dtype=jnp.uint32)
      for f in _MULTIPLIERS
    ]
  )
