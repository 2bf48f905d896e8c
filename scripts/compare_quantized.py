r"""Evaluates a config's base in floats, in int8 and in NF4, side by side.

  python scripts/compare_quantized.py --config=configs/quickstart.py

Nothing is trained: every population that is held out is evaluated with the
base as it is loaded, and with its kernels quantised. Prints a table of the mean
over clients and of the bytes that the base takes; `--config.FIELD=VALUE`
changes a field, such as `model.path` or `model.dtype`.
"""

from typing import Any

from absl import flags
import jax

import command_line
from fedfm import errors, experiment, report, trees
from fedfm.models import quantization

_CONFIG = flags.DEFINE_string("config", None, "Config file.", required=True)


def main():
  config = command_line.load_config(_CONFIG.value)
  model = config.get("model", {})
  if isinstance(model, dict) and model.get("quantize"):
    raise errors.ConfigError(
      f"model.quantize: got {model['quantize']!r}, but all kinds are "
      "compared here: leave it out"
    )
  opened = experiment.build(config)
  if opened.base is None:
    raise errors.ConfigError(
      "adapter.kind: got 'full', expected an adapter beside a base"
    )
  bases: dict[str, Any] = {opened.settings.model.dtype: opened.base}
  for kind in quantization.KINDS:
    leaves = iter(jax.tree.leaves(opened.base))
    bases[kind] = quantization.quantize(
      opened.model, kind, leaves, opened.mesh
    )[1]
  rows = []
  for name, base in bases.items():
    row: dict[str, Any] = {"base": name}
    row["megabytes"] = trees.num_bytes(base) / 1e6
    metrics = opened.evaluate(opened.trainable, base)
    # The float base of the first row is what the others are held to.
    for metric, value in metrics.items():
      if not metric.endswith(("_p10", "_p90")):
        row[metric.removeprefix("eval/")] = value
    rows.append(row)
  command_line.show(report.table(rows))


if __name__ == "__main__":
  command_line.run(main)
