"""The default data set: complete, split without leaks, safe to build twice."""

import collections
import pathlib
import subprocess
import sys

import pytest

from fedfm import errors
from fedfm.data import python_stdlib

ROOT = pathlib.Path(__file__).parents[1]
SourceFile = python_stdlib.SourceFile


@pytest.fixture(scope="module")
def library():
  return python_stdlib.standard_library_files()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """Lets two processes build at once; both must succeed without a word."""
  folder = tmp_path_factory.mktemp("data")
  code = (
    "import sys; from fedfm.data import python_stdlib;"
    "data = python_stdlib.load(sys.argv[1]);"
    "print(len(data.train), 'tensorflow' in sys.modules)"
  )
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", code, folder / "deep" / "er"],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=ROOT,
    )
    for _ in range(2)
  ]
  outputs = [process.communicate() for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert outputs[0] == outputs[1]
  assert outputs[0][0].endswith(" False\n") and not outputs[0][1]
  return folder / "deep" / "er"


@pytest.fixture(scope="module")
def data(data_dir):
  return python_stdlib.load(data_dir)


def _texts(source):
  return {c: [t.decode() for t in source.read(c)["text"]] for c in source.ids}


def test_files_are_modules_of_the_library_only(library):
  clients = {file.client for file in library}
  assert {"json", "argparse", "email", "this"} <= clients
  assert not clients & {"test", "idlelib", "site-packages", "turtledemo"}
  assert not any("/tests/" in f.path or "_bundled" in f.path for f in library)
  assert all(
    f.path.split("/")[0] in (f.client, f"{f.client}.py") for f in library
  )
  assert library == sorted(library, key=lambda f: pathlib.PurePath(f.path))


def test_splits_lose_and_double_nothing(library):
  splits = python_stdlib.splits(library)
  size = collections.Counter()
  lines = collections.defaultdict(collections.Counter)
  for file in library:
    size[file.client] += len(file.text.encode())
    lines[file.client].update(file.text.splitlines())
  found = collections.defaultdict(collections.Counter)
  for documents in splits.values():
    for document in documents:
      found[document.client].update(document.text.splitlines())
      size[document.client] -= len(document.text.encode())
  left_out = set(lines) - set(found)
  assert all(size[c] == 0 and found[c] == lines[c] for c in found)
  assert all(0 < size[c] < 4096 for c in left_out)


def test_populations_do_not_overlap(library):
  splits = python_stdlib.splits(library)
  clients = {k: {d.client for d in v} for k, v in splits.items()}
  assert clients["train"] == clients["heldout"]
  assert not clients["train"] & clients["unseen"]
  assert 110 <= len(clients["train"]) <= 170
  # The choice by name alone: these are unseen on every Python.
  assert {"typing", "logging", "xml"} <= clients["unseen"]
  assert 15 <= len(clients["unseen"]) <= 35
  held_out, train = (
    sum(len(d.text) for d in splits[k]) for k in ("heldout", "train")
  )
  assert 0.15 < held_out / (held_out + train) < 0.25


def test_neighbouring_blocks_are_one_document():
  text = "".join(f"line {i:05d} of the only file\n" for i in range(1500))
  assert python_stdlib._unit_hash("unseen clients", "m") >= 0.15
  splits = python_stdlib.splits([SourceFile("m", "m.py", text)])
  kept, held = splits["train"], splits["heldout"]
  assert not splits["unseen"] and abs(len(kept) - len(held)) <= 1
  merged = sorted(d.text for d in kept + held)  # Lines are numbered.
  assert "".join(merged) == text
  assert all(d.text.endswith("\n") for d in kept + held)
  assert len(kept) > 1 and max(len(d.text) for d in kept) > 2 * 2048


def test_small_clients_keep_and_hold_out_at_least_a_block():
  for name in map("m{}".format, range(60)):
    text = "x = 1234567890\n" * 290  # 4350 bytes: two blocks.
    splits = python_stdlib.splits([SourceFile(name, f"{name}.py", text)])
    if not splits["unseen"]:
      assert len(splits["train"]) == len(splits["heldout"]) == 1
  tiny = python_stdlib.splits([SourceFile("m", "m.py", "x\n" * 1000)])
  one_line = python_stdlib.splits([SourceFile("m", "m.py", "x" * 9000)])
  assert not any(tiny.values()) and not any(one_line.values())


def test_load_reads_back_the_splits(library, data):
  splits = python_stdlib.splits(library)
  sources = {
    "train": data.train,
    "heldout": data.evals["seen"],
    "unseen": data.evals["unseen"],
  }
  assert data.evals.keys() == {"seen", "unseen"}
  for name, source in sources.items():
    expected = collections.defaultdict(list)
    for document in splits[name]:
      expected[document.client].append(document.text)
    assert _texts(source) == expected
    assert list(source.ids) == list(expected)


def test_building_leaves_nothing_else_and_is_keyed_by_release(data_dir, data):
  del data
  assert [p.name for p in data_dir.iterdir()] == ["python_stdlib"]
  release = "_".join(map(str, sys.version_info[:3]))
  (config,) = (data_dir / "python_stdlib").iterdir()
  assert config.name == f"{sys.implementation.name}_{release}"
  assert [p.name for p in config.iterdir()] == ["1.0.0"]


def test_data_dir_may_come_from_the_environment(data_dir, monkeypatch):
  monkeypatch.setenv("FEDFM_DATA_DIR", str(data_dir))
  assert "json" in python_stdlib.load().train.ids


def test_unusable_folders_are_named(tmp_path):
  file = tmp_path / "file"
  file.touch()
  with pytest.raises(errors.DataError) as error:
    python_stdlib.load(file)
  assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_damaged_files_are_named(data_dir, tmp_path):
  (made,) = (data_dir / "python_stdlib").glob("*/1.0.0")
  copy = tmp_path / made.relative_to(data_dir)
  copy.mkdir(parents=True)
  for path in made.glob("*.json"):
    (copy / path.name).write_bytes(path.read_bytes())
  with pytest.raises(errors.DataError) as error:
    python_stdlib.load(tmp_path)
  assert f"{copy}: damaged" in str(error.value)
  assert "\n" not in str(error.value)
