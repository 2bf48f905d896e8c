r"""Evaluates a run's newest checkpoint, or a model's folder, client by client.

  python scripts/evaluate.py --workdir=/tmp/run
  python scripts/evaluate.py --workdir=/tmp/run --per_client \
    --config.eval.max_examples=0
  python scripts/evaluate.py --model=DIR --config.data.name=jsonl \
    --config.data.path=texts.jsonl
  python scripts/evaluate.py --model=DIR --multiple_choice=questions.jsonl

Prints, for each population, the mean and the 10th and 90th percentile over its
clients; with --per_client a row a client. `--config.FIELD=VALUE` changes a
field of the run's config, such as the mesh; with --model, of the defaults, and
what is evaluated on are the populations that a run of that config holds out.
--multiple_choice and --exact_match name files of questions (see
`fedfm/questions.py`), on which the global model is evaluated too; where the
algorithm makes personal models, so is each client's on its own questions, as
personal_accuracy and so on. The run's folder is only read, so that this may run
beside the training.
"""

import functools
import json
import pathlib
from typing import Any

from absl import flags
import jax

import command_line
from fedfm import (
  blueprint,
  completion,
  data,
  errors,
  evaluation,
  experiment,
  model_folders,
  models,
  personalization,
  questions,
  report,
)
from fedfm.data import prompt_formats

_WORKDIR = flags.DEFINE_string("workdir", None, "Run's folder.")
_MODEL = flags.DEFINE_string("model", None, "Model's folder; not with workdir.")
_CHOICE = flags.DEFINE_string("multiple_choice", None, "File of questions.")
_EXACT = flags.DEFINE_string("exact_match", None, "File of questions.")
_TEMPLATE = flags.DEFINE_string(
  "template", "", "How to write questions: as data.template; '' as they are."
)
_NEW = flags.DEFINE_integer("max_new_tokens", 64, "Of an answer to match.")
_BATCH = flags.DEFINE_integer("batch_size", 16, "Choices or answers at once.")
_PER_CLIENT = flags.DEFINE_bool("per_client", False, "A row a client.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON rather than a table.")


def main():
  _check_flags()
  asked = {
    kind: questions.read(path, choices=kind == "multiple_choice")
    for kind, path in (
      ("multiple_choice", _CHOICE.value),
      ("exact_match", _EXACT.value),
    )
    if path is not None
  }
  rows: list[dict[str, Any]] = []
  round_index = 0
  if _MODEL.value is not None and not command_line.raw_overrides():
    _ask_folder(pathlib.Path(_MODEL.value), asked, rows)
  else:
    opened, state = _open()
    if not opened.data.evals and not asked:
      raise errors.ConfigError(
        "data.heldout_fraction: the data holds nothing out to evaluate "
        "on; expected it, data.unseen_fraction, or a file of questions"
      )
    round_index = int(state.round)
    if asked:
      completion.check_decoder(opened.model, opened.tokenizer)
    _evaluate(opened, state, rows)
    base = opened.algorithm.effective_base(state, opened.base)
    trainable = opened.algorithm.effective_trainable(state)
    with jax.set_mesh(opened.mesh):
      _ask(
        asked,
        rows,
        blueprint.model_folder(opened.settings),
        opened.tokenizer,
        opened.model,
        opened.loss,
        (trainable, base),
        opened.adapter.apply,
        _personal(opened, state),
      )
  if _JSON.value:
    text = json.dumps({"round": round_index, "rows": rows}, indent=2)
  elif _WORKDIR.value is None:
    text = report.table(rows)
  else:
    text = f"round {round_index}\n\n{report.table(rows)}"
  command_line.show(text)


def _check_flags():
  if (_WORKDIR.value is None) == (_MODEL.value is None):
    raise errors.ConfigError("--workdir: expected it, or --model")
  for name, value in (
    ("--batch_size", _BATCH.value),
    ("--max_new_tokens", _NEW.value),
  ):
    if value < 1:
      raise errors.ConfigError(f"{name}: got {value}, expected at least 1")
  if _MODEL.value is not None:
    command_line.check_path("--model", _MODEL.value)
  given = (*command_line.raw_overrides(), _CHOICE.value, _EXACT.value)
  if _MODEL.value is not None and not any(given):
    raise errors.ConfigError(
      "--model: got nothing to evaluate on, expected --config.data.* or "
      "--multiple_choice or --exact_match"
    )


def _open():
  """Opens the run, or makes one of the model's folder that did no round."""
  changes = command_line.overrides()
  if _WORKDIR.value is not None:
    return experiment.open_run(_WORKDIR.value, changes)
  changes.setdefault("model", {}).setdefault("path", _MODEL.value)
  # No round is run: its cohort is as small as can be.
  changes.setdefault("clients_per_round", 1)
  opened = experiment.build(changes)
  return opened, opened.initial_state()


def _evaluate(opened, state, rows):
  """Evaluates on the populations, with the clients' own models too."""
  base = opened.algorithm.effective_base(state, opened.base)
  trainable = opened.algorithm.effective_trainable(state)
  per_client = opened.evaluate_clients(trainable, base)
  personal = personalization.evaluate_personal(
    opened, state, opened.trainable, opened.base
  )
  for population, sums in per_client.items():
    metrics = evaluation.client_metrics(sums)
    summary = evaluation.summarise(sums)
    if population in personal:
      own = personal[population]
      for name, value in evaluation.client_metrics(own).items():
        metrics[f"personal_{name}"] = value
      for name, value in evaluation.summarise(own).items():
        summary[f"personal_{name}"] = value
    if _PER_CLIENT.value:
      for index, client_id in enumerate(sums["ids"]):
        row: dict[str, Any] = {"population": population, "client": client_id}
        row["tokens"] = int(sums["tokens"][index])
        if row["tokens"]:
          row |= {name: float(x[index]) for name, x in metrics.items()}
        rows.append(row)
    else:
      rows += _over_clients(population, len(sums["ids"]), metrics, summary)


def _over_clients(population, num_clients, names, summary):
  return [
    {
      "population": population,
      "metric": name,
      "clients": num_clients,
      "mean": summary.get(name),
      "p10": summary.get(f"{name}_p10"),
      "p90": summary.get(f"{name}_p90"),
    }
    for name in names
  ]


def _personal(opened, state):
  """Returns what gives a client's own model, or None."""
  if opened.algorithm.personal is None:
    return None
  return functools.partial(personalization.personal_model, opened, state)


def _ask_folder(folder, asked, rows):
  """Asks a model's folder, without any data."""
  model, params = model_folders.load(folder)
  tokenizer = data.load_tokenizer(folder)
  completion.check_decoder(model, tokenizer)
  if tokenizer.vocab_size > model.config.vocab_size:
    raise errors.ConfigError(
      f"--model: vocabulary of {model.config.vocab_size} is smaller than the "
      f"tokenizer's {tokenizer.vocab_size}"
    )
  loss = models.losses.language_model(
    lambda trainable, base, *args, **kw: model.apply(base, *args, **kw)
  )
  _ask(
    asked,
    rows,
    folder,
    tokenizer,
    model,
    loss,
    ((), params),
    lambda base, _, *args, **kw: model.apply(base, *args, **kw),
  )


def _ask(
  asked,
  rows,
  folder,
  tokenizer,
  model,
  loss,
  params,
  apply,
  personal=None,
):
  """Asks the questions of the files; `params` are (trainable, base)."""
  prompt_format = None
  if _TEMPLATE.value:
    prompt_format = prompt_formats.load(_TEMPLATE.value, folder)
  options = {"prompt_format": prompt_format, "batch_size": _BATCH.value}

  def choose(params, asked):
    return questions.multiple_choice(
      loss, params, tokenizer, model.config.max_length, asked, **options
    )

  def answer(params, asked):
    return questions.exact_match(
      model,
      apply,
      params[::-1],
      tokenizer,
      asked,
      max_new_tokens=_NEW.value,
      **options,
    )

  for kind, own in asked.items():
    ask = choose if kind == "multiple_choice" else answer
    results = ask(params, own)
    if personal is not None:
      found = questions.own(
        lambda trainable, asked, ask=ask: ask((trainable, params[1]), asked),
        own,
        personal,
      )
      found.pop("chance", None)
      results |= {f"personal_{name}": x for name, x in found.items()}
    ids, metrics = questions.by_client(own, results)
    if _PER_CLIENT.value:
      for index, client_id in enumerate(ids):
        row: dict[str, Any] = {"population": kind, "client": client_id}
        row["questions"] = sum(q.client == client_id for q in own)
        rows.append(row | {k: float(x[index]) for k, x in metrics.items()})
    else:
      summary = {}
      for name, values in metrics.items():
        found = report.percentiles(values)
        summary[name] = found["mean"]
        summary |= {f"{name}_{p}": found[p] for p in ("p10", "p90")}
      rows += _over_clients(kind, len(ids), metrics, summary)


if __name__ == "__main__":
  command_line.run(main)
