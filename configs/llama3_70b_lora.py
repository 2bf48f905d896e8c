"""LoRA on Llama 3 70B: 128 clients a round on 32 lanes of a v5e pod.

  python scripts/compile_for_pod.py --config=configs/llama3_70b_lora.py \
    --topology=v5e:16x16

Each of 8 groups of 32 chips holds the base once, in 16 x 2 parts, and runs 4
lanes; a client's 32 rows are split over 16, its heads and MLP over 2.

Attention is XLA's: JAX's splash kernel, which "auto" takes on TPUs, has not run
on one yet. To train, set `model.path` to a folder with weights, and `data`.
README.md has the figures.
"""

import pathlib

import ml_collections

MODEL = pathlib.Path(__file__).parent / "models" / "llama3_70b"


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; every other field has the default of `Settings`."""
  return ml_collections.ConfigDict(
    {
      "clients_per_round": 128,
      "lanes": 32,
      "mesh": {"clients": -1, "fsdp": 16, "tensor": 2},
      "model": {
        "path": str(MODEL),
        "dtype": "bfloat16",
        "scan_layers": True,
        "remat": "full",
        "attention_kernel": "xla",
      },
      "adapter": {"rank": 16, "alpha": 32.0, "targets": ("q_proj", "v_proj")},
      "data": {"sequence_length": 512},
      "client": {
        "optimizer": "adamw",
        "learning_rate": 1e-4,
        "batch_size": 32,
        "local_steps": 4,
      },
      "eval": {"batch_size": 32},
    }
  )
