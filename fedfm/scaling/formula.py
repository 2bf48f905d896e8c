"""FLOPs of a round from the model's sizes alone, to hold a compiler's to.

A frozen base costs 2 FLOPs a weight and token forward and 2 backward (to the
activations, none to the weights): 4 N. Trained weights cost 2 more. Attention
costs 2 products of [length, length] a head forward, and twice that back; a
decoder's half of it.
"""

import functools
from typing import NamedTuple

import jax

from fedfm import adapters, model_flops, models
from fedfm.scaling.cohort_shapes import Layout
from fedfm.types import Passes

# Of a layer's products, by `remat`, those that the backward pass does not need
# again: the last one, and those that are kept.
_NOT_AGAIN = {
  "full": ("down_proj",),
  "mlp": ("gate_proj", "up_proj", "down_proj"),
}
_TRAINING_STEP = Passes()


class RoundFlops(NamedTuple):
  """FLOPs of matrix products, over all devices.

  Attributes:
    useful: What the round needs.
    run: What is expected to run: with what remat and the loss compute again,
      and lanes that wait.
  """

  useful: float
  run: float


def round_flops(
  model: models.Model,
  adapter: adapters.Adapter,
  layout: Layout,
  sequence_length: int,
  chunk: int = 0,
  passes: Passes = _TRAINING_STEP,
) -> RoundFlops:
  """Counts the FLOPs of a round.

  Args:
    model: The foundation model.
    adapter: What clients train.
    layout: The cohort.
    sequence_length: Tokens of a text.
    chunk: Tokens whose logits exist at once; 0 for all. Their logits are
      computed again in the backward pass.
    passes: Of the algorithm.

  Returns:
    `RoundFlops`.
  """
  trainable = jax.eval_shape(adapter.init, jax.random.key(0), model.shapes)

  def a_row(passes: Passes, of: models.Model = model, of_trainable=trainable):
    flops = model_flops.flops_per_row(
      of, adapter.kind, of_trainable, sequence_length, passes
    )
    is_causal = isinstance(model.config, models.DecoderConfig)
    return flops.causal if is_causal else flops.total

  forward = Passes(forwards=1, backwards=0)
  again, remat = 0.0, getattr(model.config, "remat", "none")
  if remat in _NOT_AGAIN and adapter.kind != "head":
    layers = model_flops.part(model, functools.partial(_is_again, remat))
    again += a_row(forward, layers, {})
    if adapter.kind == "last_layers":  # Gradients stop below them.
      again *= adapter.config["num_layers"] / model.config.num_layers
  if chunk:
    c = model.config
    again += 2.0 * c.vocab_size * c.width * sequence_length
  steps = layout.num_rows * a_row(passes)
  again *= layout.num_rows * passes.backwards
  first = layout.num_clients * layout.rows * passes.first_forwards
  first *= a_row(forward)
  return RoundFlops(
    useful=steps + first, run=(steps + again + first) * layout.run_share
  )


def _is_again(remat: str, path: str) -> bool:
  *where, name = path.split("/")
  return "layers" in where and name not in _NOT_AGAIN[remat]
