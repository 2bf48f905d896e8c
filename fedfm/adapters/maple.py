"""MaPLe (Khattak et al. 2023, arXiv 2210.03117): prompts for all of CLIP.

The prompt of the images is a linear function of that of the texts, so that what
is learned in one tower moves the other:

  P_image = P_text W + b

These are the prompts of the first layer, the paper's depth 1; it gains from
prompts of deeper layers too, which are not here.
"""

import jax
import jax.numpy as jnp

from fedfm import errors
from fedfm.adapters import adapter as adapter_lib
from fedfm.adapters.adapter import Adapter
from fedfm.adapters.prompt_tuning import check_num_tokens, words
from fedfm.models.clip import CLIPConfig
from fedfm.models.model import Model


def maple(model: Model, *, num_tokens: int = 2) -> Adapter:
  """Trains virtual tokens of the texts, and a map of them to the images'.

  Args:
    model: CLIP.
    num_tokens: Virtual tokens after the first token of a text, and as many
      after the class token of an image.

  Returns:
    An `Adapter` whose trainable is {"prompt": [num_tokens, text width],
    "coupling": [text width, image width], "coupling_bias": [image width]}.

  Raises:
    ConfigError: A model that is not CLIP, or fewer than 1 token.
  """
  if not isinstance(model.config, CLIPConfig):
    raise errors.ConfigError("adapter.kind: 'maple' needs CLIP")
  check_num_tokens(model, num_tokens)
  rows, cols = model.config.text.width, model.config.image.width

  def init(key, params):
    prompt = words(key, params["text"]["embed"], num_tokens)
    key = jax.random.fold_in(key, 1)
    coupling = rows**-0.5 * jax.random.normal(key, (rows, cols), prompt.dtype)
    bias = jnp.zeros(cols, prompt.dtype)
    return {"prompt": prompt, "coupling": coupling, "coupling_bias": bias}

  def bind(params, trainable):
    prompt = trainable["prompt"]
    of_images = prompt @ trainable["coupling"] + trainable["coupling_bias"]
    return {
      **params,
      "text": {**params["text"], "prompt": prompt},
      "image": {**params["image"], "prompt": of_images},
    }

  return adapter_lib.make_adapter(
    model,
    init=init,
    bind=bind,
    merge=None,
    kind="maple",
    config={"num_tokens": num_tokens},
  )
