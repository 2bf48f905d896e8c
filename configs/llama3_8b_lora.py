"""LoRA on Llama 3 8B: 10,000 clients a round on 256 lanes of a v5e pod.

  python scripts/compile_for_pod.py --config=configs/llama3_8b_lora.py \
    --topology=v5e:16x16

Each of 32 groups of 8 chips holds the base once and runs 8 lanes; a client's 8
rows are split over its group. `remat` keeps the MLP's inner products and
computes the rest of a layer again.

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
      "clients_per_round": 10_000,
      "lanes": 256,
      "mesh": {"clients": -1, "fsdp": 8},
      "model": {
        "path": str(MODEL),
        "dtype": "bfloat16",
        "scan_layers": True,
        "remat": "mlp",
        "attention_kernel": "xla",
      },
      "adapter": {"rank": 16, "alpha": 32.0, "targets": ("q_proj", "v_proj")},
      "data": {"sequence_length": 512},
      "client": {
        "optimizer": "adamw",
        "learning_rate": 1e-4,
        "batch_size": 8,
        "local_steps": 4,
      },
    }
  )
