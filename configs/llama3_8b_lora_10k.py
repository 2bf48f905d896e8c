"""LoRA on Llama 3 8B: 10,000 clients a round on 2,048 lanes of a v5e pod.

  python scripts/compile_for_pod.py --config=configs/llama3_8b_lora_10k.py \
    --topology=v5e:16x16

and on four pods, lanes split over them: `--topology=4*v5e:16x16`.

Each of 64 groups of 4 chips holds the base once and runs 32 lanes; a client's 4
rows are split over its group. Only the inputs of layers are kept, as there are
so many lanes.

See `pod_lora_base.py` for the rest, and for what it takes to train.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("pod_lora_base.py")


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; every other field has the default of `Settings`."""
  config = runpy.run_path(str(BASE))["get_config"]("llama3_8b").to_dict()
  config |= {"clients_per_round": 10_000, "lanes": 2048}
  config["mesh"] = {"clients": -1, "fsdp": 4}
  config["client"]["batch_size"] = 4
  config["eval"] = {"batch_size": 4}
  return ml_collections.ConfigDict(config)
