"""Runs on prompts and responses, and on tokens, by config; and bad input."""

import json
import pathlib
import re
import sys

from absl import flags
import jax
import numpy as np
import pytest
import tiny

from fedfm import blueprint, errors, experiment, model_folders, population

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import train  # noqa: E402

import command_line  # noqa: E402

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def rows(client):
  words = tiny.WORDS.split()
  return [
    {
      "instruction": f"word {i}",
      "context": "of the text" * (i % 2),
      "response": words[(client + i) % len(words)],
      "category": "qa",
    }
    for i in range(4 + client)
  ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A model, and files as dolly's."""
  folder = tmp_path_factory.mktemp("instructions")
  tiny.write_model(folder / "model")
  for client in range(3):
    file = folder / f"local_training_{client}.json"
    file.write_text(json.dumps(rows(client)))
  (folder / "global_test.json").write_text(json.dumps(rows(5)))
  with open(folder / "tokens.jsonl", "w", encoding="utf-8") as file:
    for i in range(8):
      row = {"client": f"c{i % 4}", "ids": list(range(i, i + 12))}
      file.write(json.dumps(row) + "\n")
  return folder


def config(folder, **changes):
  """The config file's, made small."""
  values = command_line.read_config(
    str(ROOT / "configs" / "instruction_tuning.py")
  )
  small = {
    "rounds": 1,
    "clients_per_round": 2,
    "lanes": 1,
    "model": {"path": str(folder / "model")},
    "adapter": {"rank": 2, "targets": ("q_proj",)},
    "data": {"path": str(folder), "sequence_length": 64},
    "client": {"batch_size": 2, "local_steps": 2},
    "eval": {"batch_size": 2},
  }
  for name, value in (small | changes).items():
    merge = isinstance(value, dict) and name in values
    values[name] = values[name] | value if merge else value
  return values


def test_the_config_trains_on_files(folder, tmp_path):
  with tiny.one_device():
    summary = experiment.train(config(folder), tmp_path / "run")
  assert summary["rounds"] == 1
  for population_name in ("seen", "test"):
    for metric in ("loss", "bits_per_byte"):
      value = summary["final"][f"eval/{population_name}/{metric}"]
      assert np.isfinite(value) and value > 0


def load(folder, **data):
  settings = experiment.as_settings(config(folder, data=data))
  model = model_folders.read_config(blueprint.model_folder(settings))
  return population.load(settings, model).data


def test_files_of_the_test_are_no_clients(folder):
  small = {"path": str(folder), "sequence_length": 64, "files": "*.json"}
  found = load(folder, **small)
  assert found.train.ids == tuple(f"local_training_{i}" for i in range(3))
  assert found.evals["test"].ids == ("global_test",)
  total = sum(len(row["response"]) for row in rows(5))
  assert found.evals["test"].read("global_test")["num_bytes"].sum() == total
  apart = load(folder, **small, packed=False)
  assert apart.evals["test"].size("global_test") == len(rows(5))


def test_rows_without_clients_are_dealt_out(folder, tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text("\n".join(map(json.dumps, rows(20))))
  found = load(
    folder,
    name="jsonl",
    path=str(path),
    test_files="",
    client_key="",
    context_key="",
    partition="iid",
    num_clients=3,
    sequence_length=64,
  )
  assert len(found.train) == 3 and found.evals["seen"].ids == ("all",)


def test_tokens_are_read_as_they_are(folder):
  tokens = {
    "name": "jsonl",
    "path": str(folder / "tokens.jsonl"),
    "test_files": "",
    "prompt_key": "",
    "token_key": "ids",
    "heldout_fraction": 0.5,
    "sequence_length": 16,
  }
  with tiny.one_device():
    built = experiment.build(config(folder, data=tokens))
    values = built.evaluate(built.trainable)
  assert "eval/seen/loss" in values
  assert "eval/seen/bits_per_byte" not in values  # Of what text, none knows.
  for change, message in (
    ({"sequence_length": 8}, "'c0': field 'ids': example 0 has shape"),
    ({"token_key": "idz"}, "tokens.jsonl:1: key 'idz' is missing.*'ids'"),
  ):
    with pytest.raises(errors.DataError, match=message):
      load(folder, **(tokens | change))
  path = folder / "large.jsonl"
  path.write_text('{"client": "z", "ids": [1, 272]}\n')
  with pytest.raises(
    errors.DataError, match="'z': field 'ids' holds token 272"
  ):
    load(folder, **(tokens | {"path": str(path)}))


BAD = {
  "data.prompt_key=instrucion": r"row 0: key 'instrucion' .*'instruction'",
  "data.files=nothing*": r"holds no file 'nothing\*'",
  "data.path=": r"data.path: got '', but data.name 'files' expects a folder",
  "data.template=alpacca": r"data.template: got 'alpacca' .*'alpaca'",
  "data.token_key=ids": r"data.token_key: got 'ids', but data.prompt_key",
  "data.response_key=": r"data.response_key: got ''",
  "data.name=jsonl": r"data.test_files: got 'global_test.json', but data.name",
  "data.name=python_stdlib": r"data.prompt_key: got 'instruction', but",
  "data.sequence_length=3": r"data.sequence_length: got 3, expected at least 4",
}


@pytest.mark.parametrize("change", BAD)
def test_bad_input_is_one_line(folder, tmp_path, change, monkeypatch, capsys):
  compilations = []

  def count(event, duration, **kwargs):
    if event == COMPILE_EVENT:
      compilations.append(duration)

  jax.monitoring.register_event_duration_secs_listener(count)
  argv = [
    "train.py",
    f"--config={ROOT / 'configs' / 'instruction_tuning.py'}",
    f"--workdir={tmp_path / 'run'}",
    f"--config.model.path={folder / 'model'}",
    f"--config.data.path={folder}",
    "--config.data.sequence_length=64",
    f"--config.{change}",
  ]
  monkeypatch.setattr(sys, "argv", argv)
  monkeypatch.setattr(command_line, "_OVERRIDES", [])
  flags.FLAGS.unparse_flags()
  try:
    with pytest.raises(SystemExit) as e:
      command_line.run(train.main)
  finally:
    jax.monitoring.unregister_event_duration_listener(count)
  out, err = capsys.readouterr()
  (line,) = err.splitlines()
  assert (e.value.code, out, compilations) == (2, "", [])
  assert re.search(BAD[change], line), line
  assert not (tmp_path / "run").exists()
