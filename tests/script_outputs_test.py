"""Where scripts write: a folder of their own, and a standard output that ends.

What is there already is never written over, a path that cannot be written is
named before anything is computed, and nobody reading on is no mistake.
"""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from script_runs import ROOT, here
import tiny

import command_line
from fedfm import errors, experiment
from fedfm.models import huggingface
import output_folder

LONG = "a" * 300
COMMANDS = {"checkpoint.py": ("list", "verify", "export")}
CHECKS = (output_folder.check, output_folder.check_new)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The folder of a run, beside that of its model."""
  folder = tmp_path_factory.mktemp("tiny")
  built = tiny.build(folder, rounds=1)
  (folder / "model" / "tokenizer_config.json").write_text("{}")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(os, "fsync", lambda file: None)  # Nothing cuts the power.
    experiment.run(built, folder / "run")
  return folder / "run"


def files(folder):
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
  ("name", "arguments"),
  [
    ("checkpoint.py", ["export", "--workdir={run}", "--output={run}"]),
    ("checkpoint.py", ["export", "--workdir={run}", "--output={model}"]),
    ("export.py", ["--workdir={run}", "--output={model}", "--format=peft"]),
    ("convert.py", ["--model={model}", "--output={model}"]),
  ],
)
def test_what_is_there_is_not_written_over(run, name, arguments):
  names = {"run": run, "model": run.parent / "model"}
  arguments = [a.format(**names) for a in arguments]
  before = files(run.parent)
  code, out, err = here(name, *arguments, commands=COMMANDS.get(name, ()))
  output = arguments[-1] if "output" in arguments[-1] else arguments[-2]
  message = f"error: --output: {output.partition('=')[2]} is not empty\n"
  assert (code, out, err) == (2, "", message)
  assert files(run.parent) == before


def test_an_export_of_a_checkpoint_has_the_tokenizer(run, tmp_path):
  output = tmp_path / "merged"
  with tiny.one_device():
    code, out, err = here(
      "checkpoint.py",
      "export",
      f"--workdir={run}",
      f"--output={output}",
      commands=COMMANDS["checkpoint.py"],
    )
  assert (code, out) == (0, f"round 1 written to {output}\n"), err
  assert (output / "tokenizer_config.json").read_text() == "{}"
  with tiny.one_device():
    opened, state = experiment.open_run(run)
  tokens = np.arange(12)[None]
  model, params = huggingface.load(output)
  np.testing.assert_allclose(
    model.apply(params, tokens),
    opened.adapter.apply(opened.base, state.trainable, tokens),
    rtol=1e-4,
    atol=1e-5,
  )


@pytest.mark.parametrize("path", [LONG, "/dev/null", "/dev/null/x", "a\0b"])
@pytest.mark.parametrize("check", CHECKS)
def test_a_path_that_cannot_be_a_folder_is_named(check, path):
  with pytest.raises(errors.ConfigError, match="^--output: ") as error:
    check("--output", path)
  assert path.partition("\0")[0] in str(error.value)


def test_a_folder_to_go_on_with_may_hold_something(tmp_path):
  (tmp_path / "table.md").write_text("x")
  assert output_folder.check("--output", tmp_path) == tmp_path
  assert output_folder.check_new("--output", tmp_path / "new").name == "new"
  with pytest.raises(errors.ConfigError, match="is not empty"):
    output_folder.check_new("--output", tmp_path)


@pytest.mark.parametrize(
  ("name", "arguments", "field"),
  [
    ("train.py", [f"--workdir={LONG}", "--config=c.py"], "--workdir"),
    ("train.py", ["--workdir=new", f"--config={LONG}.py"], "--config"),
    ("checkpoint.py", ["list", f"--workdir={LONG}"], "--workdir"),
    ("evaluate.py", [f"--workdir={LONG}"], "workdir"),
    ("evaluate.py", [f"--model={LONG}", "--exact_match=q"], "--model"),
    ("generate.py", [f"--model={LONG}", "--prompt=x"], "--model"),
    ("convert.py", [f"--model={LONG}", "--output=new"], "--model"),
    ("export.py", ["--workdir=none", "--output=/dev/null/x"], "--output"),
    ("compare.py", ["--config=arms.py", "--output=/dev/null"], "--output"),
    ("soak.py", ["--workdir=/dev/null/x"], "--workdir"),
  ],
)
def test_scripts_name_the_path(tmp_path, monkeypatch, name, arguments, field):
  (tmp_path / "arms.py").write_text(
    "import ml_collections\ndef get_config():\n"
    "  return ml_collections.ConfigDict("
    "{'arms': {'a': {}}, 'seeds': [0], 'metric': 'train/loss'})\n"
  )
  monkeypatch.chdir(tmp_path)
  code, out, err = here(name, *arguments, commands=COMMANDS.get(name, ()))
  assert (code, out) == (2, "") and err.count("\n") == 1, err
  assert err.startswith(f"error: {field}"), err
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
  ("values", "arguments", "message"),
  [
    ("{'base': {}}", ["--arms=x"], "--arms: got 'x'"),
    ("{'arms': 3}", [], "arms: got 3, expected fields"),
    ("{'arms': 3}", ["--arms=x"], "arms: got 3, expected fields"),
    ("{'base': 3}", ["--config.rounds=3"], "base: got 3, expected fields"),
  ],
)
def test_a_comparison_without_arms_is_one_line(
  tmp_path, values, arguments, message
):
  file = tmp_path / "config.py"
  file.write_text(
    "import ml_collections\ndef get_config():\n"
    f"  return ml_collections.ConfigDict({values})\n"
  )
  code, out, err = here("compare.py", f"--config={file}", *arguments)
  assert (code, out, err.count("\n")) == (2, "", 1) and message in err, err


def test_a_number_for_the_model_group_is_one_line(tmp_path):
  file = tmp_path / "config.py"
  file.write_text(
    "import ml_collections\ndef get_config():\n"
    "  return ml_collections.ConfigDict({'model': 3})\n"
  )
  code, out, err = here("compare_quantized.py", f"--config={file}")
  assert (code, out) == (2, "")
  assert err == "error: model: got 3, expected fields\n"


def test_scripts_print_by_show_alone():
  for path in sorted((ROOT / "scripts").glob("*.py")):
    if path.name != "command_line.py":
      assert not re.search(r"(?<![\w.])print\(", path.read_text()), path


SHOWS = """
import sys
import command_line
def main():
  for _ in range(3):
    command_line.show("\\u00e9" * 9)
command_line.run(main)
"""


def shown(stdout, **env):
  """Runs a script that prints; returns (exit code, what it printed, errors)."""
  process = subprocess.run(
    [sys.executable, "-c", SHOWS],
    env=os.environ
    | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])}
    | env,
    stdout=stdout,
    stderr=subprocess.PIPE,
    check=False,
  )
  return process.returncode, process.stdout, process.stderr.decode()


def test_nobody_reading_on_is_no_mistake():
  read, write = os.pipe()
  os.close(read)
  assert shown(write) == (0, None, "")
  os.close(write)


def test_a_full_disk_below_standard_output_is_code_3():
  with open("/dev/full", "wb") as full:
    code, _, err = shown(full)
  assert code == 3
  assert err == "error: standard output: No space left on device\n"


def test_text_that_the_terminal_has_no_letters_for_is_shown_all_the_same():
  code, out, err = shown(subprocess.PIPE, PYTHONIOENCODING="ascii")
  assert (code, err) == (0, "")
  assert out.decode() == 3 * ("\\xe9" * 9 + "\n")


@pytest.fixture
def ended(monkeypatch, capsys):
  """Returns what a script comes to that raises an error: its code and line."""
  monkeypatch.setattr(command_line.flags, "FLAGS", lambda argv: argv[:1])
  monkeypatch.setattr(command_line, "_start_processes", lambda: None)
  monkeypatch.setattr(sys, "argv", ["train.py"])

  def run_raising(error):
    def main():
      raise error

    with pytest.raises(SystemExit) as left:
      command_line.run(main)
    return left.value.code, capsys.readouterr().err

  return run_raising


@pytest.mark.parametrize(
  ("error", "code", "line"),
  [
    (FileNotFoundError(2, "No such file", "a/b"), 2, "a/b: No such file"),
    (OSError(28, "No space left", "a/b"), 3, "a/b: No space left"),
    (OSError(28, "No space left"), 3, "a file: No space left"),
    (MemoryError("4 TiB for an array"), 3, "out of memory: 4 TiB for an array"),
  ],
)
def test_errors_of_the_machine_are_one_line(ended, error, code, line):
  assert ended(error) == (code, f"error: {line}\n")


def test_an_error_of_no_file_is_a_bug(ended):
  with pytest.raises(OSError, match="Invalid argument"):
    ended(OSError(22, "Invalid argument"))
