"""Rotary positions (arXiv 2104.09864), and how long contexts stretch them.

A scaling turns the inverse wavelengths that a model was trained with into those
of a longer context. Its fields have the names that config.json gives them.
"""

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fedfm import errors


class Scaling(Protocol):
  """A way to stretch rotary positions."""

  def frequencies(
    self, theta: float, dim: int, length: Any, max_length: int
  ) -> tuple[Any, float]:
    """Returns radians a position, and what cosine and sine are multiplied by.

    Args:
      theta: Base of the wavelengths.
      dim: How much of a head is rotated, even.
      length: Tokens in the sequence: an int, or an array [batch].
      max_length: The longest that the model's config names.

    Returns:
      [dim / 2], or [batch, dim / 2] where `length` is an array and matters; and
      a factor.
    """
    ...


def plain_frequencies(theta: float, dim: int) -> np.ndarray:
  """Returns radians a position [dim / 2], in float64.

  Examples:
    >>> plain_frequencies(100.0, 4).tolist()
    [1.0, 0.1]
  """
  return theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
  """Positions divided by a factor (arXiv 2306.15595)."""

  factor: float

  def __post_init__(self):
    _check("factor", self.factor, at_least=1)

  def frequencies(self, theta, dim, length, max_length):
    del length, max_length
    return plain_frequencies(theta, dim) / self.factor, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dynamic:
  """NTK-aware: past the longest trained length the base grows with it."""

  factor: float

  def __post_init__(self):
    _check("factor", self.factor, at_least=1)

  def frequencies(self, theta, dim, length, max_length):
    xp: Any = np if isinstance(length, int) else jnp
    ratio = xp.maximum(length, max_length) / max_length
    stretch = self.factor * ratio - (self.factor - 1)
    base = theta * stretch ** (dim / (dim - 2))
    exponents = np.arange(0, dim, 2) / dim
    return xp.asarray(base)[..., None] ** -exponents, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
  """YaRN (arXiv 2309.00071): short wavelengths stay, long ones are divided.

  Attributes:
    factor: What long wavelengths are multiplied by.
    original_max_position_embeddings: The length trained before.
    attention_factor: Multiplies cosine and sine; None follows the paper.
    beta_fast: Dimensions that turn more often in that length stay.
    beta_slow: Dimensions that turn less often are divided in full.
    mscale: With `mscale_all_dim`, DeepSeek's form of the attention factor.
    mscale_all_dim: See `mscale`.
    truncate: Whether the range between the two is rounded to whole dimensions.
  """

  factor: float
  original_max_position_embeddings: int
  attention_factor: float | None = None
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True

  def __post_init__(self):
    _check("factor", self.factor, at_least=1)
    _check("original_max_position_embeddings", self.original, at_least=1)
    _check("attention_factor", self.attention_factor)
    _check("beta_fast", self.beta_fast)
    _check("beta_slow", self.beta_slow)
    _check("mscale", self.mscale, at_least=0)
    _check("mscale_all_dim", self.mscale_all_dim, at_least=0)

  @property
  def original(self) -> int:
    """The length trained before."""
    return self.original_max_position_embeddings

  def frequencies(self, theta, dim, length, max_length):
    del length, max_length
    if not theta > 1:
      raise errors.ConfigError(
        f"rope_theta: got {theta}, expected above 1 with 'yarn'"
      )
    low, high = (
      dim * math.log(self.original / (turns * 2 * math.pi))
      / (2 * math.log(theta))
      for turns in (self.beta_fast, self.beta_slow)
    )  # fmt: skip
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    divided = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    plain = plain_frequencies(theta, dim)
    return (
      plain * (1 - divided) + plain / self.factor * divided,
      self._attention_factor(),
    )

  def _attention_factor(self) -> float:
    def temperature(weight):
      return 0.1 * weight * math.log(self.factor) + 1.0

    if self.attention_factor is not None:
      return self.attention_factor
    if self.mscale and self.mscale_all_dim:
      return temperature(self.mscale) / temperature(self.mscale_all_dim)
    return temperature(1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
  """Llama 3.1's: wavelengths longer than the trained length are divided.

  Attributes:
    factor: What they are divided by.
    low_freq_factor: Turns in the trained length below which all are divided.
    high_freq_factor: Turns above which none are; between, interpolated.
    original_max_position_embeddings: The length trained before.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int

  def __post_init__(self):
    _check("factor", self.factor, at_least=1)
    _check("low_freq_factor", self.low_freq_factor)
    _check("high_freq_factor", self.high_freq_factor)
    original = self.original_max_position_embeddings
    _check("original_max_position_embeddings", original, at_least=1)
    if not self.low_freq_factor < self.high_freq_factor:
      raise errors.ConfigError(
        f"high_freq_factor: got {self.high_freq_factor}, expected above "
        f"low_freq_factor, {self.low_freq_factor}"
      )

  def frequencies(self, theta, dim, length, max_length):
    del length, max_length
    plain = plain_frequencies(theta, dim)
    turns = self.original_max_position_embeddings * plain / (2 * math.pi)
    kept = (turns - self.low_freq_factor) / (
      self.high_freq_factor - self.low_freq_factor
    )
    kept = np.clip(kept, 0, 1)
    return plain * kept + plain / self.factor * (1 - kept), 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope:
  """LongRoPE (arXiv 2402.13753): a factor a dimension, one set for long texts.

  Attributes:
    short_factor: [dim / 2], for sequences up to the length trained before.
    long_factor: [dim / 2], for longer ones.
    original_max_position_embeddings: The length trained before.
    factor: Of the length; None is the config's longest over the original.
    attention_factor: Multiplies cosine and sine; None follows the paper.
  """

  short_factor: tuple[float, ...]
  long_factor: tuple[float, ...]
  original_max_position_embeddings: int
  factor: float | None = None
  attention_factor: float | None = None

  def __post_init__(self):
    original = self.original_max_position_embeddings
    # The attention factor divides by its logarithm.
    _check("original_max_position_embeddings", original, at_least=2)
    for name in ("short_factor", "long_factor"):
      for value in getattr(self, name):
        _check(name, value)
    _check("factor", self.factor)
    _check("attention_factor", self.attention_factor)

  def frequencies(self, theta, dim, length, max_length):
    original = self.original_max_position_embeddings
    for name in ("short_factor", "long_factor"):
      count = len(getattr(self, name))
      if count != dim // 2:
        raise errors.ConfigError(
          f"{name}: got {count} numbers, expected {dim // 2}, half of what is "
          "rotated of a head"
        )
    xp: Any = np if isinstance(length, int) else jnp
    factors = xp.where(
      xp.asarray(length)[..., None] > original,
      np.asarray(self.long_factor, np.float64),
      np.asarray(self.short_factor, np.float64),
    )
    return plain_frequencies(theta, dim) / factors, self._attention_factor(
      max_length
    )

  def _attention_factor(self, max_length: int) -> float:
    original = self.original_max_position_embeddings
    factor = max_length / original if self.factor is None else self.factor
    if self.attention_factor is not None:
      return self.attention_factor
    if factor <= 1:
      return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))


# By their name in config.json.
SCALINGS: dict[str, Any] = {
  "linear": Linear,
  "dynamic": Dynamic,
  "yarn": Yarn,
  "llama3": Llama3,
  "longrope": LongRope,
}


def angles(
  positions: jax.Array,
  dim: int,
  theta: float,
  scaling: Scaling | None = None,
  *,
  length: Any = 0,
  max_length: int = 1,
  dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of rotary positions.

  Args:
    positions: [batch, seq] int32.
    dim: How much of a head is rotated, even.
    theta: Base of the wavelengths.
    scaling: How they are stretched, or None.
    length: For `scaling`: tokens in the sequence, an int or [batch].
    max_length: For `scaling`: the longest that the model's config names.
    dtype: Compute dtype of the model.

  Returns:
    Two arrays [batch, seq, dim / 2], in `dtype` but float32 at least.
  """
  dtype = jnp.promote_types(dtype, jnp.float32)
  if scaling is None:
    frequencies, factor = plain_frequencies(theta, dim), 1.0
  else:
    frequencies, factor = scaling.frequencies(theta, dim, length, max_length)
  frequencies = jnp.asarray(frequencies, dtype)
  if frequencies.ndim == 2:
    frequencies = frequencies[:, None]
  radians = positions[..., None].astype(dtype) * frequencies
  cos, sin = jnp.cos(radians), jnp.sin(radians)
  return (cos, sin) if factor == 1 else (factor * cos, factor * sin)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the halves of each head (the Hugging Face layout).

  Args:
    x: [batch, seq, heads, head_dim].
    cos: [batch, seq, dim / 2]; what is beyond `dim` of a head stays as it is.
    sin: Likewise.

  Returns:
    Like `x`.
  """
  half = cos.shape[-1]
  first, second, *rest = jnp.split(
    x, [half, 2 * half] if 2 * half < x.shape[-1] else [half], axis=-1
  )
  cos = cos[:, :, None].astype(x.dtype)
  sin = sin[:, :, None].astype(x.dtype)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin, *rest], axis=-1
  )


def _check(
  name: str, value: float | None, *, at_least: float | None = None
) -> None:
  """Refuses what is no finite number above 0, or below a bound; None passes."""
  is_number = isinstance(value, int | float) and math.isfinite(value)
  above = is_number and (value > 0 if at_least is None else value >= at_least)
  if value is not None and not above:
    expected = "above 0" if at_least is None else f"of at least {at_least}"
    raise errors.ConfigError(
      f"{name}: got {value}, expected a finite number {expected}"
    )
