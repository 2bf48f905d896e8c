"""Instruction tuning with LoRA, as FedIT (Zhang et al. 2023, arXiv 2305.05644).

Over databricks-dolly-15k on ten clients that differ in the kinds of tasks they
hold; the folder of FederatedGPT-Shepherd's files, a JSON file a client:

  python scripts/train.py --config=configs/instruction_tuning.py \\
    --workdir=/tmp/run --config.data.path=DIR --config.model.path=MODEL

Without `model.path` it tunes the byte model that fedfm ships, to see it run.
Rows of any JSONL file or TFDS data set do as well; name the fields, and where
no field says whose a row is, how many clients to deal the rows out to:

  --config.data.name=jsonl --config.data.path=train.jsonl \\
    --config.data.test_files= --config.data.client_key= \\
    --config.data.prompt_key=question --config.data.response_key=answer \\
    --config.data.context_key= \\
    --config.data.partition=iid --config.data.num_clients=10
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; every other field has the default of `settings.py`."""
  return ml_collections.ConfigDict(
    {
      "seed": 0,
      "rounds": 10,
      "clients_per_round": 4,
      "algorithm": "fedit",
      "adapter": {
        "kind": "lora",
        "rank": 8,
        "alpha": 16.0,
        "targets": ("q_proj", "k_proj", "v_proj", "o_proj"),
      },
      "data": {
        "name": "files",
        "files": "local_training_*.json",
        "test_files": "global_test.json",
        "prompt_key": "instruction",
        "context_key": "context",
        "response_key": "response",
        "template": "auto",
        "sequence_length": 512,
        "unseen_fraction": 0.0,
        "heldout_fraction": 0.05,
      },
      "client": {
        "optimizer": "adamw",
        "learning_rate": 0.003,
        "schedule": "linear",
        "batch_size": 8,
        "local_steps": 16,
        "clip_norm": 1.0,
        "weighting": "examples",
      },
      "eval": {"every": 5, "batch_size": 8, "max_examples": 32},
      "checkpoint": {"every": 5},
    }
  )
