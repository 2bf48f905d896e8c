"""What the comparisons of LoRA, servers, compressors and clients share.

A pretrained model of 260 thousand parameters, of simple English stories, goes
over to Shakespeare: a client is a play. Both files are looked for in
`../shared/data` beside the repository, or where FEDFM_SHARED_DATA says; where
they are not, it is the base that fedfm ships on the Python standard library,
which is slower and has less to gain.
"""

import os
import pathlib

import ml_collections

BESIDE = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
SHARED = pathlib.Path(os.environ.get("FEDFM_SHARED_DATA") or BESIDE)
STORIES = SHARED / "stories260K"
PLAYS = SHARED / "shakespeare_roles" / "shakespeare_speeches.jsonl.gz"


def get_config() -> ml_collections.ConfigDict:
  """Returns base settings; every other field has its default."""
  model, data = {}, {"name": "python_stdlib"}
  if STORIES.is_dir() and PLAYS.is_file():
    model = {"path": str(STORIES)}
    data = {
      "name": "jsonl",
      "path": str(PLAYS),
      "client_key": "play",
      "unseen_fraction": 0.2,
    }
  return ml_collections.ConfigDict(
    {
      "rounds": 10,
      "clients_per_round": 10,
      "model": model | {"scan_layers": True},
      "adapter": {"rank": 4, "alpha": 8.0},
      "data": data | {"sequence_length": 32},
      "client": {
        "optimizer": "adam",
        "learning_rate": 0.003,
        "batch_size": 2,
        "local_steps": 10,
        "weighting": "uniform",
      },
      "eval": {
        "every": 5,
        "batch_size": 16,
        "max_examples": 32,
        "max_clients": 12,
      },
    }
  )
