r"""Writes a model's folder in another format.

  python scripts/convert.py --model=DIR --output=DIR --format=orbax

The model is a Hugging Face folder, a llama2.c file or its folder, or what this
script wrote before. "orbax" is for a fast start: each process reads its own
part, and every parameter is checked by its digest; --model and
--config.model.path take such a folder too. "huggingface" is what the rest of
the world reads.
"""

from absl import flags

import command_line
from fedfm import errors, model_folders
import output_folder

_MODEL = flags.DEFINE_string("model", None, "Model's folder.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
_FORMAT = flags.DEFINE_string("format", "orbax", "orbax or huggingface.")
_DTYPE = flags.DEFINE_string(
  "dtype", None, "Of the weights; default their own."
)


def main():
  command_line.check_path("--model", _MODEL.value)
  output = output_folder.check_new("--output", _OUTPUT.value)
  try:
    model_folders.convert(
      _MODEL.value, output, _FORMAT.value, dtype=_DTYPE.value
    )
  except errors.ConfigError as e:
    raise errors.ConfigError(f"--{e}") from None


if __name__ == "__main__":
  command_line.run(main)
