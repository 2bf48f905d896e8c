"""What the comparisons on handwritten digits share.

A small CNN from random weights, on 100 clients of MNIST, each with mostly one
or two of the ten digits (Dirichlet of 0.1). The file is looked for in
`../shared/data/mnist` beside the repository, or where FEDFM_SHARED_DATA says.
"""

import pathlib
import runpy

import ml_collections

_CONFIGS = pathlib.Path(__file__).resolve().parent
SHARED = runpy.run_path(str(_CONFIGS / "compare_base.py"))["SHARED"]


def get_config() -> ml_collections.ConfigDict:
  """Returns base settings; every other field has its default."""
  return ml_collections.ConfigDict(
    {
      "rounds": 20,
      "clients_per_round": 10,
      "model": {"path": str(_CONFIGS / "models/small_cnn"), "init": "random"},
      "adapter": {"kind": "full"},
      "data": {
        "task": "classification",
        "name": "npz",
        "path": str(SHARED / "mnist" / "mnist.npz"),
        "image_key": "x",
        "partition": "dirichlet",
        "num_clients": 100,
        "alpha": 0.1,
      },
      "client": {
        "optimizer": "sgd",
        "learning_rate": 0.03,
        "batch_size": 20,
        "local_steps": 10,
      },
      "eval": {"every": 10, "batch_size": 50, "max_examples": 250},
    }
  )
