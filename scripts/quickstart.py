r"""Federates LoRA on the standard library and sets it beside three baselines.

  bash scripts/quickstart.sh
  python scripts/quickstart.py --workdir=runs/other --config.rounds=20

Prints a table (bits per byte on held-out text, for the clients that trained and
for clients never seen), text generated before and after, and writes both, a
plot and the run itself into the folder. Started again, it goes on from there.
"""

import math
import time

from absl import flags
import jax
import jax.numpy as jnp

import command_line
from fedfm import baselines, completion, errors, experiment, report
from fedfm import metrics as metrics_lib
import output_folder

_CONFIG = flags.DEFINE_string("config", "configs/quickstart.py", "Config file.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Run's folder.")
_LOCAL_CLIENTS = flags.DEFINE_integer(
  "local_clients", 8, "Clients of local-only."
)
_LOCAL_STEPS = flags.DEFINE_integer("local_steps", 8, "Their local steps.")
_BASELINE_RATE = flags.DEFINE_float(
  "baseline_rate",
  0.01,
  "Learning rate of centralized and local-only, tuned on their own.",
)
_PROMPT = flags.DEFINE_string("prompt", "def main(", "Text to continue.")
_METRIC = "bits_per_byte"
_POPULATIONS = ("seen", "unseen")


def row(name, values):
  """A row of the table: mean, 10th and 90th percentile by population."""
  cells = {"": name}
  for population in _POPULATIONS:
    key = f"eval/{population}/{_METRIC}"
    if key not in values:
      continue
    cells[population] = f"{values[key]:.3f}"
    cells[f"{population} p10-p90"] = (
      f"{values[key + '_p10']:.2f}-{values[key + '_p90']:.2f}"
    )
  return cells


def plot(folder, lines, centralized):
  """Draws bits per byte over rounds and over megabytes sent."""
  sent, megabytes = 0, []
  for line in lines:
    sent += line.get("comm/bytes_up", 0) + line.get("comm/bytes_down", 0)
    megabytes.append(sent / 1e6)
  evaluated = [i for i, line in enumerate(lines) if "eval/unseen/loss" in line]
  trained = [i for i, line in enumerate(lines) if "train/loss" in line]

  def panel(x, xlabel):
    bits = {
      f"{p} clients": [lines[i][f"eval/{p}/{_METRIC}"] for i in evaluated]
      for p in _POPULATIONS
    }
    at = [x[i] for i in evaluated]
    series = {name: (at, ys) for name, ys in bits.items()}
    series["training"] = (
      [x[i] for i in trained],
      [lines[i]["train/loss"] / math.log(2) for i in trained],
    )
    level = centralized[f"eval/unseen/{_METRIC}"]
    series["centralized, unseen clients"] = ([x[0], x[-1]], [level] * 2)
    return report.Panel(series, xlabel, "bits per byte")

  report.plot_lines(
    folder / "loss.png",
    panel([line["round"] for line in lines], "round"),
    panel(megabytes, "megabytes sent, up and down"),
  )


def main():
  began = time.perf_counter()

  def say(text):
    command_line.show(f"[{time.perf_counter() - began:4.0f} s] {text}")

  folder = output_folder.check("--workdir", _WORKDIR.value)
  say("loading the base and the clients")
  built = experiment.build(command_line.load_config(_CONFIG.value))
  missing = [p for p in _POPULATIONS if p not in built.data.evals]
  if missing:
    raise errors.ConfigError(
      f"data: got no population {' and '.join(map(repr, missing))} held out, "
      "expected both; see data.heldout_fraction and data.unseen_fraction"
    )
  base = built.initial_state().trainable
  say(
    f"federating {built.adapter.kind} over {len(built.data.train)} clients, "
    f"{built.settings.clients_per_round} a round"
  )
  summary, state = experiment.run(built, folder)
  lines = metrics_lib.read(folder)
  tokens = sum(line.get("train/count", 0) for line in lines)
  c = built.settings.client
  batch_tokens = c.batch_size * (built.settings.data.sequence_length - 1)

  steps = max(1, round(tokens / batch_tokens))
  say(f"centralized: {steps} steps, as many tokens as were federated")
  rate = _BASELINE_RATE.value
  centralized = built.evaluate(baselines.centralized(built, steps, rate))

  ids = sorted(built.data.evals["seen"].ids)
  ids = ids[:: max(1, len(ids) // _LOCAL_CLIENTS.value)][: _LOCAL_CLIENTS.value]
  say(f"local only: {len(ids)} clients, {_LOCAL_STEPS.value} steps each")
  stacked = baselines.local_only(built, ids, _LOCAL_STEPS.value, rate)
  local = baselines.evaluate_each(built, ids, stacked)
  untrained = jax.tree.map(lambda x: jnp.stack([x] * len(ids)), base)
  start = baselines.evaluate_each(built, ids, untrained, ("seen",))

  table = report.table(
    [
      row("base", summary["base"]),
      row(f"base, the {len(ids)} of local only", start),
      row("local only", local),
      row("federated", summary["final"]),
      row("centralized", centralized),
    ]
  )
  after_base = built.algorithm.effective_base(state, built.base)
  after = (after_base, built.algorithm.effective_trainable(state))
  assert built.tokenizer is not None  # The quickstart is about text.
  text = {
    name: completion.generate_text(
      built.model,
      params,
      built.tokenizer,
      _PROMPT.value,
      apply=built.adapter.apply,
      max_new_tokens=160,
      temperature=0.5,
      top_p=0.9,
    )
    for name, params in (("before", (built.base, base)), ("after", after))
  }
  plot(folder, lines, centralized)
  samples = "\n".join(
    f"--- {name} ---\n{_PROMPT.value}{added}\n" for name, added in text.items()
  )
  (folder / "table.md").write_text(table + "\n")
  (folder / "samples.txt").write_text(samples)
  key = f"eval/unseen/{_METRIC}"
  start, end = summary["base"][key], summary["final"][key]
  say(
    f"bits per byte on held-out text, mean over clients\n\n{table}\n\n"
    f"unseen clients: {1 - end / start:.1%} below the base, "
    f"{(start - end) / (start - centralized[key]):.0%} of the gain of "
    f"centralized training\n\n{samples}"
  )
  say(f"wrote {folder}/: table.md, samples.txt, loss.png, and the run")


if __name__ == "__main__":
  command_line.run(main)
