"""LoRA (Hu et al. 2021, arXiv 2106.09685), applied inside the layer.

  y = x W + s (x A) B,   A [in, rank],  B [rank, out],  s = alpha / rank

The base product x W never sees the adapter: under vmap over clients it stays
one matmul for all of them, with the base read once.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedfm import errors, sharding
from fedfm.adapters import adapter as adapter_lib
from fedfm.adapters.adapter import Adapter, Kernel
from fedfm.models import layers
from fedfm.models.model import Model

PyTree = Any
ATTENTION = ("q_proj", "v_proj")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRAKernel:
  """A kernel with its low-rank update; `layers.dense` calls `dense`."""

  kernel: Any  # shape=(..., in, out), or another kind of kernel
  a: jax.Array  # shape=(..., in, rank)
  b: jax.Array  # shape=(..., rank, out)
  scale: float = dataclasses.field(metadata={"static": True})
  dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
  key_data: jax.Array | None = None  # shape=(..., 2), dtype=uint32

  @property
  def dtype(self) -> Any:
    """Of the kernel below, which merging keeps."""
    return self.kernel.dtype

  def dense(self, x: jax.Array, bias: Any = None) -> jax.Array:
    """Applies the kernel to x [..., in]; returns [..., out]."""
    y = layers.dense(x, self.kernel, bias)
    if self.key_data is not None:
      key = jax.random.wrap_key_data(self.key_data)
      kept = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
      x = jnp.where(kept, x / (1 - self.dropout), 0)
    low = x @ self.a.astype(x.dtype)
    return y + self.scale * (low @ self.b.astype(x.dtype))

  def array(self) -> jax.Array:
    """Returns the kernel and its update as one array, like the kernel."""
    kernel = layers.array(self.kernel)
    update = self.scale * (self.a @ self.b)
    return kernel + update.reshape(kernel.shape)


def lora(
  model: Model,
  *,
  rank: int,
  alpha: float | None = None,
  targets: Sequence[str] = ATTENTION,
  use_rslora: bool = False,
  dropout: float = 0.0,
) -> Adapter:
  """Puts a low-rank update beside the named kernels.

  Args:
    model: The model; its kernels' names are matched.
    rank: Rank of the update.
    alpha: The update is scaled by alpha / rank; default 2 * rank.
    targets: Names of kernels, such as "q_proj", whole paths, such as
      "layers/q_proj", or "all-linear" for all but the output head.
    use_rslora: Scale by alpha / sqrt(rank) (arXiv 2312.03732).
    dropout: Share of the inputs of A that is zeroed in training: where `apply`
      or `bind` is given `dropout_key`, as `train_loss` does.

  Returns:
    An `Adapter` whose trainable is {path: {"a": [..., in, rank], "b": [...,
    rank, out]}}; A starts uniform in +-1/sqrt(in) (as PEFT does), B at zero.
    `config["scale"]` is the scale.

  Raises:
    ConfigError: A rank below 1 or above a kernel's smaller side, an alpha that
      is not above 0, a dropout out of [0, 1), or a target that names no kernel.
  """
  config, kernels = low_rank_config(model, rank, alpha, targets, use_rslora)
  if not 0 <= dropout < 1:
    raise errors.ConfigError(f"dropout: got {dropout}, expected 0 <= x < 1")

  def bind(params, trainable, dropout_key=None):
    changes = {}
    for index, kernel in enumerate(kernels):
      extra = {}
      if dropout_key is not None and dropout:
        key = jax.random.fold_in(dropout_key, index)
        keys = jax.random.split(key, kernel.lead)
        extra = {"dropout": dropout, "key_data": jax.random.key_data(keys)}
      changes[kernel.path] = functools.partial(
        LoRAKernel, **trainable[kernel.path], scale=config["scale"], **extra
      )
    return adapter_lib.replace(params, changes)

  return adapter_lib.make_adapter(
    model,
    init=lambda key, params: init_pairs(key, kernels, rank),
    bind=bind,
    merge=adapter_lib.merge_kernels(bind, [k.path for k in kernels]),
    kind="lora",
    config=config | {"dropout": dropout},
    axes=pair_axes(model, kernels),
  )


def low_rank_config(
  model: Model,
  rank: int,
  alpha: float | None,
  targets: Sequence[str],
  use_rslora: bool,
) -> tuple[dict[str, Any], list[Kernel]]:
  """Checks LoRA's arguments; see `lora`.

  Args:
    model: The model.
    rank: See `lora`.
    alpha: See `lora`.
    targets: See `lora`.
    use_rslora: See `lora`.

  Returns:
    The adapter's config, with "scale", and the kernels.

  Raises:
    ConfigError: As `lora`.
  """
  if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
    raise errors.ConfigError(f"rank: got {rank!r}, expected an integer")
  rank = int(rank)
  kernels = adapter_lib.target_kernels(model, targets)
  for kernel in kernels:
    smaller = min(kernel.rows, kernel.cols)
    if not 1 <= rank <= smaller:
      raise errors.ConfigError(
        f"rank: got {rank}, expected 1 to {smaller} for {kernel.path} "
        f"{(*kernel.lead, kernel.rows, kernel.cols)}"
      )
  alpha = 2 * rank if alpha is None else alpha
  is_number = isinstance(alpha, int | float | np.number)
  if isinstance(alpha, bool) or not is_number or not 0 < alpha < math.inf:
    raise errors.ConfigError(f"alpha: got {alpha!r}, expected a number above 0")
  alpha = float(alpha)
  config = {
    "rank": rank,
    "alpha": alpha,
    "targets": tuple(targets),
    "use_rslora": use_rslora,
    "scale": alpha / (math.sqrt(rank) if use_rslora else rank),
  }
  return config, kernels


def init_pairs(
  key: jax.Array, kernels: Sequence[Kernel], rank: int
) -> dict[str, dict[str, jax.Array]]:
  """Draws {path: {"a", "b"}}: A as `draw_a`, B zero.

  Args:
    key: A typed PRNG key.
    kernels: The kernels.
    rank: Rank of the update.

  Returns:
    As the trainable of `lora`.
  """
  pairs = {}
  for index, kernel in enumerate(kernels):
    shape = (*kernel.lead, kernel.rows, rank)
    pairs[kernel.path] = {
      "a": draw_a(jax.random.fold_in(key, index), shape, kernel.dtype),
      "b": jnp.zeros((*kernel.lead, rank, kernel.cols), kernel.dtype),
    }
  return pairs


def draw_a(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
  """Draws A as `init` does: uniform in +-1/sqrt(in), as in PEFT.

  Args:
    key: A typed key.
    shape: (..., in, rank).
    dtype: Of A.

  Returns:
    A, [..., in, rank].
  """
  bound = 1 / math.sqrt(shape[-2])
  return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)


def pair_axes(
  model: Model, kernels: Sequence[Kernel]
) -> dict[str, dict[str, sharding.LogicalAxes]] | None:
  """Logical axes of the pairs: split as their kernels, and over `fsdp` too.

  Args:
    model: The model.
    kernels: The kernels.

  Returns:
    {path: {"a", "b"}}, or None where a kernel is no stack of matrices, or the
    model does not name its axes.
  """
  known, pairs = adapter_lib.axes_by_path(model), {}
  for kernel in kernels:
    axes = known.get(kernel.path, ())
    if len(axes) != len(kernel.lead) + 2:
      return None
    *lead, rows, cols = (
      "factor" if sharding.DEFAULT_RULES.get(axis or "") == "tensor" else axis
      for axis in axes
    )
    pairs[kernel.path] = {
      "a": (*lead, rows, "rank"),
      "b": (*lead, "rank", cols),
    }
  return pairs
