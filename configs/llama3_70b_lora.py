"""LoRA on Llama 3 70B: 128 clients a round on 32 lanes of a v5e pod.

  python scripts/compile_for_pod.py --config=configs/llama3_70b_lora.py \
    --topology=v5e:16x16

Each of 8 groups of 32 chips holds the base once, in 16 x 2 parts, and runs 4
lanes; a client's 32 rows are split over 16, its heads and MLP over 2.

See `pod_lora_base.py` for the rest, and for what it takes to train.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("pod_lora_base.py")


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; every other field has the default of `Settings`."""
  config = runpy.run_path(str(BASE))["get_config"]("llama3_70b").to_dict()
  config |= {"clients_per_round": 128, "lanes": 32}
  config["mesh"] = {"clients": -1, "fsdp": 16, "tensor": 2}
  config["client"]["batch_size"] = 32
  config["eval"] = {"batch_size": 32}
  return ml_collections.ConfigDict(config)
