"""Every mistake in a file or folder ends in one line, and leaves it alone."""

import json

import pytest
import tiny

import command_line
from fedfm import errors, experiment, run_folder, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tiny")


GOOD = json.dumps({"client": "ann", "text": "a good line"})


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    ("{not json", r"bad.jsonl:2: not JSON"),
    ("[1, 2]", r"bad.jsonl:2: got a JSON list, expected an object"),
    ('{"client": "bob"}', r"bad.jsonl:2: key 'text' is missing"),
    ('{"client": 3, "text": "x"}', r"bad.jsonl:2: 'client' is int"),
    ('{"client": "", "text": "x"}', r"bad.jsonl:2: 'client' is empty"),
    ('{"client": "bob", "text": ""}', r"bad.jsonl: client 'bob': .*no text"),
  ],
)
def test_bad_data_names_file_and_line(folder, compiled, bad, message):
  path = folder / "bad.jsonl"
  path.write_text(f"{GOOD}\n{bad}\n{GOOD}\n")
  config = tiny.config(folder, data={"path": str(path)}, clients_per_round=1)
  compiled.clear()
  with pytest.raises(errors.DataError, match=message) as error:
    experiment.train(config, folder / "run")
  assert "\n" not in str(error.value)
  assert not compiled


def files(workdir):
  return {p: p.read_bytes() for p in sorted(workdir.rglob("*")) if p.is_file()}


def test_a_folder_of_another_run_is_refused_untouched(folder, compiled):
  config = tiny.config(folder)
  workdir = folder / "other"
  stored = settings.to_dict(experiment.as_settings(config | {"seed": 3}))
  with run_folder.claim(workdir, stored) as claimed:
    claimed.commit()
  (workdir / "metrics.jsonl").write_text('{"round": 0}\n')
  before = files(workdir)
  compiled.clear()
  with pytest.raises(errors.ConfigError) as error:
    experiment.train(config | {"algorithm": "fedadam"}, workdir)
  message = str(error.value)
  assert "\n" not in message
  assert "seed: had 3, now 0" in message
  assert 'algorithm: had "fedavg", now "fedadam"' in message
  assert files(workdir) == before and not compiled


@pytest.mark.parametrize("kind", ["file", "below a file", "not a run"])
def test_a_workdir_that_is_no_run(folder, tmp_path, compiled, kind):
  config = tiny.config(folder)
  (tmp_path / "thesis.txt").write_text("years of work")
  workdir, message = {
    "file": (tmp_path / "thesis.txt", "is a file"),
    "below a file": (tmp_path / "thesis.txt" / "run", "is a file"),
    "not a run": (tmp_path, "not empty .has 'thesis.txt'"),
  }[kind]
  before = files(tmp_path)
  compiled.clear()
  with pytest.raises(errors.CheckpointError, match=message):
    experiment.train(config, workdir)
  assert files(tmp_path) == before and not compiled


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("", r"has no get_config"),
    ("def get_config(:\n", r"failed: SyntaxError: "),
    ("import nowhere\n", r"failed: ModuleNotFoundError: .*nowhere"),
    ("raise ValueError('a\\nb')\n", r"failed: ValueError: a"),
    ("def get_config():\n  return {}.x\n", r"failed: AttributeError"),
    ("def get_config():\n  return {}\n", r"returned dict, expected a Config"),
    ("raise SystemExit(0)\n", r"failed: SystemExit"),
    (
      "from ml_collections import config_dict as c\ndef get_config():\n"
      "  return c.ConfigDict({'rounds': c.required_placeholder(int)})\n",
      r"failed: RequiredValueError",
    ),
  ],
)
def test_a_bad_config_file_is_named(tmp_path, content, message):
  file = tmp_path / "config.py"
  file.write_text(content)
  with pytest.raises(errors.ConfigError, match=message) as error:
    command_line.load_config(str(file))
  assert str(error.value).startswith("--config: ")
  assert str(file) in str(error.value)


@pytest.mark.parametrize(
  ("name", "message"),
  [("missing.py", "is not a file"), ("config.json", "expected a .py file")],
)
def test_what_is_not_a_config_file(tmp_path, name, message):
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(errors.ConfigError, match=message):
    command_line.load_config(str(tmp_path / name))
