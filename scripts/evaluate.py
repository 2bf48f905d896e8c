r"""Evaluates the newest checkpoint of a run, client by client.

  python scripts/evaluate.py --workdir=/tmp/run
  python scripts/evaluate.py --workdir=/tmp/run --per_client \
    --config.eval.max_examples=0

Prints, for each population, the mean and the 10th and 90th percentile over its
clients; with --per_client a row a client. `--config.FIELD=VALUE` changes a
field of the run's config, such as the mesh. The run's folder is only read, so
that this may run beside the training.
"""

import json
from typing import Any

from absl import flags

import command_line
from fedfm import evaluation, experiment, report

_WORKDIR = flags.DEFINE_string("workdir", None, "Run's folder.", required=True)
_PER_CLIENT = flags.DEFINE_bool("per_client", False, "A row a client.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON rather than a table.")


def main():
  opened, state = experiment.open_run(_WORKDIR.value, command_line.overrides())
  base = opened.algorithm.effective_base(state, opened.base)
  per_client = opened.evaluate_clients(state.trainable, base)
  in_bytes = opened.tokenizer.name == "bytes"
  rows = []
  for population, sums in per_client.items():
    metrics = evaluation.client_metrics(sums, in_bytes)
    if _PER_CLIENT.value:
      for index, client_id in enumerate(sums["ids"]):
        row: dict[str, Any] = {"population": population, "client": client_id}
        row["tokens"] = int(sums["tokens"][index])
        if row["tokens"]:
          row |= {name: float(x[index]) for name, x in metrics.items()}
        rows.append(row)
    else:
      summary = evaluation.summarise(sums, in_bytes)
      for name in metrics:
        row: dict[str, Any] = {"population": population, "metric": name}
        row["clients"] = len(sums["ids"])
        row["mean"] = summary.get(name)
        row["p10"] = summary.get(f"{name}_p10")
        row["p90"] = summary.get(f"{name}_p90")
        rows.append(row)
  if _JSON.value:
    print(json.dumps({"round": int(state.round), "rows": rows}, indent=2))
  else:
    print(f"round {int(state.round)}\n\n{report.table(rows)}")


if __name__ == "__main__":
  command_line.run(main)
