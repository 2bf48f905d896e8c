"""Answers of a model that is split over devices, here or in one of processes.

As a script, `mesh_questions.py PORT INDEX` is one of two processes with four
devices each; it prints what `answers` gives.
"""

import json
import sys

import jax

from fedfm import data, questions, sharding
from fedfm.models import DecoderConfig, decoder, generation, losses

ASKED = [
  questions.Question("1", "ann", "what is", ("it", "that"), 1),
  questions.Question("2", "bob", "who", ("she", "he", "they"), 0),
  questions.Question("3", "bob", "a longer question", ("yes", "no"), 1),
]


def answers(mesh):
  """What the model answers, with its weights placed on a mesh."""
  tokenizer = data.byte_tokenizer()
  model = decoder(
    DecoderConfig(
      vocab_size=272,
      width=16,
      num_layers=2,
      num_heads=2,
      mlp_width=32,
      max_length=32,
    )
  )
  places = sharding.shardings(mesh, model.axes, model.shapes)
  loss = losses.language_model(
    lambda trainable, base, *args, **kw: model.apply(base, *args, **kw)
  )
  with jax.set_mesh(mesh):
    params = jax.jit(model.init, out_shardings=places)(jax.random.key(3))
    chosen = questions.multiple_choice(
      loss, ((), params), tokenizer, 32, ASKED, batch_size=3
    )
    written = generation.generate(
      model.apply,
      model.init_cache,
      (params,),
      [[256, 97, 98], [256, 99, 100]],
      max_new_tokens=8,
    )
    # What it says itself is right.
    tokens = jax.device_get(written.tokens)
    said = questions.exact_match(
      model,
      model.apply,
      (params,),
      tokenizer,
      [
        questions.Question("4", "ann", text, (), tokenizer.decode(own))
        for text, own in zip(("ab", "cd"), tokens)
      ],
      max_new_tokens=8,
    )
  return {
    "chosen": {name: x.tolist() for name, x in chosen.items()},
    "tokens": tokens.tolist(),
    "said": said["exact_match"].tolist(),
  }


if __name__ == "__main__":
  jax.distributed.initialize(
    f"localhost:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2])
  )
  print(json.dumps(answers(sharding.make_mesh({"clients": 1, "fsdp": 8}))))
