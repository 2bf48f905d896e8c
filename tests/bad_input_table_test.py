"""Every bad input of the command, by family: one line, and nothing happened.

Exit code 2, one line that names the field or the file, no program compiled, no
new folder, and an existing run left as it was, byte for byte.
"""

import json
import pathlib
import re
import shutil
import sys

from absl import flags
from bad_file_rows import CONFIG_FILES, DATA, RUNS, WEIGHTS
import bad_input_rows
from bad_input_rows import COMMANDS, CONFIG
import numpy as np
import pytest
import tiny
import train

import command_line
from fedfm import experiment, run_folder, settings

# What is done to arrays of images and labels, and what is said of it.
IMAGES = {
  "label too high": (lambda a: a["y_train"].put(0, 10), r"label 10, expected"),
  "label negative": (lambda a: a["y_test"].put(0, -1), r"label -1, expected"),
  "NaN": (
    lambda a: a["x_train"].put(0, np.nan),
    r"data.path: .*images.npz: .*'x'.*NaN",
  ),
  "infinity": (lambda a: a["x_test"].put(0, np.inf), r"'x'.*infinity"),
  "other size": (
    lambda a: a.update(x_train=np.zeros((9, 8, 8), np.float32)),
    r"'x' holds images of \[8, 8\], but the model's are \[28, 28, 1\]",
  ),
  "no labels": (lambda a: a.pop("y_train"), r"has no array y_train"),
  "other count": (
    lambda a: a.update(y_train=np.arange(8)),
    r"data.path: .*images.npz: .*'label'",
  ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Holds a model, data, and `run`, trained for a round."""
  root = tmp_path_factory.mktemp("tiny")
  with tiny.one_device():
    built = tiny.build(root, rounds=1, lanes="auto")
    experiment.run(tiny.variant(built), root / "run")
  return root


@pytest.fixture
def refused(folder, compiled, tmp_path, monkeypatch, capsys):
  """Returns a check that a command is refused with a line."""

  def check(message, *arguments, workdir=None, **changes):
    values = tiny.config(folder, **changes)
    file = tmp_path / "config.py"
    file.write_text(
      "import ml_collections\ndef get_config():\n"
      f"  return ml_collections.ConfigDict({values!r})\n"
    )
    existing = pathlib.Path(shutil.copytree(folder / "run", tmp_path / "old"))
    for place in (workdir, tmp_path / "new", existing):
      if place is None:
        continue
      before = tree(tmp_path)
      monkeypatch.setattr(command_line, "_OVERRIDES", [])
      command = [f"--config={file}", f"--workdir={place}", *arguments]
      monkeypatch.setattr(sys, "argv", ["train.py", *command])
      compiled.clear()
      with pytest.raises(SystemExit) as ended:
        command_line.run(train.main)
      flags.FLAGS.unparse_flags()
      out, err = capsys.readouterr()
      assert (ended.value.code, out) == (2, "")
      assert err.count("\n") == 1 and err.startswith("error: "), err
      if place is not existing:
        assert re.search(message, err), err
      assert not compiled
      assert tree(tmp_path) == before
      if workdir is not None:
        break

  return check


def tree(folder):
  return {
    p: p.read_bytes() if p.is_file() else None
    for p in sorted(folder.rglob("*"))
    if "__pycache__" not in p.parts
  }


@pytest.mark.parametrize("field", CONFIG)
def test_config(refused, field):
  refused(CONFIG[field], f"--config.{field}")


@pytest.mark.parametrize("arguments", COMMANDS)
def test_command(refused, arguments):
  refused(COMMANDS[arguments], *arguments)


@pytest.mark.parametrize("arguments", bad_input_rows.PRIVACY)
def test_privacy(refused, arguments):
  refused(bad_input_rows.PRIVACY[arguments], *arguments)


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_config_file(refused, tmp_path, name):
  content, message = CONFIG_FILES[name]
  (tmp_path / "bad").mkdir()
  file = tmp_path / "bad" / "config.py"
  file.write_text(content)
  refused(message, f"--config={file}")


@pytest.mark.parametrize("name", DATA)
def test_data(refused, tmp_path, name):
  content, message = DATA[name]
  path = tmp_path / "bad.jsonl"
  path.write_bytes(content)
  refused(message, data={"path": str(path)}, clients_per_round=1)


@pytest.mark.parametrize("name", IMAGES)
def test_images(refused, tmp_path, name):
  change, message = IMAGES[name]
  arrays = {
    "x_train": np.zeros((9, 28, 28), np.float32),
    "y_train": np.arange(9),
    "x_test": np.zeros((2, 28, 28), np.float32),
    "y_test": np.arange(2),
  }
  change(arrays)
  np.savez(tmp_path / "images.npz", **arrays)
  data = {
    "task": "classification",
    "name": "npz",
    "path": str(tmp_path / "images.npz"),
    "image_key": "x",
    "partition": "iid",
    "num_clients": 2,
  }
  cnn = pathlib.Path(__file__).parents[1] / "configs/models/small_cnn"
  refused(
    message,
    data=data,
    clients_per_round=1,
    model={"path": str(cnn), "init": "random"},
    adapter={"kind": "full"},
  )


@pytest.mark.parametrize("path", ["nowhere.jsonl", "", ".", "a\0b", "x" * 999])
def test_data_path(refused, path):
  refused(r"data.path: got|cannot be read", data={"path": path})


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(refused, folder, tmp_path, name):
  damage, message = WEIGHTS[name]
  model = pathlib.Path(shutil.copytree(folder / "model", tmp_path / "model"))
  damage(model)
  # The one line names the field, the folder, and what is wrong there.
  names = rf"^error: model\.path: (?=.*{re.escape(str(model))})"
  refused(rf"{names}(?=.*{message})", model={"path": str(model)})


@pytest.mark.parametrize("name", RUNS)
def test_existing_run(refused, folder, tmp_path, name):
  damage, message = RUNS[name]
  workdir = pathlib.Path(shutil.copytree(folder / "run", tmp_path / "run"))
  damage(workdir)
  same = json.loads((folder / "run" / "config.json").read_text())
  same["adapter"]["targets"] = tuple(same["adapter"]["targets"])
  refused(message, workdir=workdir, **same)


@pytest.mark.parametrize("kind", ["file", "below a file", "read-only", "live"])
def test_workdir(refused, folder, tmp_path, kind):
  (tmp_path / "thesis").write_text("years of work")
  if kind == "live":
    config = settings.to_dict(experiment.as_settings(tiny.config(folder)))
    with run_folder.claim(tmp_path / "run", config) as claimed:
      claimed.commit()
      refused(r"workdir: .* is being written by pro", workdir=tmp_path / "run")
    return
  workdir, message = {
    "file": (tmp_path / "thesis", r"workdir: .*thesis is a file"),
    "below a file": (tmp_path / "thesis" / "run", r"thesis is a file"),
    "read-only": (pathlib.Path("/proc/1/run"), r"workdir: /proc/1/run cannot"),
  }[kind]
  refused(message, workdir=workdir)


def test_ids_with_strange_characters_are_no_mistake(folder, tmp_path):
  """Ids never name a file, so any text is fine."""
  ids = ["../../etc", "a\0b", "x" * 300, "CON", "тест", "\n", "--help"]
  path = tmp_path / "strange.jsonl"
  rows = [{"client": i, "text": f"words of {i!r} " * 9} for i in ids]
  path.write_text("".join(json.dumps(r) + "\n" for r in rows * 3))
  with tiny.one_device():
    built = experiment.build(
      tiny.config(folder, data={"path": str(path)}, clients_per_round=4)
    )
  assert sorted(
    built.data.train.ids + built.data.evals["unseen"].ids
  ) == sorted(ids)
  assert built.cohort(0).num_lanes == 1
