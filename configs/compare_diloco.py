"""DiLoCo's sweeps: how long replicas go alone (H), and how many there are (k).

python scripts/compare.py --config=configs/compare_diloco.py

All arms take 128 inner steps a replica, from random weights: more replicas see
more data, and a longer H sends less. Expect a longer H to cost little, more
replicas to help, Photon (plain averaging) to be behind DiLoCo at the same inner
rate, and 4-bit fragments to be as good as whole float32 exchanges (Douillard et
al. 2023, arXiv 2311.08105; 2025, arXiv 2501.18512).
"""

import pathlib
import runpy

import ml_collections

DILOCO = pathlib.Path(__file__).with_name("diloco.py")
STEPS = 128  # Inner steps of every replica.


def arm(k: int, h: int, **changes) -> dict:
  """Settings of k replicas that exchange every h steps."""
  rounds = STEPS // h
  settings = {
    "rounds": rounds,
    "clients_per_round": k,
    "data": {"num_clients": k},
    "client": {"local_steps": h},
    "eval": {"every": max(1, rounds // 4)},
  }
  return settings | changes


def get_config() -> ml_collections.ConfigDict:
  """Returns the comparison; see `fedfm/comparison.py`."""
  base = runpy.run_path(str(DILOCO))["get_config"]().to_dict()
  base["data"]["sequence_length"] = 64
  base["model"]["scan_layers"] = True  # Compiles faster.
  averaging = {"algorithm": "photon", "server": {"learning_rate": 1.0}}
  streaming = {
    "algorithm": "streaming_diloco",
    "algorithm_options": {"num_fragments": 4, "overlap": 2, "mixing": 0.5},
    # Four exchanges, of a fragment each, in sixteen steps.
    "rounds": STEPS // 4,
    "eval": {"every": STEPS // 16},
  }
  low_bit = {"communication": {"up": "e3m0"}}
  return ml_collections.ConfigDict(
    {
      "base": base,
      "arms": {
        "one replica": arm(1, 16, **averaging),
        "k = 4, H = 4": arm(4, 4),
        "k = 4, H = 16": arm(4, 16),
        "k = 4, H = 64": arm(4, 64),
        "k = 2, H = 16": arm(2, 16),
        "k = 8, H = 16": arm(8, 16),
        "photon, k = 4, H = 16": arm(4, 16, **averaging),
        "streaming, k = 4, H = 16": arm(4, 16, **streaming),
        "streaming, E3M0": arm(4, 16, **streaming, **low_bit),
      },
      "seeds": (0, 1),
      "metric": "eval/unseen/bits_per_byte",
    }
  )
