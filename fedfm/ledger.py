"""The ledger of a run: bytes, floating-point operations, simulated time."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from fedfm import models, trees
from fedfm.clients.transforms import MessageTransform
from fedfm.data.realism import Costs, Realism
from fedfm.planning import Work
from fedfm.settings import Settings
from fedfm.types import Passes

PyTree = Any
_LOOKED_UP = ("position_embed", "type_embed", "class_token")
# FLOPs a weight and token, of a product; passes take one product forward, and
# back one to the input's gradient and one to the weight's.
_PRODUCT = 2
_TRAINING_STEP = Passes()


class ModelFlops(NamedTuple):
  """Floating-point operations a token, of some passes.

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
  """Counts a local step analytically, from the parameters' shapes.

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
  of_frozen, of_trained = _products(passes)
  train = _PRODUCT * of_trained
  if kind == "full":
    return ModelFlops(0, train * whole, of_trained * attention)
  if kind == "head":
    # Gradients stop below the head.
    forward = _PRODUCT * passes.forwards * (whole - trained)
    return ModelFlops(forward, train * trained, passes.forwards * attention)
  frozen = _PRODUCT * of_frozen * whole
  return ModelFlops(frozen, train * trained, of_trained * attention)


def flops_per_row(
  model: models.Model,
  kind: str,
  trainable: PyTree,
  sequence_length: int,
  passes: Passes = _TRAINING_STEP,
) -> float:
  """Counts a local step on one row: a text, or an image.

  As `flops_per_token` for each token of it. An image's are its patches, and a
  pair of an image and a text has those of both; a
  convolution's kernel is used at every place of its output. The head of a
  classifier is counted as if on every token, which is little.

  Args:
    model: The model.
    kind: Of the adapter.
    trainable: What clients train, arrays or shapes.
    sequence_length: Tokens in a row of text.
    passes: As in `flops_per_token`.

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
    return _PRODUCT * _products(passes)[1] * uses
  length = sequence_length
  if isinstance(c, models.CLIPConfig):
    return _flops_per_pair(model, kind, trainable, sequence_length, passes)
  if isinstance(c, models.VisionConfig):
    length = 1 + (c.image_size // c.patch_size) ** 2
  return flops_per_token(model, kind, trainable, length, passes).total * length


def _flops_per_pair(
  model: models.Model,
  kind: str,
  trainable: PyTree,
  sequence_length: int,
  passes: Passes,
) -> float:
  """Counts a local step on an image and a text: each in its own tower."""
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
    total += flops_per_token(tower, kind, own, length, passes).total * length
  return total


@dataclasses.dataclass(frozen=True)
class Ledger:
  """Says what rounds cost.

  Attributes:
    flops_per_step: Of a full local step of one client.
    realism: The devices, and how long a round waits.
    flops_at_start: Of what a client does before its first step.
  """

  flops_per_step: float
  realism: Realism
  flops_at_start: float = 0.0

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
    costs = Costs(self.flops_per_step, up, down, self.flops_at_start)
    steps = float(sum(work.local_steps))
    of_starts = len(work.ids) * self.flops_at_start
    return {
      "comm/bytes_up": len(work.ids) * up,
      "comm/bytes_down": work.contacted * down,
      "compute/flops": steps * self.flops_per_step + of_starts,
      "clients/contacted": work.contacted,
      "simulated/seconds": self._seconds(work, costs),
    }

  def _seconds(self, work: Work, costs: Costs) -> float:
    realism = self.realism
    if realism.deadline and len(work.ids) < work.contacted:
      return realism.deadline
    if not work.ids:
      return 0.0
    beside, a_step = realism.devices.seconds(realism.seed, work.ids, costs)
    return float((beside + a_step * work.local_steps).max())

  def planned_costs(
    self,
    trainable: PyTree,
    up: MessageTransform | None,
    down: MessageTransform | None,
  ) -> Costs:
    """What a client's round costs as far as it is known before the run.

    Deadlines are drawn before a round, on the host, when an algorithm's
    messages may still depend on rounds that run: they count the trainable,
    compressed where messages are, in both directions.

    Args:
      trainable: Arrays or shapes.
      up: Compressor of the way up, or None.
      down: Likewise down.

    Returns:
      The `Costs`.
    """
    bytes_up, bytes_down = (
      way.num_bytes(trainable)
      if way is not None and way.num_bytes is not None
      else trees.num_bytes(trainable)
      for way in (up, down)
    )
    return Costs(self.flops_per_step, bytes_up, bytes_down, self.flops_at_start)


def make_ledger(
  settings: Settings,
  model: models.Model,
  kind: str,
  trainable: PyTree,
  passes: Passes,
  realism: Realism,
) -> Ledger:
  """Builds the ledger of a run.

  Args:
    settings: Sizes of rows and batches.
    model: The model.
    kind: Of the adapter.
    trainable: What clients train, arrays or shapes.
    passes: Of the algorithm.
    realism: How clients behave.

  Returns:
    The `Ledger`.
  """
  at_start = Passes(forwards=passes.first_forwards, backwards=0)
  per_step, first = (
    settings.client.batch_size
    * flops_per_row(model, kind, trainable, settings.data.sequence_length, some)
    for some in (passes, at_start)
  )
  return Ledger(per_step, realism, first)
