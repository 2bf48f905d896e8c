"""How LoRA adapters are averaged, over 3 clients and over 50, at rank 2.

python scripts/compare.py --config=configs/compare_lora_aggregation.py

Plays are dealt to clients by Dirichlet(0.1), so that a client has one or two;
all clients take part in every round, with the same local steps whether they are
3 or 50. After RoLoRA's experiment (Chen et al. 2025, arXiv 2502.01755), where
plain averaging of both factors loses much from 3 to 50 clients, FFA-LoRA some,
and RoLoRA little. Methods without an aggregation error should be no worse than
plain averaging (FLoRA apart, whose adapters start anew in every round).
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("compare_base.py")
METHODS = ("fedit", "ffa_lora", "rolora", "flora", "fedex_lora", "flexlora")


def arm(method: str, k: int) -> dict:
  """Settings of one method with k clients."""
  return {
    "algorithm": method,
    "clients_per_round": k,
    "data": {"num_clients": k},
  }


def get_config() -> ml_collections.ConfigDict:
  """Returns the comparison; see `fedfm/comparison.py`."""
  base = runpy.run_path(str(BASE))["get_config"]().to_dict()
  base |= {"rounds": 6, "adapter": {"rank": 2, "alpha": 4.0}}
  base["data"] |= {
    "partition": "dirichlet",
    "alpha": 0.1,
    "label_key": base["data"].get("client_key", "client"),
  }
  base["client"]["local_steps"] = 15
  base["eval"]["every"] = 3
  return ml_collections.ConfigDict(
    {
      "base": base,
      "arms": {
        f"K = {k}, {method}": arm(method, k)
        for k in (3, 50)
        for method in METHODS
      },
      "seeds": (0, 1, 2),
      "tuning_seeds": (3,),
      "rates": (1.0, 3.0, 10.0, 30.0),
      "metric": "eval/unseen/loss",
    }
  )
