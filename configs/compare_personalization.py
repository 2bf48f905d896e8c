"""Models of the clients' own, on clients who each write few of the digits.

python scripts/compare.py --config=configs/compare_personalization.py

Accuracy of every client's own model on its own held-out digits, beside that of
the global model on the same and on the test set. Expect every personal model to
be far better at home than the global one, fine-tuning to be hard to beat (Yu et
al. 2020, arXiv 2002.04758), and clusters to be between the two.
`configs/compare_personal_lora.py` has the methods that keep a LoRA adapter.
"""

import pathlib
import runpy

import ml_collections

_DIGITS = pathlib.Path(__file__).with_name("compare_digits.py")
OWN = "eval/seen/personal_accuracy"
HEAD = ["head", "head_bias"]


def arm(algorithm: str, **options) -> dict:
  """Settings of an algorithm."""
  return {"algorithm": algorithm, "algorithm_options": options}


def get_config() -> ml_collections.ConfigDict:
  """Returns the comparison; see `fedfm/comparison.py`."""
  base = runpy.run_path(str(_DIGITS))["get_config"]().to_dict()
  base |= {"rounds": 10, "clients_per_round": 20}
  base["data"] |= {"num_clients": 40, "dealt_heldout_fraction": 0.2}
  base["client"]["learning_rate"] = 0.1
  base["eval"]["every"] = 10
  tuned = {"eval": {"finetune_steps": 20}}
  return ml_collections.ConfigDict(
    {
      "base": base,
      "arms": {
        "FedAvg, global model": arm("fedavg"),
        "FedAvg, fine-tuned 20 steps": arm("fedavg") | tuned,
        "Ditto": arm("ditto", lam=0.1),
        "FedPer, head local": arm("fedper", local_parts=HEAD),
        "FedRep, head local": arm("fedrep", local_parts=HEAD),
        "IFCA, 4 clusters": arm("ifca", num_clusters=4),
      },
      "seeds": (0, 1, 2),
      "metric": OWN,
      "higher_is_better": True,
      "own_metrics": {
        "FedAvg, global model": "eval/seen/accuracy",
        "FedAvg, fine-tuned 20 steps": "eval/seen/finetuned_accuracy",
      },
      "columns": ("eval/seen/accuracy", "eval/test/accuracy"),
    }
  )
