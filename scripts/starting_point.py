r"""Measures the survey's first claim: a pretrained start helps federation.

  python scripts/starting_point.py
  python scripts/starting_point.py --algorithms=fedavg,fedavgm,fedadam \
    --trainables=full,lora --seeds=0,1,2,3,4
  python scripts/starting_point.py --partitions=iid,dirichlet \
    --config.data.name=jsonl --config.data.path=FILE --config.data.label_key=L

Every combination of start (pretrained, random), partition (iid with the same
client sizes, natural, or dirichlet over a label), algorithm and trainable, for
all seeds. Prints a row for each: rounds to target (what the random start
reaches at the end on iid clients), the last loss, the gap from iid to non-iid
clients, the cosine and the diversity of the clients' updates. LoRA starts from
pretrained weights only: beside random ones it could not learn. Writes table.md,
results.json and a plot a trainable into --output; finished arms are not run
again.
"""

import itertools
import json

from absl import flags
import numpy as np

import command_line
from fedfm import comparison, errors, report
import output_folder

_CONFIG = flags.DEFINE_string(
  "config", "configs/starting_point.py", "Config file."
)
_OUTPUT = flags.DEFINE_string("output", "runs/starting_point", "Folder.")
_ALGORITHMS = flags.DEFINE_list(
  "algorithms", ["fedavg", "fedadam"], "fedavg, fedavgm, fedadam."
)
_TRAINABLES = flags.DEFINE_list("trainables", ["full"], "full, lora.")
_PARTITIONS = flags.DEFINE_list(
  "partitions", ["iid", "natural"], "iid, natural, dirichlet."
)
_SEEDS = flags.DEFINE_list("seeds", [], "Instead of the config's.")
_STARTS = ("random", "pretrained")
_METRIC = "eval/unseen/loss"


def check_list(name, values, known):
  for value in values:
    if value not in known:
      raise errors.ConfigError(
        f"--{name}: got {value!r}{errors.nearest(value, known)}"
      )


def arms(values):
  """Returns {(trainable, start, algorithm, partition): changes}."""
  found = {}
  for trainable, start, algorithm, partition in itertools.product(
    _TRAINABLES.value, _STARTS, _ALGORITHMS.value, _PARTITIONS.value
  ):
    if trainable == "lora" and start == "random":
      continue
    rate = values["client_rates"]["lora" if trainable == "lora" else start]
    found[trainable, start, algorithm, partition] = {
      "algorithm": algorithm,
      "model": {"init": start},
      "adapter": {"kind": trainable},
      "data": {"partition": partition},
      "client": {"learning_rate": rate},
      "server": {"learning_rate": values["server_rates"][algorithm]},
    }
  return found


def last(runs):
  return [one["lines"][-1][_METRIC] for one in runs]


def target_of(results):
  """What the random start reaches on iid clients at the best, or None."""
  ends = [
    np.mean(last(runs))
    for (_, start, _, partition), runs in results.items()
    if (start, partition) == ("random", "iid")
  ]
  return float(min(ends)) if ends else None


def mean_of(runs, metric):
  return float(
    np.mean([x[metric] for one in runs for x in one["lines"] if metric in x])
  )


def rows(results, compared):
  """Makes a row of each arm."""
  made = []
  for key, runs in results.items():
    trainable, start, algorithm, partition = key
    row = {
      "trainable": trainable,
      "start": start,
      "algorithm": algorithm,
      "clients": partition,
      "loss": comparison.spread(last(runs)),
    }
    iid = results.get((trainable, start, algorithm, "iid"))
    if iid and partition != "iid":
      gaps = [a - b for a, b in zip(last(runs), last(iid))]
      row["gap to iid"] = comparison.spread(gaps)
    if compared.target is not None:
      reached = [
        comparison.rounds_to_target(compared, one["lines"]) for one in runs
      ]
      known = [r for r in reached if r is not None]
      row["rounds to target"] = (
        comparison.spread(known) if len(known) == len(runs) else "not reached"
      )
    row["cosine"] = mean_of(runs, "drift/cosine")
    row["diversity"] = mean_of(runs, "drift/diversity")
    made.append(row)
  return made


def plot(folder, results, compared):
  """Draws loss over rounds: a file a trainable, a panel an algorithm."""
  for trainable in dict.fromkeys(key[0] for key in results):
    panels = []
    for algorithm in dict.fromkeys(key[2] for key in results):
      chosen = {
        f"{start}, {partition}": runs
        for (t, start, a, partition), runs in results.items()
        if (t, a) == (trainable, algorithm)
      }
      panels.append(
        report.Panel(
          comparison.curves(compared, chosen),
          "round",
          "loss on unseen clients, nats a byte",
          algorithm,
        )
      )
    report.plot_lines(folder / f"{trainable}.png", *panels)


def main():
  values = command_line.read_config(_CONFIG.value)
  check_list("algorithms", _ALGORITHMS.value, values["server_rates"])
  check_list("trainables", _TRAINABLES.value, ("full", "lora"))
  check_list("partitions", _PARTITIONS.value, ("iid", "natural", "dirichlet"))
  keyed = arms(values)
  names = {key: ", ".join(key) for key in keyed}
  compared = comparison.from_dict(
    {
      "base": command_line.overrides(values["base"]),
      "arms": {names[key]: changes for key, changes in keyed.items()},
      "seeds": _SEEDS.value or values["seeds"],
      "metric": _METRIC,
    }
  )
  folder = output_folder.check("--output", _OUTPUT.value)
  by_name = comparison.run(compared, folder)
  results = {key: by_name[name] for key, name in names.items()}
  compared = compared._replace(target=target_of(results))
  table = report.table(rows(results, compared))
  if compared.target is not None:
    table += f"\n\ntarget: a loss of {compared.target:.3f}"
  (folder / "table.md").write_text(table + "\n")
  (folder / "results.json").write_text(json.dumps(by_name) + "\n")
  plot(folder, results, compared)
  command_line.show(
    f"\n{table}\n\nwrote {folder}/: table.md, results.json, plots"
  )


if __name__ == "__main__":
  command_line.run(main)
