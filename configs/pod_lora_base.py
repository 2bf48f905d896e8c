"""What the pods' LoRA configs share.

Attention is XLA's: JAX's splash kernel, which "auto" takes on TPUs, has not run
on one yet. To train, set `model.path` to a folder with weights, and `data`.
README.md has the figures.
"""

import pathlib

import ml_collections

_MODELS = pathlib.Path(__file__).parent / "models"


def get_config(model: str = "llama3_8b") -> ml_collections.ConfigDict:
  """Returns base settings; every other field has the default of `Settings`.

  Args:
    model: A folder of `configs/models`, which has shapes and no weights.
  """
  return ml_collections.ConfigDict(
    {
      "model": {
        "path": str(_MODELS / model),
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
        "local_steps": 4,
      },
    }
  )
