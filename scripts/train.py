r"""Trains a federation, or goes on with the run that a folder holds.

  python scripts/train.py --config=configs/quickstart.py --workdir=/tmp/run \
    --config.rounds=4

The command is the same after an interruption: it resumes.
"""

import json

from absl import flags

import command_line
from fedfm import experiment

_CONFIG = flags.DEFINE_string("config", None, "Config file.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run's folder.", required=True)
_PROFILE = flags.DEFINE_integer(
  "profile_round", None, "Round to trace into the folder's profile/, from 1."
)


def main():
  command_line.check_path("--workdir", _WORKDIR.value)
  summary = experiment.train(
    command_line.load_config(_CONFIG.value), _WORKDIR.value, _PROFILE.value
  )
  command_line.show(json.dumps(summary, indent=2))


if __name__ == "__main__":
  command_line.run(main)
