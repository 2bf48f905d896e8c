"""Photon: plain averaging of replicas with small batches and high rates.

python scripts/train.py --config=configs/photon.py --workdir=/tmp/run

The recipe of Sani et al. 2024 (arXiv 2411.02908) at the size of
`configs/diloco.py`, of which all else is taken: the server adds the mean delta
as it is (a rate of 1, no momentum), and every replica's batch is small and its
AdamW's rate high and falling by a cosine, which averaging over replicas bears.
The paper's numbers are for models of 125 million weights and more; these are
for this one.
"""

import pathlib
import runpy

import ml_collections

DILOCO = pathlib.Path(__file__).with_name("diloco.py")


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; what it doesn't set is DiLoCo's."""
  config = runpy.run_path(str(DILOCO))["get_config"]()
  config.algorithm = "photon"
  config.server = {"learning_rate": 1.0}
  config.client.update(
    {"batch_size": 2, "learning_rate": 0.01, "schedule": "cosine"}
  )
  return config
