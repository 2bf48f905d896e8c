"""LoRA on Llama 3 8B: 10,000 clients a round on 256 lanes of a v5e pod.

  python scripts/compile_for_pod.py --config=configs/llama3_8b_lora.py \
    --topology=v5e:16x16

Each of 32 groups of 8 chips holds the base once and runs 8 lanes; a client's 8
rows are split over its group. `remat` keeps the MLP's inner products and
computes the rest of a layer again.

See `pod_lora_base.py` for the rest, and for what it takes to train.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("pod_lora_base.py")


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; every other field has the default of `Settings`."""
  config = runpy.run_path(str(BASE))["get_config"]("llama3_8b").to_dict()
  config |= {"clients_per_round": 10_000, "lanes": 256}
  config["mesh"] = {"clients": -1, "fsdp": 8}
  config["model"]["remat"] = "mlp"
  config["client"]["batch_size"] = 8
  return ml_collections.ConfigDict(config)
