"""The scripts that read a run, as processes of their own."""

import json
import re

import jax
from make_encoder_fixtures import FIXTURES as ENCODERS
import pytest
from script_runs import script
import tiny

from fedfm import completion, data, errors, experiment
from fedfm.models import huggingface


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(folder, summary) of a finished run on two devices."""
  folder = tmp_path_factory.mktemp("tiny")
  config = tiny.config(folder, rounds=1)
  with tiny.one_device():
    return folder / "run", experiment.train(config, folder / "run")


def folder_state(folder):
  return {
    str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))
  }


def test_evaluate_prints_what_the_run_measured(run):
  workdir, summary = run
  before = folder_state(workdir)
  code, out, err = script("evaluate.py", f"--workdir={workdir}", "--json")
  assert code == 0, err
  printed = json.loads(out)
  assert printed["round"] == 1
  got = {
    f"eval/{row['population']}/{row['metric']}{suffix}": row[column]
    for row in printed["rows"]
    for suffix, column in (("", "mean"), ("_p10", "p10"), ("_p90", "p90"))
  }
  assert got == pytest.approx(summary["final"], rel=1e-6)
  assert folder_state(workdir) == before


@pytest.mark.slow
def test_evaluate_prints_a_row_a_client(run):
  workdir, _ = run
  code, out, err = script(
    "evaluate.py",
    f"--workdir={workdir}",
    "--per_client",
    "--config.eval.max_examples=0",
  )
  assert code == 0, err
  clients = re.findall(r"^\| (\w+) +\| (client \d+) ", out, re.MULTILINE)
  assert len(clients) == len(set(clients)) == 10
  assert {population for population, _ in clients} == {"seen", "unseen"}


@pytest.mark.slow
def test_evaluate_asks_a_run_and_a_folder(run, tmp_path):
  workdir, _ = run
  path = tmp_path / "questions.jsonl"
  rows = [
    {"question": "the", "choices": ["cat", "dog"], "answer": i % 2}
    | ({"client": "one"} if i else {})
    for i in range(3)
  ]
  path.write_text("\n".join(map(json.dumps, rows)))
  ask = (f"--multiple_choice={path}", "--per_client", "--json")
  for what in (f"--workdir={workdir}", f"--model={workdir.parent / 'model'}"):
    code, out, err = script("evaluate.py", what, *ask)
    assert code == 0, err
    rows = json.loads(out)["rows"]
    rows = [row for row in rows if row["population"] == "multiple_choice"]
    assert [row["client"] for row in rows] == ["all", "one"]
    assert [row["questions"] for row in rows] == [1, 2]
    assert rows[1]["accuracy"] == rows[1]["chance"] == 0.5


@pytest.mark.parametrize("kind", ["multiple_choice", "exact_match"])
def test_a_model_that_is_no_decoder_is_asked_nothing(kind, tmp_path):
  path = tmp_path / "questions.jsonl"
  row = {"question": "the", "choices": ["cat", "dog"], "answer": "B"}
  path.write_text(json.dumps(row))
  name = "vit" if kind == "multiple_choice" else "bert_masked_lm"
  code, out, err = script(
    "evaluate.py", f"--model={ENCODERS / name}", f"--{kind}={path}"
  )
  (line,) = err.splitlines()
  assert (code, out) == (2, "") and "generates no text, expected a dec" in line


def test_generate_continues_with_the_run_and_with_a_folder(run):
  workdir, _ = run
  arguments = ("--prompt=the cat", "--max_new_tokens=5", "--temperature=1")
  code, out, err = script("generate.py", f"--workdir={workdir}", *arguments)
  assert code == 0, err
  assert out.startswith("the cat") and len(out) > len("the cat\n")
  model = workdir.parent / "model"
  model, params = huggingface.load(model)
  expected = completion.generate_text(
    model,
    (params,),
    data.byte_tokenizer(),
    "the cat",
    max_new_tokens=5,
    temperature=1.0,
  )
  code, out, err = script(
    "generate.py", f"--model={workdir.parent / 'model'}", *arguments
  )
  assert (code, out) == (0, f"the cat{expected}\n"), err


@pytest.mark.parametrize(
  ("name", "arguments", "message"),
  [
    ("evaluate.py", ["--workdir=nowhere"], "nowhere holds no config.json"),
    ("evaluate.py", [], "--workdir: expected it, or --model"),
    ("generate.py", ["--base"], "--base: needs --workdir"),
  ],
)
def test_mistakes_are_one_line(name, arguments, message):
  code, out, err = script(name, *arguments)
  (line,) = err.splitlines()
  assert (code, out) == (2, "") and message in line


def test_evaluating_what_holds_nothing_out_is_one_line(run):
  code, out, err = script(
    "evaluate.py",
    f"--workdir={run[0]}",
    "--config.data.unseen_fraction=0",
    "--config.data.heldout_fraction=0",
  )
  (line,) = err.splitlines()
  assert (code, out) == (2, "") and "holds nothing out to evaluate" in line


def test_an_adapter_changes_what_is_generated(run):
  workdir, _ = run
  with tiny.one_device():
    opened, state = experiment.open_run(workdir)

  def text(trainable):
    return completion.generate_text(
      opened.model,
      (opened.base, trainable),
      opened.tokenizer,
      "the cat",
      apply=opened.adapter.apply,
      max_new_tokens=20,
    )

  # One round of a random model changes too little to be seen.
  changed = jax.tree.map(lambda x: x + 5, state.trainable)
  assert text(changed) == text(changed) != text(opened.trainable)


def test_bad_options_of_generation_are_named(tmp_path):
  model, params = huggingface.load(tiny.write_model(tmp_path / "model"))

  def generate(**options):
    completion.generate_text(
      model,
      (params,),
      data.byte_tokenizer(),
      "prompt",
      **({"max_new_tokens": 5} | options),
    )

  for options, message in (
    ({"max_new_tokens": 58}, "prompt of 7 tokens, .* longest sequence is 64"),
    ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
    ({"seed": -1}, "seed: got -1"),
    ({"temperature": -1.0}, "temperature: got -1.0"),
    ({"temperature": 1.0, "top_p": 0.0}, "top_p: got 0.0"),
  ):
    with pytest.raises(errors.ConfigError, match=message):
      generate(**options)
  few = tiny.write_model(tmp_path / "few", vocab_size=256)
  model, params = huggingface.load(few)
  with pytest.raises(errors.DataError, match="vocabulary of 256"):
    generate()
