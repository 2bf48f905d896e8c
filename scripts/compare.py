r"""Compares algorithms on the same clients and budget, over several seeds.

  python scripts/compare.py --config=configs/compare_lora_aggregation.py
  python scripts/compare.py --config=... --arms=fedit,rolora --seeds=0,1 \
    --config.rounds=4

The config file's `get_config()` gives `base` settings, `arms` that differ from
them, `seeds` and a `metric`; see `fedfm/comparison.py`. `--config.FIELD=VALUE`
changes a field of the base settings. Writes table.md, results.json and
comparison.png into --output; arms that it holds already are not run again.
"""

import json
import pathlib

from absl import flags

import command_line
from fedfm import comparison, errors, report
import output_folder

_CONFIG = flags.DEFINE_string("config", None, "Config file.", required=True)
_OUTPUT = flags.DEFINE_string("output", "", "Folder; default runs/CONFIG.")
_ARMS = flags.DEFINE_list("arms", [], "Only these arms.")
_SEEDS = flags.DEFINE_list("seeds", [], "Instead of the config's.")


def load():
  """Returns the comparison that the flags ask for."""
  values = command_line.read_config(_CONFIG.value)
  for name in ("base", "arms", "own_metrics"):
    if not isinstance(values.get(name, {}), dict):
      raise errors.ConfigError(f"{name}: got {values[name]!r}, expected fields")
  values["base"] = command_line.overrides(values.get("base", {}))
  if _ARMS.value:
    for name in _ARMS.value:
      if name not in values.get("arms", {}):
        hint = errors.nearest(name, values.get("arms", {}))
        raise errors.ConfigError(f"--arms: got {name!r}{hint}")
    for field in ("arms", "own_metrics"):
      every = values.get(field, {})
      values[field] = {
        name: every[name] for name in _ARMS.value if name in every
      }
  if _SEEDS.value:
    try:
      values["seeds"] = [int(seed) for seed in _SEEDS.value]
    except ValueError:
      raise errors.ConfigError(
        f"--seeds: got {','.join(_SEEDS.value)}, expected numbers"
      ) from None
  return comparison.from_dict(values)


def write(folder, compared, results):
  """Writes the table and the plots; returns the table."""
  table = report.table(comparison.summarise(compared, results))
  (folder / "table.md").write_text(table + "\n")
  (folder / "results.json").write_text(json.dumps(results) + "\n")
  report.plot_lines(
    folder / "comparison.png",
    *(
      report.Panel(
        comparison.curves(compared, results, over), label, compared.metric
      )
      for over, label in (
        ("round", "round"),
        ("megabytes", "megabytes sent, up and down"),
      )
    ),
  )
  return table


def main():
  compared = load()
  name = pathlib.Path(_CONFIG.value).stem
  folder = output_folder.check("--output", _OUTPUT.value or f"runs/{name}")
  results = comparison.run(compared, folder)
  command_line.show("\n" + write(folder, compared, results))
  command_line.show(
    f"\nwrote {folder}/: table.md, results.json, comparison.png"
  )


if __name__ == "__main__":
  command_line.run(main)
