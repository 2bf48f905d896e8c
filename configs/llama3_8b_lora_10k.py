"""LoRA on Llama 3 8B: 10,000 clients a round on 2,048 lanes of a v5e pod.

  python scripts/compile_for_pod.py --config=configs/llama3_8b_lora_10k.py \
    --topology=v5e:16x16

and on four pods, lanes split over them: `--topology=4*v5e:16x16`.

Each of 64 groups of 4 chips holds the base once and runs 32 lanes; a client's 4
rows are split over its group. Only the inputs of layers are kept, as there are
so many lanes.

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
      "lanes": 2048,
      "mesh": {"clients": -1, "fsdp": 4},
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
        "batch_size": 4,
        "local_steps": 4,
      },
      "eval": {"batch_size": 4},
    }
  )
