"""DiLoCo: a small byte model pre-trained from random weights by replicas.

python scripts/train.py --config=configs/diloco.py --workdir=/tmp/run

Four replicas share Python's standard library, iid; each takes 16 inner AdamW
steps a round, and its moments stay with it. Photon's recipe has a file of its
own, `photon.py`. Others are by flags:

  --config.algorithm=streaming_diloco --config.communication.up=e3m0 \
    --config.algorithm_options.overlap=2 --config.client.local_steps=64
  --config.sampler=elastic --config.sampler_options.counts="(1,2,4)" \
    --config.sampler_options.rounds_each=4       replicas that join
  --config.data.partition=merged                 replicas of whole modules
"""

import pathlib

import ml_collections

MODEL = pathlib.Path(__file__).parent / "models" / "byte_tiny"


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; every other field has the default of `settings`."""
  return ml_collections.ConfigDict(
    {
      "rounds": 12,
      "clients_per_round": 4,
      "algorithm": "diloco",
      "algorithm_options": {},
      "sampler_options": {},
      "model": {"path": str(MODEL), "init": "random"},
      "adapter": {"kind": "full"},
      "data": {
        "name": "python_stdlib",
        "sequence_length": 128,
        "partition": "iid",
        "num_clients": 4,
      },
      "client": {
        "optimizer": "adamw",
        "learning_rate": 0.003,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "batch_size": 4,
        "local_steps": 16,
        "weighting": "uniform",
      },
      "server": {"learning_rate": 0.7, "momentum": 0.9},
      "communication": {"up": "none", "down": "none"},
      "eval": {
        "every": 4,
        "batch_size": 8,
        "max_examples": 4,
        "max_clients": 23,
      },
      "checkpoint": {"every": 4},
    }
  )
