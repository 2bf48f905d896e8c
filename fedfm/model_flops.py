"""Floating-point operations of local work, counted from a model's sizes.

A weight of a matrix product costs 2 a token forward, 2 in the gradient of its
input and, where it is trained, 2 in its own. Attention costs 4 x layers x heads
x head size x sequence a token forward (all pairs of tokens are multiplied), and
twice that backward. Embedding look-ups, norms and the optimizer are left out,
and so is what recomputing activations adds.
"""

from collections.abc import Callable, Iterable, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedfm import models, trees
from fedfm.models import vision
from fedfm.types import Passes

PyTree = Any
_LOOKED_UP = ("position_embed", "type_embed", "class_token")
_ADDED = ("norm", "bias")  # Of stacked layers these have two dimensions too.
_ONCE = ("pooler", "classifier", "projection")  # On one token of a row.
_PRODUCT = 2
_TRAINING_STEP = Passes()


class ModelFlops(NamedTuple):
  """Floating-point operations of some passes, a token or a row.

  Attributes:
    frozen: Of the weights that are not trained.
    trainable: Of those that are.
    attention: Of the products between tokens.
  """

  frozen: float
  trainable: float
  attention: float

  @property
  def total(self) -> float:
    """All of them."""
    return sum(self)

  @property
  def causal(self) -> float:
    """All that are needed where tokens meet those before them only."""
    return self.total - self.attention / 2


def _products(passes: Passes) -> tuple[int, int]:
  """Counts the products of a local step for each one of the model.

  Backward, a product takes one for its input's gradient and, where its other
  factor has one too, another: twice a forward. Backward through a gradient,
  each of its products (one forward, and those backward) does that again.

  Args:
    passes: What the step is made of.

  Returns:
    (of a weight that is not trained, of one that is); between tokens both
    factors have gradients, as of a weight that is trained.
  """
  back, again = passes.backwards, passes.hessian_products
  return (
    passes.forwards + back + 2 * again,
    passes.forwards + 2 * back + 6 * again,
  )


def flops_per_token(
  model: models.Model,
  kind: str,
  trainable: PyTree,
  sequence_length: int,
  passes: Passes = _TRAINING_STEP,
) -> ModelFlops:
  """Counts a local step.

  Args:
    model: The model.
    kind: Of the adapter: "head" and "last_layers" have gradients in a part of
      the model only.
    trainable: What clients train, arrays or shapes; under a path of the model's
      its own parameter.
    sequence_length: Tokens in a row.
    passes: What the step is made of, default a training step; what comes before
      the first one is not counted.

  Returns:
    A `ModelFlops`.

  Examples:
    >>> config = models.DecoderConfig(
    ...     vocab_size=10, width=4, num_layers=1, num_heads=2, mlp_width=8)
    >>> model = models.decoder(config)  # Kernels: 4 * 16 + 3 * 32; head 40.
    >>> flops_per_token(model, "full", model.shapes, 5)
    ModelFlops(frozen=0, trainable=1200, attention=240)
  """
  own = _sizes(model.shapes)
  is_decoder = isinstance(model.config, models.DecoderConfig)
  if "lm_head" in own or not is_decoder:
    own["embed"] = 0  # A look-up; tied tables are the head as well.
  own |= dict.fromkeys(_LOOKED_UP, 0)
  of_trainable = _sizes(trainable)
  trained = sum(own.get(path, size) for path, size in of_trainable.items())
  frozen = sum(size for path, size in own.items() if path not in of_trainable)
  c = model.config
  attention = 4 * c.num_layers * c.num_heads * c.head_dim * sequence_length
  of_frozen, of_trained = _products(passes)
  of_attention = of_trained
  below = 0  # Where no gradients are.
  if kind == "head":
    # A tied table's own copy has another path, and takes its place.
    frozen = below = sum(own.values()) - trained
    of_attention = passes.forwards
  elif kind == "last_layers":
    in_layers = sum(n for path, n in own.items() if path.startswith("layers/"))
    share = trained / max(in_layers, 1)
    frozen -= trained  # Their own paths are of a stack of fewer layers.
    below = in_layers - trained
    of_attention = of_trained * share + passes.forwards * (1 - share)
  return ModelFlops(
    _PRODUCT * (of_frozen * (frozen - below) + passes.forwards * below),
    _PRODUCT * of_trained * trained,
    of_attention * attention,
  )


def flops_per_row(
  model: models.Model,
  kind: str,
  trainable: PyTree,
  sequence_length: int,
  passes: Passes = _TRAINING_STEP,
) -> ModelFlops:
  """Counts a local step on one row: a text, an image, or a pair of them.

  As `flops_per_token` for each token of it; an image's are its patches. A
  convolution's kernel is used at every place of its output, and what is made of
  one token for all of a row, such as classes, once.

  Args:
    model: The model.
    kind: Of the adapter.
    trainable: What clients train, arrays or shapes.
    sequence_length: Tokens in a row of text.
    passes: As in `flops_per_token`.

  Returns:
    A `ModelFlops`.
  """
  c = model.config
  if isinstance(c, models.CNNConfig):
    places = {
      "conv1": (c.image_size - 2) ** 2,
      "conv2": (c.image_size - 4) ** 2,
    }
    uses = sum(
      size * places.get(name, 1) for name, size in _sizes(model.shapes).items()
    )
    return ModelFlops(0, _PRODUCT * _products(passes)[1] * uses, 0)
  if isinstance(c, models.CLIPConfig):
    trained = trees.by_path(trainable)
    of_image = {k: x for k, x in trained.items() if k.startswith("image/")}
    of_text = {k: x for k, x in trained.items() if k not in of_image}
    return _sum(
      _flops_of_stack(
        model._replace(shapes=model.shapes[name], config=getattr(c, name)),
        kind,
        {k.removeprefix(f"{name}/"): x for k, x in own.items()},
        length,
        passes,
      )
      for name, own, length in (
        ("text", of_text, sequence_length),
        ("image", of_image, 1 + vision.num_patches(c)),
      )
    )
  if isinstance(c, models.VisionConfig):
    sequence_length = 1 + vision.num_patches(c)  # And the class token.
  return _flops_of_stack(model, kind, trainable, sequence_length, passes)


def _flops_of_stack(
  model: models.Model,
  kind: str,
  trainable: PyTree,
  length: int,
  passes: Passes,
) -> ModelFlops:
  """Counts one stack of layers on a row of `length` tokens."""

  def of_row(path: str) -> bool:
    return not set(_ONCE).isdisjoint(path.split("/"))

  def count(keep: Callable[[str], bool], length: int) -> ModelFlops:
    shapes = {k: x for k, x in trees.by_path(trainable).items() if keep(k)}
    return flops_per_token(part(model, keep), kind, shapes, length, passes)

  a_token = count(lambda path: not of_row(path), length)
  of_rows = count(of_row, 0)
  return _sum([ModelFlops(*(length * flops for flops in a_token)), of_rows])


def _sum(parts: Iterable[ModelFlops]) -> ModelFlops:
  return functools.reduce(
    lambda a, b: ModelFlops(*(x + y for x, y in zip(a, b))), parts
  )


def part(model: models.Model, keep: Callable[[str], bool]) -> models.Model:
  """A model of which products are left out, to count the others.

  Args:
    model: The model.
    keep: Tells by a parameter's path whether it stays.

  Returns:
    The model; in place of the parameters left out are scalars.
  """
  nothing = jax.ShapeDtypeStruct((), jnp.float32)
  leaves, treedef = jax.tree.flatten(model.shapes)
  kept: Sequence[Any] = [
    x if keep(path) else nothing
    for path, x in zip(trees.paths(model.shapes), leaves)
  ]
  return model._replace(shapes=treedef.unflatten(kept))


def _sizes(params: PyTree) -> dict[str, int]:
  """Weights of each parameter by path; 0 of those that are no products."""
  return {
    path: 0 if len(x.shape) < 2 or path.endswith(_ADDED) else math.prod(x.shape)
    for path, x in trees.by_path(params).items()
  }
