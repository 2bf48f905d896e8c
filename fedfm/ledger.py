"""The ledger of a run: bytes, floating-point operations, simulated time."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from fedfm import models, trees
from fedfm.clients.transforms import MessageTransform
from fedfm.data.realism import Costs, Realism
from fedfm.planning import Work

PyTree = Any
_LOOKED_UP = ("position_embed", "type_embed", "class_token")
_FORWARD, _TO_INPUTS, _TO_WEIGHTS = 2, 2, 2  # FLOPs a weight and token.


class ModelFlops(NamedTuple):
  """Floating-point operations a token of a training step.

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


def flops_per_token(
  model: models.Model, kind: str, trainable: PyTree, sequence_length: int
) -> ModelFlops:
  """Counts a training step analytically, from the parameters' shapes.

  A weight of a matrix product costs 2 FLOPs a token forward, 2 in the gradient
  of its input and, where it is trained, 2 in its own. Attention costs 4 x
  layers x heads x head size x sequence forward (all pairs of tokens are
  multiplied), and twice that backward. Embedding look-ups, norms and the
  optimizer are left out, and so is what recomputing activations adds.

  Args:
    model: The model.
    kind: Of the adapter: "full", "head", or one beside all layers.
    trainable: What clients train, arrays or shapes.
    sequence_length: Tokens in a row.

  Returns:
    A `ModelFlops`.

  Examples:
    >>> config = models.DecoderConfig(
    ...     vocab_size=10, width=4, num_layers=1, num_heads=2, mlp_width=8)
    >>> model = models.decoder(config)  # Kernels: 4 * 16 + 3 * 32; head 40.
    >>> flops_per_token(model, "full", model.shapes, 5)
    ModelFlops(frozen=0, trainable=1200, attention=240)
  """
  names = trees.paths(model.shapes)
  sizes = [
    math.prod(x.shape) if len(x.shape) >= 2 and not name.endswith("norm") else 0
    for name, x in zip(names, jax.tree.leaves(model.shapes))
  ]
  by_name = dict(zip(names, sizes))
  is_decoder = isinstance(model.config, models.DecoderConfig)
  if "lm_head" in by_name or not is_decoder:
    by_name["embed"] = 0  # A look-up; tied tables are the head as well.
  if not is_decoder:
    by_name |= dict.fromkeys(_LOOKED_UP, 0)
  whole = sum(by_name.values())
  c = model.config
  attention = 4 * c.num_layers * c.num_heads * c.head_dim * sequence_length
  trained = sum(
    math.prod(x.shape) for x in jax.tree.leaves(trainable) if len(x.shape) >= 2
  )
  train = _FORWARD + _TO_INPUTS + _TO_WEIGHTS
  if kind == "full":
    return ModelFlops(0, train * whole, 3 * attention)
  if kind == "head":
    # Gradients stop below the head.
    return ModelFlops(_FORWARD * (whole - trained), train * trained, attention)
  frozen = (_FORWARD + _TO_INPUTS) * whole
  return ModelFlops(frozen, train * trained, 3 * attention)


def flops_per_row(
  model: models.Model, kind: str, trainable: PyTree, sequence_length: int
) -> float:
  """Counts a training step of one row: a text, or an image.

  As `flops_per_token` for each token of it. An image's are its patches, and a
  pair of an image and a text has those of both; a
  convolution's kernel is used at every place of its output. The head of a
  classifier is counted as if on every token, which is little.

  Args:
    model: The model.
    kind: Of the adapter.
    trainable: What clients train, arrays or shapes.
    sequence_length: Tokens in a row of text.

  Returns:
    Floating-point operations.
  """
  c = model.config
  if isinstance(c, models.CNNConfig):
    places = {
      "conv1": (c.image_size - 2) ** 2,
      "conv2": (c.image_size - 4) ** 2,
    }
    uses = sum(
      math.prod(x.shape) * places.get(name, 1)
      for name, x in model.shapes.items()
      if len(x.shape) >= 2
    )
    return (_FORWARD + _TO_INPUTS + _TO_WEIGHTS) * uses
  length = sequence_length
  if isinstance(c, models.CLIPConfig):
    return _flops_per_pair(model, kind, trainable, sequence_length)
  if isinstance(c, models.VisionConfig):
    length = 1 + (c.image_size // c.patch_size) ** 2
  return flops_per_token(model, kind, trainable, length).total * length


def _flops_per_pair(
  model: models.Model, kind: str, trainable: PyTree, sequence_length: int
) -> float:
  """Counts a training step of an image and a text: each in its own tower."""
  c, total = model.config, 0.0
  trained = trees.by_path(trainable)
  of_image = {k: x for k, x in trained.items() if k.startswith("image/")}
  of_text = {k: x for k, x in trained.items() if k not in of_image}
  image_length = 1 + (c.image_size // c.patch_size) ** 2
  for name, own, length in (
    ("text", of_text, sequence_length),
    ("image", of_image, image_length),
  ):
    tower = model._replace(shapes=model.shapes[name], config=getattr(c, name))
    total += flops_per_token(tower, kind, own, length).total * length
  return total


@dataclasses.dataclass(frozen=True)
class Ledger:
  """Says what rounds cost.

  Attributes:
    flops_per_step: Of a full local step of one client.
    realism: The devices, and how long a round waits.
  """

  flops_per_step: float
  realism: Realism

  def line(self, work: Work, up: int, down: int) -> dict[str, float]:
    """Returns the metrics of one round.

    Args:
      work: Who worked, and how much.
      up: Bytes that a client sends, after compression.
      down: Bytes that it receives.

    Returns:
      `comm/bytes_up` of those that reported, `comm/bytes_down` of those that
      were given work, `compute/flops` of those that reported,
      `clients/contacted`, and `simulated/seconds`, how long the server waited.
    """
    costs = Costs(self.flops_per_step, up, down)
    return {
      "comm/bytes_up": len(work.ids) * up,
      "comm/bytes_down": work.contacted * down,
      "compute/flops": float(sum(work.local_steps)) * self.flops_per_step,
      "clients/contacted": work.contacted,
      "simulated/seconds": self._seconds(work, costs),
    }

  def _seconds(self, work: Work, costs: Costs) -> float:
    realism = self.realism
    if realism.deadline and len(work.ids) < work.contacted:
      return realism.deadline
    if not work.ids:
      return 0.0
    communication, a_step = realism.devices.seconds(
      realism.seed, work.ids, costs
    )
    return float((communication + a_step * work.local_steps).max())


def planned_costs(
  flops_per_step: float,
  trainable: PyTree,
  up: MessageTransform | None,
  down: MessageTransform | None,
) -> Costs:
  """What a client's round costs as far as it is known before the run.

  Deadlines are drawn before a round, on the host, when an algorithm's messages
  may still depend on rounds that run: they count the trainable, compressed
  where messages are, in both directions.

  Args:
    flops_per_step: Of a local step.
    trainable: Arrays or shapes.
    up: Compressor of the way up, or None.
    down: Likewise down.

  Returns:
    The `Costs`.
  """
  sizes = [
    way.num_bytes(trainable)
    if way is not None and way.num_bytes is not None
    else trees.num_bytes(trainable)
    for way in (up, down)
  ]
  return Costs(flops_per_step, *sizes)
