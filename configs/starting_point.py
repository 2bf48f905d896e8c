"""Where to begin: the settings that all arms of the starting point share.

python scripts/starting_point.py

18 CPU-minutes. Expect a pretrained start to be far better in every cell; that
it also loses less by non-iid clients (Nguyen et al. 2022, arXiv 2206.15387;
Chen et al. 2022, arXiv 2206.11488) does not show on these, see README.md.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns base settings, and the client learning rate of each start."""
  return ml_collections.ConfigDict(
    {
      "base": {
        "rounds": 12,
        "clients_per_round": 8,
        "adapter": {"rank": 8},
        "data": {"name": "python_stdlib", "sequence_length": 128},
        "client": {
          "optimizer": "sgd",
          "clip_norm": 1.0,
          "batch_size": 4,
          "local_steps": 4,
        },
        "eval": {
          "every": 3,
          "batch_size": 4,
          "max_examples": 4,
          "max_clients": 23,
        },
      },
      "seeds": (0, 1, 2),
      # The best of factors of 3 on natural clients, seed 0: the clients' for
      # FedAvg, then FedAdam's. LoRA's and FedAvgM's are not tuned.
      "client_rates": {"pretrained": 0.3, "random": 0.3, "lora": 1.0},
      "server_rates": {"fedavg": 1.0, "fedavgm": 0.5, "fedadam": 0.01},
    }
  )
