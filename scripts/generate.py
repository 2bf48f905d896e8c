r"""Continues a prompt with a run's model, or with one in a folder.

  python scripts/generate.py --prompt="def main("
  python scripts/generate.py --workdir=/tmp/run --prompt="def main("
  python scripts/generate.py --model=DIR --prompt="Once upon a time"
  python scripts/generate.py --model=DIR --template=auto --prompt="What is 2+2?"

With --template only the answer is printed. Without --workdir the model is
--model, by default the one that fedfm ships: a Hugging Face folder, a llama2.c
file or its folder, or what convert.py wrote. With it, the newest checkpoint of
the run, or with --base what the run started from; `--config.FIELD=VALUE`
changes a field of its config, such as the mesh.
"""

import pathlib

from absl import flags

import command_line
from fedfm import (
  blueprint,
  completion,
  data,
  errors,
  experiment,
  model_folders,
)
from fedfm.data import prompt_formats

_WORKDIR = flags.DEFINE_string("workdir", None, "Run's folder.")
_BASE = flags.DEFINE_bool("base", False, "What the run started from.")
_MODEL = flags.DEFINE_string("model", "", "Model's folder; '' is fedfm's.")
_DTYPE = flags.DEFINE_string("dtype", None, "Of --model; default its own.")
_TEMPLATE = flags.DEFINE_string(
  "template", "", "How to write the prompt: as data.template; '' as it is."
)
_PROMPT = flags.DEFINE_string("prompt", "", "Text to continue.")
_NEW = flags.DEFINE_integer("max_new_tokens", 200, "Most tokens to add.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: the likeliest token.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Among the k likeliest tokens.")
_TOP_P = flags.DEFINE_float("top_p", None, "Among those that reach p.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling, in [0, 2**32).")


def load():
  """Returns (model's folder, model, arguments of apply, tokenizer, apply)."""
  changes = command_line.overrides()
  if _WORKDIR.value is None:
    for name, given in (("--base", _BASE.value), ("--config.*", changes)):
      if given:
        raise errors.ConfigError(f"{name}: needs --workdir")
    folder = _MODEL.value or blueprint.BUILTIN_MODEL
    command_line.check_path("--model", str(folder))
    model, params = model_folders.load(folder, dtype=_DTYPE.value)
    return folder, model, (params,), data.load_tokenizer(folder), model.apply
  for name, given in (("--model", _MODEL.value), ("--dtype", _DTYPE.value)):
    if given:
      raise errors.ConfigError(f"{name}: a run in --workdir has its own")
  opened, state = experiment.open_run(_WORKDIR.value, changes)
  if _BASE.value:
    state = opened.initial_state()
  base = opened.algorithm.effective_base(state, opened.base)
  params = (base, opened.algorithm.effective_trainable(state))
  folder = blueprint.model_folder(opened.settings)
  return folder, opened.model, params, opened.tokenizer, opened.adapter.apply


def main():
  folder, model, params, tokenizer, apply = load()
  tokenizer = completion.check_decoder(model, tokenizer)
  prompt_format = None
  if _TEMPLATE.value:
    prompt_format = prompt_formats.load(_TEMPLATE.value, pathlib.Path(folder))
  added = completion.generate_text(
    model,
    params,
    tokenizer,
    _PROMPT.value,
    apply=apply,
    prompt_format=prompt_format,
    max_new_tokens=_NEW.value,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    seed=_SEED.value,
  )
  command_line.show(added if prompt_format else _PROMPT.value + added)


if __name__ == "__main__":
  command_line.run(main)
