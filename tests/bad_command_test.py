"""Every mistake on a command line ends with exit code 2 and one line."""

import os
import pathlib
import re
import subprocess
import sys

from absl import flags
import pytest
import tiny
import train

import command_line
from fedfm import errors

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tiny")


@pytest.fixture
def command(folder, tmp_path, monkeypatch):
  """Returns a function from extra arguments to a whole command line."""
  file = tmp_path / "config.py"
  file.write_text(
    "import ml_collections\ndef get_config():\n"
    f"  return ml_collections.ConfigDict({tiny.config(folder)!r})\n"
  )
  monkeypatch.setattr(command_line, "_OVERRIDES", [])
  yield lambda *arguments: [
    str(ROOT / "scripts" / "train.py"),
    f"--config={file}",
    f"--workdir={tmp_path / 'run'}",
    *arguments,
  ]
  flags.FLAGS.unparse_flags()


COMMANDS = [
  ("--round=3", r"Unknown command line flag 'round'"),
  ("extra", r"'extra' is not a flag"),
  ("--config.rounds", r"--config.rounds: got no value"),
  ("--config=", r"--config: '' is not a file"),
  ("--config.round=3", r"round: unknown field .*'rounds'"),
  ("--config.client.lr=3", r"client.lr: unknown field"),
  ("--config.rounds.x=3", r"rounds.x: unknown field"),
  ("--config.rounds=3.5", r"rounds: got '3.5', expected int"),
  ("--config.rounds=0", r"rounds: got 0, expected at least 1"),
  ("--config.mesh.clients=two", r"mesh.clients: got 'two', expected int"),
  ("--config.mesh=3", r"mesh: got '3', expected fields"),
  ("--config.model.scan_layers=maybe", r"model.scan_layers: got 'maybe'"),
  ("--config.client.learning_rate=nan", r"client.learning_rate: got nan"),
  ("--config.lanes=12", r"lanes: mesh.clients = 8 does not divide 12 lanes"),
  ("--process_id=0", r"--coordinator, --num_processes and --process_id go"),
]


@pytest.mark.parametrize(("argument", "message"), COMMANDS)
def test_a_bad_command_ends_with_code_2(
  command, tmp_path, monkeypatch, capsys, argument, message
):
  monkeypatch.setattr(sys, "argv", command(argument))
  with pytest.raises(SystemExit) as ended:
    command_line.run(train.main)
  assert ended.value.code == 2
  out, err = capsys.readouterr()
  assert not out and err.count("\n") == 1
  assert re.match(f"error: .*{message}", err)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["config", "workdir"])
def test_a_required_flag_is_named(command, monkeypatch, capsys, flag):
  argv = [a for a in command() if not a.startswith(f"--{flag}")]
  monkeypatch.setattr(sys, "argv", argv)
  with pytest.raises(SystemExit) as ended:
    command_line.run(train.main)
  assert ended.value.code == 2
  assert f"--{flag}" in capsys.readouterr().err


def test_a_field_in_place_of_a_group_is_named(tmp_path, monkeypatch):
  file = tmp_path / "config.py"
  file.write_text(
    "import ml_collections\ndef get_config():\n"
    "  return ml_collections.ConfigDict({'data': 3})\n"
  )
  monkeypatch.setattr(command_line, "_OVERRIDES", [("data.path", "x")])
  with pytest.raises(errors.ConfigError, match="data.path: .* data = 3"):
    command_line.load_config(str(file))


def run_script(argv):
  return subprocess.run(
    [sys.executable, *argv],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )


def test_a_real_process_prints_one_line(command, tmp_path):
  process = run_script(command("--config.adapter.rank=17"))
  assert process.returncode == 2 and not process.stdout
  (line,) = process.stderr.splitlines()
  assert line.startswith("error: adapter.rank: got 17, expected 1 to 16")
  assert not (tmp_path / "run").exists()


def test_help_is_no_mistake(command, tmp_path):
  process = run_script(command("--help"))
  assert process.returncode == 0 and not process.stderr
  assert "--workdir" in process.stdout and "resumes" in process.stdout
  assert not (tmp_path / "run").exists()
