"""DiLoCo on all weights of Llama 3 8B: 8 replicas on 512 v5p chips.

  python scripts/compile_for_pod.py --config=configs/llama3_8b_diloco.py \
    --topology=v5p:8x8x8

Each replica is 64 chips, over which its weights, moments and 256 rows of 2,048
tokens are split. `client.local_steps` are the inner steps.

Attention is XLA's: JAX's splash kernel, which "auto" takes on TPUs, has not run
on one yet. To train, set `model.path` to a folder with weights, and `data`.
README.md has the figures.
"""

import pathlib

import ml_collections

MODEL = pathlib.Path(__file__).parent / "models" / "llama3_8b"


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; every other field has the default of `Settings`."""
  return ml_collections.ConfigDict(
    {
      "algorithm": "diloco",
      "clients_per_round": 8,
      "lanes": 8,
      "mesh": {"clients": 8, "fsdp": -1},
      "model": {
        "path": str(MODEL),
        "dtype": "bfloat16",
        "scan_layers": True,
        "remat": "mlp",
        "attention_kernel": "xla",
        "loss_chunk": 131_072,
      },
      "adapter": {"kind": "full"},
      "data": {"sequence_length": 2048},
      "client": {
        "optimizer": "adamw",
        "learning_rate": 3e-4,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "batch_size": 256,
        "local_steps": 500,
      },
      "server": {"learning_rate": 0.7, "momentum": 0.9},
      "eval": {"batch_size": 64},
    }
  )
