"""CLIP on pairs of an image and a text, by LoRA on both towers.

  python scripts/train.py --config=configs/contrastive.py \
    --config.model.path=CLIP --config.data.path=pairs.npz --workdir=/tmp/run

The archive holds x_train, text_train, x_test and text_test, or token ids as
tokens_train and tokens_test with --config.data.token_key=tokens. A TFDS data
set does as well:

  --config.data.name=NAME --config.data.path=DATA_DIR \
    --config.data.image_key=image --config.data.text_key=caption \
    --config.data.client_key=CLIENT --config.data.partition=natural

`eval/<population>/accuracy` is the share of texts that pick their own image
among those of a batch, of `eval.batch_size`. For prompts in front of the texts
(CoOp), --config.adapter.kind=prompt_tuning.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; every other field has the default of `settings.py`."""
  return ml_collections.ConfigDict(
    {
      "seed": 0,
      "rounds": 20,
      "clients_per_round": 8,
      "algorithm": "fedavg",
      "adapter": {
        "kind": "lora",
        "rank": 8,
        "alpha": 16.0,
        "targets": ("q_proj", "v_proj"),
      },
      "data": {
        "task": "contrastive",
        "name": "npz",
        "image_key": "x",
        "text_key": "text",
        "sequence_length": 77,
        "partition": "iid",
        "num_clients": 20,
      },
      "client": {
        "optimizer": "adam",
        "learning_rate": 0.001,
        "batch_size": 32,
        "local_steps": 8,
      },
      "eval": {"every": 10, "batch_size": 32, "max_examples": 128},
      "checkpoint": {"every": 10},
    }
  )
