"""Server optimizers on handwritten digits of Dirichlet(0.1).

python scripts/compare.py --config=configs/compare_servers.py

After Reddi et al. 2021 (arXiv 2003.00295), where momentum always helps, and
adaptive servers most where gradients are sparse. A small CNN from random
weights; the server's rate is tuned for each arm, of multiples of what is below,
and the clients' is 0.1. `--config.data.path=mnist.npz` where
`compare_digits.py` finds none.
"""

import pathlib
import runpy

import ml_collections

_DIGITS = pathlib.Path(__file__).with_name("compare_digits.py")
SERVER_RATES = {
  "fedavg": 1.0,
  "fedavgm": 0.3,
  "fedadagrad": 0.03,
  "fedadam": 0.01,
  "fedyogi": 0.01,
}


def arm(partition: str, algorithm: str) -> dict:
  """Settings of one server, on clients dealt out in one way."""
  return {
    "algorithm": algorithm,
    "server": {"learning_rate": SERVER_RATES[algorithm]},
    "data": {"partition": partition},
  }


def get_config() -> ml_collections.ConfigDict:
  """Returns the comparison; see `fedfm/comparison.py`."""
  digits = runpy.run_path(str(_DIGITS))["get_config"]().to_dict()
  digits["client"]["learning_rate"] = 0.1
  digits["eval"]["every"] = 5
  return ml_collections.ConfigDict(
    {
      "base": digits | {"rounds": 15},
      "arms": {
        "iid, fedavg": arm("iid", "fedavg"),
        **{
          f"dirichlet, {name}": arm("dirichlet", name) for name in SERVER_RATES
        },
      },
      "seeds": (0, 1, 2),
      "tuning_seeds": (3,),
      "server_rates": (0.33, 1.0, 3.0, 10.0),
      "metric": "eval/test/accuracy",
      "higher_is_better": True,
      "columns": ("eval/test/loss",),
    }
  )
