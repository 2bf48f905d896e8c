"""LoRA on Llama 3.1 405B: 256 clients a round on 64 lanes of 1,024 v5p chips.

  python scripts/compile_for_pod.py --config=configs/llama3_405b_lora.py \
    --topology=v5p:8x8x16

Each of 16 groups of 64 chips holds the base once and runs 4 lanes; a client's
64 rows are split over its group. With fsdp = 16 and tensor = 8 a chip would
send half as much again for a token.

Attention is XLA's: JAX's splash kernel, which "auto" takes on TPUs, has not run
on one yet. To train, set `model.path` to a folder with weights, and `data`.
README.md has the figures.
"""

import pathlib

import ml_collections

MODEL = pathlib.Path(__file__).parent / "models" / "llama3_405b"


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; every other field has the default of `Settings`."""
  return ml_collections.ConfigDict(
    {
      "clients_per_round": 256,
      "lanes": 64,
      "mesh": {"clients": -1, "fsdp": 64},
      "model": {
        "path": str(MODEL),
        "dtype": "bfloat16",
        "scan_layers": True,
        "remat": "full",
        "attention_kernel": "xla",
      },
      "adapter": {"rank": 16, "alpha": 32.0, "targets": ("q_proj", "v_proj")},
      "data": {"sequence_length": 1024},
      "client": {
        "optimizer": "adamw",
        "learning_rate": 1e-4,
        "batch_size": 64,
        "local_steps": 4,
      },
      "eval": {"batch_size": 64},
    }
  )
