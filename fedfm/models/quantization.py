"""Frozen kernels in 8 or 4 bits, for clients that train an adapter.

A quantised kernel is a kernel object in the parameters' place: `layers.dense`
asks it for its product, and it becomes float for that product only, once for
all lanes, as no lane's own numbers enter it. The backward pass makes it float
again rather than keep it.

Our own rather than through Qwix 0.1.8, whose `QArray` is the same idea: its
`dequantize` of NF4 ravels the kernel, which gathers all of it on every device
of a mesh; its 4-bit codes take a byte each on CPU; its blocks must divide the
kernel. What is left would be rounding to int8, which is three lines.
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedfm import errors, sharding, trees
from fedfm.models import layers
from fedfm.models.model import Model

PyTree = Any
BLOCK = 64  # Rows that share a scale in NF4.
# The 4-bit NormalFloat of QLoRA, appendix E of arXiv 2305.14314.
NF4_CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


_TINY = 1e-37  # Smaller scales divide as zero does.


class _Frozen:
  """What the quantised kernels share; a subclass has `array`."""

  dtype = jnp.dtype("float32")

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the kernel that it stands for."""
    raise NotImplementedError

  def array(self, dtype: Any = jnp.float32) -> jax.Array:
    """Returns the kernel [..., in, out] as floats."""
    raise NotImplementedError

  def dense(self, x: jax.Array, bias: Any = None) -> jax.Array:
    """Applies the kernel to x [..., in]; returns [..., out]."""
    # Without the checkpoint, the floats of all layers would be kept for the
    # backward pass: the float model that is not to be held.
    return jax.checkpoint(_product)(x, self, bias)


def _product(x: jax.Array, kernel: _Frozen, bias: Any) -> jax.Array:
  return layers.dense(x, kernel.array(x.dtype), bias)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Kernel(_Frozen):
  """A kernel in 8 bits, a scale per output channel."""

  values: jax.Array  # shape=(..., in, out), dtype=int8
  scale: jax.Array  # shape=(..., 1, out), dtype=float32

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  def array(self, dtype: Any = jnp.float32) -> jax.Array:
    """Returns the kernel [..., in, out] as floats."""
    return (self.values.astype(self.scale.dtype) * self.scale).astype(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4Kernel(_Frozen):
  """A kernel in 4-bit NormalFloat, two rows a byte, a scale per 64 rows."""

  codes: jax.Array  # shape=(..., ceil(in / 2), out), dtype=uint8
  scale: jax.Array  # shape=(..., ceil(in / 64), out), dtype=float32
  rows: int = dataclasses.field(metadata={"static": True})  # in

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.codes.shape[:-2], self.rows, self.codes.shape[-1])

  def array(self, dtype: Any = jnp.float32) -> jax.Array:
    """Returns the kernel [..., in, out] as floats."""
    codebook = jnp.asarray(NF4_CODEBOOK, self.scale.dtype)
    pair = jnp.stack([self.codes & 15, self.codes >> 4], axis=-2)
    rows = 2 * self.codes.shape[-2]
    codes = pair.reshape(*pair.shape[:-3], rows, pair.shape[-1])
    values = codebook.at[codes].get(mode="promise_in_bounds")
    scale = jnp.repeat(self.scale, BLOCK, axis=-2)[..., :rows, :]
    return (values * scale)[..., : self.rows, :].astype(dtype)


def int8(kernel: jax.Array) -> Int8Kernel:
  """Rounds a kernel to 8 bits, symmetrically, by each channel's largest.

  Args:
    kernel: [..., in, out].

  Returns:
    An `Int8Kernel`; no weight is off by more than half its channel's scale.
  """
  kernel = kernel.astype(jnp.float32)
  scale = jnp.max(jnp.abs(kernel), axis=-2, keepdims=True) / 127
  values = jnp.round(kernel / jnp.where(scale > _TINY, scale, 1))
  return Int8Kernel(values.astype(jnp.int8), scale)


def nf4(kernel: jax.Array) -> NF4Kernel:
  """Rounds a kernel to 4-bit NormalFloat (arXiv 2305.14314).

  Args:
    kernel: [..., in, out]; the last block of rows may be short.

  Returns:
    An `NF4Kernel`: each weight the nearest of 16 quantiles of a normal
    distribution, times the largest magnitude among 64 rows of its channel.
  """
  rows = kernel.shape[-2]
  kernel = _pad_rows(kernel.astype(jnp.float32), BLOCK)
  *lead, padded, cols = kernel.shape
  blocks = kernel.reshape(*lead, padded // BLOCK, BLOCK, cols)
  scale = jnp.max(jnp.abs(blocks), axis=-2, keepdims=True)
  unit = blocks / jnp.where(scale > _TINY, scale, 1)
  between = [(a + b) / 2 for a, b in zip(NF4_CODEBOOK, NF4_CODEBOOK[1:])]
  codes = sum((unit > edge).astype(jnp.uint8) for edge in between)
  codes = jnp.asarray(codes).reshape(kernel.shape)
  codes = _pad_rows(codes[..., :rows, :], 2)
  packed = codes[..., ::2, :] | (codes[..., 1::2, :] << 4)
  return NF4Kernel(packed, scale.squeeze(-2), rows)


def _pad_rows(x: jax.Array, multiple: int) -> jax.Array:
  """Adds zero rows to [..., rows, cols] up to a multiple."""
  missing = -x.shape[-2] % multiple
  return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)])


KINDS: dict[str, Callable[[jax.Array], Any]] = {"int8": int8, "nf4": nf4}


def quantized(model: Model, kind: str, mesh: Mesh | None = None) -> Model:
  """Declares the model with its kernels quantised; moves no weight.

  The output head, embeddings, norms and biases stay as they are.

  Args:
    model: A model with `kernels`.
    kind: "int8" or "nf4".
    mesh: Where the parameters will be. NF4's scales are sharded as the rows
      that they are of, except over an axis that does not divide them.

  Returns:
    The same model, with `init`, `axes` and `shapes` of the quantised
    parameters; the function `apply` takes either.

  Raises:
    ConfigError: An unknown kind, or a model without kernels to quantise.
  """
  one = quantizer(model, kind)

  def convert(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, x: one(trees.path_name(path), x), params
    )

  shapes = jax.eval_shape(convert, model.shapes)

  def axes(leaf_axes: Any, leaf: Any) -> Any:
    if not layers.is_kernel(leaf):
      return leaf_axes
    *lead, rows, cols = leaf_axes
    if isinstance(leaf, Int8Kernel):
      scale_axes: Any = (*lead, None, cols)
      return Int8Kernel(leaf_axes, scale_axes)
    blocks: Any = (*lead, _even(mesh, rows, leaf.scale.shape[-2]), cols)
    return NF4Kernel(leaf_axes, blocks, leaf.rows)

  return model._replace(
    init=lambda key: convert(model.init(key)),
    axes=jax.tree.map(axes, model.axes, shapes, is_leaf=sharding.is_axes),
    shapes=shapes,
  )


def _even(mesh: Mesh | None, axis: str | None, size: int) -> str | None:
  """Returns a logical axis, or None where its mesh axis leaves a remainder."""
  over = sharding.DEFAULT_RULES[axis] if axis is not None else None
  if mesh is None or over is None or size % mesh.shape[over] == 0:
    return axis
  return None


def quantizer(
  model: Model, kind: str
) -> Callable[[str, jax.Array], jax.Array | Int8Kernel | NF4Kernel]:
  """Returns a function that quantises one parameter, as it is read.

  Args:
    model: A model with `kernels`.
    kind: "int8" or "nf4".

  Returns:
    `convert(path, parameter)`: a kernel object, or the parameter itself where
    it is not to be quantised.

  Raises:
    ConfigError: An unknown kind, or a model without kernels to quantise.
  """
  if kind not in KINDS:
    raise errors.ConfigError(
      f"quantize: got {kind!r}, expected one of {', '.join(KINDS)}"
    )
  chosen = {
    path
    for path, dims in (model.kernels or {}).items()
    if dims == (1, 1) and path not in ("lm_head", "classifier")
  }
  if not chosen:
    raise errors.ConfigError(
      f"quantize: got {kind!r}, but the model names no kernel to quantise"
    )
  return lambda path, x: KINDS[kind](x) if path in chosen else x


def quantize(
  model: Model,
  kind: str,
  params: Iterable[jax.Array],
  mesh: Mesh | None = None,
) -> tuple[Model, PyTree]:
  """Quantises parameters one by one, as they are read.

  Args:
    model: A model with `kernels`.
    kind: "int8" or "nf4".
    params: The parameters in leaf order, such as a generator that reads them;
      each is let go before the next is asked for.
    mesh: Where the parameters are; None is the default device.

  Returns:
    The model that `quantized` gives, and its parameters.

  Raises:
    ConfigError: As `quantized`.
  """
  one = quantizer(model, kind)
  new = quantized(model, kind, mesh)
  places = {}
  if mesh is not None:
    places = trees.by_path(
      sharding.shardings(mesh, new.axes, new.shapes), layers.is_kernel
    )
  params, done = iter(params), []
  for path, shape in trees.by_path(new.shapes, layers.is_kernel).items():
    x = next(params)
    if layers.is_kernel(shape):
      convert = jax.jit(
        functools.partial(one, path), out_shardings=places.get(path)
      )
      x = jax.block_until_ready(convert(x))
    done.append(x)
    del x
  return new, jax.tree.structure(model.shapes).unflatten(done)


def dequantize(params: PyTree) -> PyTree:
  """Turns every quantised kernel into the float32 array it stands for."""
  return jax.tree.map(layers.array, params, is_leaf=layers.is_kernel)
