"""LoRA on Llama 3.1 405B: 256 clients a round on 64 lanes of 1,024 v5p chips.

  python scripts/compile_for_pod.py --config=configs/llama3_405b_lora.py \
    --topology=v5p:8x8x16

Each of 16 groups of 64 chips holds the base once and runs 4 lanes; a client's
64 rows are split over its group. With fsdp = 16 and tensor = 8 a chip would
send half as much again for a token.

See `pod_lora_base.py` for the rest, and for what it takes to train.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("pod_lora_base.py")


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; every other field has the default of `Settings`."""
  config = runpy.run_path(str(BASE))["get_config"]("llama3_405b").to_dict()
  config |= {"clients_per_round": 256, "lanes": 64}
  config["mesh"] = {"clients": -1, "fsdp": 64}
  config["data"]["sequence_length"] = 1024
  config["client"]["batch_size"] = 64
  config["eval"] = {"batch_size": 64}
  return ml_collections.ConfigDict(config)
