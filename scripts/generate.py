r"""Continues a prompt with a run's model, or with a Hugging Face folder.

  python scripts/generate.py --prompt="def main("
  python scripts/generate.py --workdir=/tmp/run --prompt="def main("

Without --workdir the model is --model, by default the one that fedfm ships.
With it, the newest checkpoint of the run, or with --base what the run started
from; `--config.FIELD=VALUE` changes a field of its config, such as the mesh.
"""

from absl import flags

import command_line
from fedfm import assembly, completion, data, errors, experiment
from fedfm.models import huggingface

_WORKDIR = flags.DEFINE_string("workdir", None, "Run's folder.")
_BASE = flags.DEFINE_bool("base", False, "What the run started from.")
_MODEL = flags.DEFINE_string("model", "", "Hugging Face folder; '' is fedfm's.")
_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue.")
_NEW = flags.DEFINE_integer("max_new_tokens", 200, "Most tokens to add.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Among the k likeliest tokens.")
_TOP_P = flags.DEFINE_float("top_p", None, "Among those that reach p.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling, in [0, 2**32).")


def load():
  """Returns (model, leading arguments of apply, tokenizer, apply)."""
  changes = command_line.overrides()
  if _WORKDIR.value is None:
    for name, given in (("--base", _BASE.value), ("--config.*", changes)):
      if given:
        raise errors.ConfigError(f"{name}: needs --workdir")
    model, params = huggingface.load(_MODEL.value or assembly.BUILTIN_MODEL)
    return model, (params,), data.byte_tokenizer(), model.apply
  if _MODEL.value:
    raise errors.ConfigError("--model: a run in --workdir has its own")
  opened, state = experiment.open_run(_WORKDIR.value, changes)
  if _BASE.value:
    state = opened.initial_state()
  base = opened.algorithm.effective_base(state, opened.base)
  params = (base, state.trainable)
  return opened.model, params, opened.tokenizer, opened.adapter.apply


def main():
  model, params, tokenizer, apply = load()
  added = completion.generate_text(
    model,
    params,
    tokenizer,
    _PROMPT.value,
    apply=apply,
    max_new_tokens=_NEW.value,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    seed=_SEED.value,
  )
  print(_PROMPT.value + added)


if __name__ == "__main__":
  command_line.run(main)
