"""FLOPs of a round from the model's sizes alone, to hold a compiler's to.

A frozen base costs 2 FLOPs a weight and token forward and 2 backward (to the
activations, none to the weights): 4 N. Trained weights cost 2 more. Attention
costs 2 products of [length, length / 2] a head forward, and twice that back.
"""

from typing import NamedTuple

import jax

from fedfm import adapters, models, trees
from fedfm.scaling import workloads
from fedfm.scaling.pod import Layout


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
  chunk: int = 0,
) -> RoundFlops:
  """Counts the FLOPs of a round of a decoder.

  Args:
    model: A decoder.
    adapter: What clients train.
    layout: The cohort.
    chunk: Tokens whose logits exist at once; 0 for all. Their logits are
      computed again in the backward pass.

  Returns:
    `RoundFlops`.
  """
  config = model.config
  head = config.vocab_size * config.width
  in_layers = workloads.matmul_params(config) - head
  trained = {"full": in_layers + head, "head": head}.get(adapter.kind)
  if trained is None:
    shapes = jax.eval_shape(adapter.init, jax.random.key(0), model.shapes)
    trained = trees.num_elements(shapes)
  attention = workloads.attention_flops_per_token(config, layout.length)
  forward = 2.0 * (in_layers + head) + attention
  backward = 2.0 * (in_layers + head) + 2 * attention
  if adapter.kind == "lora":
    forward += 2.0 * trained
    backward += 4.0 * trained
  else:
    backward += 2.0 * trained
  again = 0.0
  # The layer's last product is not needed again.
  mlp_product = config.num_layers * config.mlp_width * config.width
  kept = {"full": mlp_product, "mlp": 3 * mlp_product}.get(config.remat)
  if kept is not None:
    again += 2.0 * (in_layers - kept) + attention
  if chunk:
    again += 2.0 * head
  a_token = forward + backward
  return RoundFlops(
    useful=a_token * layout.tokens,
    run=(a_token + again) * layout.tokens_run,
  )
