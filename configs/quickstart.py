"""LoRA on the byte Llama, federated over the standard library's modules.

python scripts/train.py --config=configs/quickstart.py --workdir=/tmp/run
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; every other field has the default of `settings.py`."""
  return ml_collections.ConfigDict(
    {
      "seed": 0,
      "rounds": 8,
      "clients_per_round": 8,
      "algorithm": "fedavg",
      "adapter": {
        "kind": "lora",
        "rank": 16,
        "alpha": 16.0,
        "targets": (
          "q_proj",
          "k_proj",
          "v_proj",
          "o_proj",
          "gate_proj",
          "up_proj",
          "down_proj",
        ),
      },
      "data": {"name": "python_stdlib", "sequence_length": 512},
      "client": {
        "optimizer": "adam",
        "learning_rate": 0.02,
        "schedule": "linear",
        "batch_size": 2,
        "local_steps": 4,
        "clip_norm": 1.0,
      },
      "eval": {
        "every": 4,
        "batch_size": 4,
        "max_examples": 4,
        "max_clients": 24,
      },
      "checkpoint": {"every": 4},
    }
  )
