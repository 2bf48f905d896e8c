r"""Writes what a run has trained in the formats that others read.

  python scripts/export.py --workdir=/tmp/run --output=/tmp/merged
  python scripts/export.py --workdir=/tmp/run --output=/tmp/lora --format=peft

"merged" (the default) is a Hugging Face folder of the whole model, with the
tokenizer of the model it started from; "peft" is the adapter alone, as the PEFT
library has it. The run's newest checkpoint is read, and nothing in its folder
is changed; `--config.FIELD=VALUE` changes a field of its config, such as the
mesh.
"""

from absl import flags

import command_line
from fedfm import adapters, errors, experiment
import output_folder

_WORKDIR = flags.DEFINE_string("workdir", None, "Run's folder.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
_FORMAT = flags.DEFINE_string("format", "merged", "merged or peft.")


def main():
  if _FORMAT.value not in ("merged", "peft"):
    raise errors.ConfigError(
      f"--format: got {_FORMAT.value!r}, expected 'merged' or 'peft'"
    )
  output = output_folder.check_new("--output", _OUTPUT.value)
  opened, state = experiment.open_run(_WORKDIR.value, command_line.overrides())
  settings = opened.settings
  if _FORMAT.value == "merged":
    output_folder.write_merged(output, opened, state)
  else:
    base = opened.algorithm.effective_base(state, opened.base)
    if base is not opened.base:
      raise errors.ConfigError(
        f"--format: algorithm {settings.algorithm!r} changes the base too, "
        "which 'peft' has no place for; use 'merged'"
      )
    adapters.peft.save(
      output,
      opened.model,
      opened.adapter,
      opened.algorithm.effective_trainable(state),
      base_model=settings.model.path or None,
    )
  command_line.show(f"round {int(state.round)}: wrote {output}")


if __name__ == "__main__":
  command_line.run(main)
