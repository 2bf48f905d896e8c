"""LoRA adapters of the clients' own, on plays as they are.

python scripts/compare.py --config=configs/compare_personal_lora.py

The loss of every client's own model on its own held-out text, beside that of
the global model on the same text and on unseen plays. Expect every personal
model to be better than the global one, fine-tuning to be hard to beat (Yu et
al. 2020, arXiv 2002.04758), and clusters to be between the two.
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("compare_base.py")
OWN = "eval/seen/personal_loss"


def arm(algorithm: str, **options) -> dict:
  """Settings of an algorithm."""
  return {"algorithm": algorithm, "algorithm_options": options}


def get_config() -> ml_collections.ConfigDict:
  """Returns the comparison; see `fedfm/comparison.py`."""
  base = runpy.run_path(str(BASE))["get_config"]().to_dict()
  base |= {"rounds": 8, "clients_per_round": 15}
  base["eval"] |= {"every": 8, "max_examples": 64}
  tuned = {"eval": {"finetune_steps": 20}}
  return ml_collections.ConfigDict(
    {
      "base": base,
      "arms": {
        "FedAvg, global model": arm("fedavg"),
        "FedAvg, fine-tuned 20 steps": arm("fedavg") | tuned,
        "Ditto": arm("ditto", lam=0.1),
        "FedPer, B local": arm("fedper", local_parts=["b"]),
        "FedRep, B local": arm("fedrep", local_parts=["b"]),
        "FedSA-LoRA": arm("fedsa_lora"),
        "FedDPA-F": arm("feddpa_f", global_rounds=5),
        "FedDPA-T": arm("feddpa_t"),
        "IFCA, 2 clusters": arm("ifca", num_clusters=2),
      },
      "seeds": (0, 1, 2),
      "tuning_seeds": (3,),
      "rates": (1.0, 3.0, 10.0, 30.0),
      "metric": OWN,
      "own_metrics": {
        "FedAvg, global model": "eval/seen/loss",
        "FedAvg, fine-tuned 20 steps": "eval/seen/finetuned_loss",
      },
      "columns": ("eval/seen/loss", "eval/unseen/loss"),
    }
  )
