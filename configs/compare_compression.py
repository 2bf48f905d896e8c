"""Compressors of what clients send, all with the same bytes up.

python scripts/compare.py --config=configs/compare_compression.py

Float32 has two rounds' worth of bytes; what is smaller makes more rounds of
them: bfloat16 4, int8 8, int4 16, top-k and random-k (with error feedback) 16,
rotated 4 bits 10 (they are padded), and PowerSGD of rank 1 has 7. The sign
would have 64 rounds and stops at 16, with a quarter of the bytes. Expect 4 bits
to be far better than float32, rotation to help them, and error feedback to make
top-k good (Suresh et al. 2017, arXiv 1611.00429; Karimireddy et al. 2019, arXiv
1901.09847).
"""

import pathlib
import runpy

import ml_collections

BASE = pathlib.Path(__file__).with_name("compare_base.py")


def arm(rounds: int, up: str, **options) -> dict:
  """Settings of a compressor."""
  return {
    "rounds": rounds,
    "communication": {"up": up, "up_options": options},
    "eval": {"every": max(1, rounds // 3)},
  }


def get_config() -> ml_collections.ConfigDict:
  """Returns the comparison; see `fedfm/comparison.py`."""
  base = runpy.run_path(str(BASE))["get_config"]().to_dict()
  base |= {"algorithm": "fedavg", "clients_per_round": 8}
  base["data"] |= {"partition": "merged", "num_clients": 8}
  return ml_collections.ConfigDict(
    {
      "base": base,
      "arms": {
        "float32": arm(2, "none"),
        "bfloat16": arm(4, "bfloat16"),
        "int8": arm(8, "int8"),
        "int4": arm(16, "int4"),
        "rotation, 4 bits": arm(10, "rotation", bits=4),
        "top-k, 1/16": arm(16, "top_k", fraction=1 / 16),
        "random-k, 1/8": arm(16, "random_k", fraction=1 / 8),
        "PowerSGD, rank 1": arm(7, "power_sgd", rank=1),
        "sign": arm(16, "sign"),
      },
      "seeds": (0, 1, 2),
      "tuning_seeds": (3,),
      "rates": (1.0, 3.0, 10.0, 30.0),
      "metric": "eval/unseen/loss",
    }
  )
