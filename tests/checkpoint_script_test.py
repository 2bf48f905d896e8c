"""scripts/checkpoint.py and scripts/soak.py, as processes of their own."""

import re
import sys

from absl import flags
import jax
import numpy as np
import pytest
from script_runs import script
import tiny
import train  # noqa: F401 - its flags are those of every test here.

import command_line
from fedfm import experiment
from fedfm.models import huggingface


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(workdir, experiment, last state) of a run of two rounds."""
  folder = tmp_path_factory.mktemp("tiny")
  built = tiny.build(folder)
  _, state = experiment.run(built, folder / "run")
  return folder / "run", built, state


def test_the_checkpoints_of_a_run(run, tmp_path):
  workdir, built, state = run
  at = f"--workdir={workdir}"
  code, out, err = script("checkpoint.py", "list", at)
  assert code == 0, err
  assert re.findall(r"^\|\s+(\d+) \| 20", out, re.MULTILINE) == ["0", "1", "2"]
  code, out, err = script(
    "checkpoint.py", "export", at, f"--output={tmp_path / 'model'}"
  )
  assert code == 0, err
  model, params = huggingface.load(tmp_path / "model")
  tokens = np.arange(12)[None]
  expected = built.adapter.apply(built.base, state.trainable, tokens)
  start = built.model.apply(built.base, tokens)
  got = model.apply(params, tokens)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
  assert np.abs(np.asarray(got - start)).max() > 0
  jax.tree.map(lambda x: None, params)


def test_verify_names_what_is_damaged(run):
  workdir, _, _ = run
  for file in (workdir / "checkpoints" / "1").rglob("d/*"):
    file.write_bytes(file.read_bytes()[:-3])
  before = sorted(workdir.rglob("*"))
  code, out, err = script("checkpoint.py", "verify", f"--workdir={workdir}")
  assert code == 2
  lines = out.splitlines()
  assert [line.split(":")[1][:8] for line in lines] == [
    " every d",
    " damaged",
    " every d",
  ]
  (line,) = err.splitlines()
  assert line.endswith("1 of 3 checkpoints are damaged: [1]")
  assert sorted(workdir.rglob("*")) == before


def test_a_folder_without_checkpoints_is_one_line():
  code, out, err = script("checkpoint.py", "list", "--workdir=nowhere")
  (line,) = err.splitlines()
  assert (code, out) == (2, "")
  assert line == "error: nowhere/checkpoints: not a folder of checkpoints"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "arguments: got no command, expected one of list, verify, export"),
    (["lst"], "arguments: got 'lst' (did you mean 'list'?)"),
    (["list", "more"], "arguments: 'more' is not a flag"),
  ],
)
@pytest.mark.usefixtures("no_required_flags")
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, message):
  monkeypatch.setattr(command_line, "_OVERRIDES", [])
  required = ["--config=none.py", "--workdir=none"]  # By `train`'s flags.
  argv = ["checkpoint.py", *arguments, *required]
  monkeypatch.setattr(sys, "argv", argv)
  with pytest.raises(SystemExit) as ended:
    command_line.run(pytest.fail, ("list", "verify", "export"))
  flags.FLAGS.unparse_flags()
  assert ended.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line


# Clients whose states are on the host, whose data drifts, and who drop out.
# Rounds that run again draw the same noise, and are charged once.
PRIVATE = {
  "sampler": "poisson",
  "rounds": 30,
  "privacy": {
    "kind": "gaussian",
    "clip_norm": 0.1,
    "epsilon": 8.0,
    "accountant": "rdp",  # Quicker at every start.
  },
}
DRIFTING = {
  "algorithm": "ditto",
  "client": {"store": "host", "batch_size": 2, "local_steps": 3},
  "data": {
    "schedule": "phases",
    "schedule_options": {"num_phases": 2, "rounds_each": 30},
  },
  "realism": {"availability": 0.8, "dropout": 0.2, "deadline": 1e3},
  "checkpoint": {"every": 2, "keep_best": "eval/seen/personal_loss"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("changes", "kills"), [({}, 12), (DRIFTING, 6), (PRIVATE, 3)]
)
def test_kills_change_no_bit(tmp_path, changes, kills):
  values = tiny.config(
    tmp_path,
    **(
      {
        "rounds": 60,
        "lanes": 1,
        "adapter": {"rank": 2, "targets": ("q_proj",)},
        "eval": {"every": 20},
        "checkpoint": {"every": 2},
      }
      | changes
    ),
  )
  file = tmp_path / "config.py"
  file.write_text(
    "import ml_collections\n"
    f"def get_config():\n  return ml_collections.ConfigDict({values!r})\n"
  )
  code, out, err = script(
    "soak.py",
    f"--kills={kills}",
    f"--config={file}",
    f"--workdir={tmp_path / 'a'}",
  )
  assert code == 0, out + err
  assert f"{kills} kills over" in out and "bit for bit the same" in out
  lost = [int(row.split("|")[-2]) for row in out.splitlines() if "start" in row]
  assert all(x <= 2 for x in lost)
  assert re.search(r"at most [0-2] rounds were lost", out)
  if changes is DRIFTING:
    at = f"--workdir={tmp_path / 'a' / 'killed-1'}"
    code, out, err = script("checkpoint.py", "verify", at)
    assert code == 0 and "every digest is right" in out, out + err
    code, out, err = script("checkpoint.py", "list", at)
    assert code == 0 and "clients' states: " in out, out + err
