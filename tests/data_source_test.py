"""Client sources: what they read, and what they refuse, with what message."""

import gzip
import json
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from fedfm import errors
from fedfm.data import files, source

ODD_IDS = ["../../etc/passwd", "a\0b", "x" * 300, "né\n", " "]


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def _assert_one_line(error, *parts):
  message = str(error.value)
  assert "\n" not in message
  for part in parts:
    assert part in message


def test_from_arrays_reads_back_what_was_given_and_protects_it():
  x = np.arange(6, dtype=np.float32).reshape(3, 2)
  clients = source.from_arrays(
    {
      "b": {"x": x, "y": [1, 2, 3]},
      "a": {"x": x[:1], "y": [4]},
    }
  )
  assert clients.ids == ("b", "a") and len(clients) == 2
  assert [clients.size(c) for c in clients.ids] == [3, 1]
  assert clients.index("a") == 1
  np.testing.assert_array_equal(clients.read("b")["x"], x)
  np.testing.assert_array_equal(clients.read("a")["y"], [4])
  with pytest.raises(ValueError, match="read-only"):
    clients.read("b")["x"][0] = 0
  x[0] = 9  # The caller's own array stays writable.


def test_odd_ids_are_only_names():
  clients = source.from_arrays({c: {"x": [1.0]} for c in ODD_IDS})
  assert clients.ids == tuple(ODD_IDS)
  assert all(clients.size(c) == 1 for c in ODD_IDS)


@pytest.mark.parametrize("client_id", ["", 3, None, b"a", "\ud800"])
def test_bad_ids_are_refused(client_id):
  with pytest.raises(errors.DataError) as error:
    source.from_arrays({client_id: {"x": [1.0]}})
  _assert_one_line(error, "client id")


def test_repeated_ids_are_refused():
  with pytest.raises(errors.DataError) as error:
    source.ClientSource(["a", "b", "a"], len, dict)
  _assert_one_line(error, "'a'", "repeated")


def test_text_and_bfloat16_are_examples_too():
  clients = source.from_arrays(
    {
      "a": {"text": ["one", "three"], "x": np.ones(2, ml_dtypes.bfloat16)},
      "b": {"text": ["longer text"], "x": np.ones(1, ml_dtypes.bfloat16)},
    }
  )
  assert clients.read("a")["text"].tolist() == ["one", "three"]


@pytest.mark.parametrize(
  "bad, parts",
  [
    ({}, ["'bad'", "fields"]),
    ({"x": np.zeros([0, 2])}, ["'bad'", "0 examples"]),
    ({"x": 3.0}, ["'bad'", "'x'", "scalar"]),
    ({"x": [[1.0], [1.0, 2.0]]}, ["'bad'", "'x'", "shape"]),
    ({"x": [[1.0, np.nan]]}, ["'bad'", "'x'", "example 0", "NaN"]),
    ({"x": [[1.0, 1.0], [1.0, np.inf]]}, ["'bad'", "'x'", "example 1"]),
    ({"x": np.array([object()])}, ["'bad'", "'x'", "objects"]),
    ({"x": np.zeros(1, "datetime64[s]")}, ["'bad'", "'x'", "datetime64"]),
    ({"x": np.zeros([1, 3])}, ["'bad'", "'x'", "[3]", "[2]", "'good'"]),
    ({"x": np.zeros([1, 2], np.int8)}, ["'bad'", "int8", "float64"]),
    ({"y": np.zeros([1, 2])}, ["'bad'", "'y'", "'x'", "'good'"]),
    (
      {"x": np.zeros([1, 2]), "y": np.zeros(2)},
      ["'bad'", "'x': 1", "'y': 2"],
    ),
  ],
)
def test_from_arrays_refuses(bad, parts):
  with pytest.raises(errors.DataError) as error:
    source.from_arrays({"good": {"x": np.zeros([3, 2])}, "bad": bad})
  _assert_one_line(error, *parts)


def test_no_clients_are_refused():
  with pytest.raises(errors.DataError, match="got none"):
    source.from_arrays({})


def test_unknown_client_names_the_nearest():
  clients = source.from_arrays({"client_1": {"x": [1]}})
  for method in (clients.read, clients.size, clients.index):
    with pytest.raises(errors.DataError) as error:
      method("client_l")
    _assert_one_line(error, "'client_l'", "did you mean 'client_1'")


def test_subset_keeps_the_order_asked_for():
  clients = source.from_arrays({c: {"x": [i]} for i, c in enumerate("abcd")})
  chosen = source.subset(clients, ["d", "b"])
  assert chosen.ids == ("d", "b")
  assert chosen.read("b")["x"].tolist() == [1]
  with pytest.raises(errors.DataError, match="'a' is not one of"):
    chosen.read("a")
  with pytest.raises(errors.DataError, match="'e' is not one of"):
    source.subset(clients, ["a", "e"])
  with pytest.raises(errors.DataError, match="repeated"):
    source.subset(clients, ["a", "a"])


def test_sources_are_read_lazily():
  calls = []
  clients = source.ClientSource(
    ("a", "b"), lambda c: 1, lambda c: calls.append(c) or {"x": [1]}
  )
  clients.size("a")
  source.subset(clients, ["b"]).read("b")
  assert calls == ["b"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_from_jsonl_groups_by_client_in_file_order(tmp_path, suffix):
  rows = [("b", "β\n1"), ("a", ""), ("b", "2\r\n"), (ODD_IDS[0], "3")]
  rows.append(("a", "4"))  # Only a client without any text is refused.
  path = tmp_path / f"data{suffix}"
  lines = [json.dumps({"user": u, "text": t, "n": 1}) for u, t in rows]
  lines.insert(2, "   ")  # A blank line, and no newline at the end.
  data = "\n".join(lines).encode()
  path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
  clients = files.from_jsonl(path, "user", "text")
  assert clients.ids == ("b", "a", ODD_IDS[0])
  assert [clients.size(c) for c in clients.ids] == [2, 2, 1]
  assert clients.read("b")["text"].tolist() == ["β\n1", "2\r\n"]
  assert clients.read("a")["text"].tolist() == ["", "4"]


@pytest.mark.parametrize(
  "line, parts",
  [
    (b'{"user": "a", "text": "cut', ["not JSON"]),
    (b"[1, 2]", ["list", "object"]),
    (b'{"user": "a"}', ["'text'", "missing"]),
    (b'{"usr": "a", "text": ""}', ["'user'", "did you mean 'usr'"]),
    (b'{"user": 3, "text": ""}', ["'user'", "int", "string"]),
    (b'{"user": "a", "text": null}', ["'text'", "NoneType", "string"]),
    (b'{"user": "", "text": ""}', ["'user'", "empty"]),
    (b'{"user": "a", "text": "\\ud800"}', ["'text'", "surrogate"]),
    (b'{"user": "a", "text": "\xff"}', ["not UTF-8", "byte 23"]),
    (b"[" * 100_000, ["not JSON"]),
  ],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_bad_lines_are_named(tmp_path, line, parts, compress):
  path = tmp_path / ("a.jsonl" if compress is bytes else "a.jsonl.gz")
  path.write_bytes(compress(b'{"user": "a", "text": "t"}\n\n' + line + b"\n"))
  with pytest.raises(errors.DataError) as error:
    files.from_jsonl(path, "user", "text")
  _assert_one_line(error, f"{path}:3: ", *parts)


def test_unreadable_files_are_named(tmp_path):
  empty = tmp_path / "empty.jsonl"
  empty.write_text("\n")
  cut = tmp_path / "cut.jsonl.gz"
  cut.write_bytes(gzip.compress(b"x" * 1000)[:-12])
  plain = _write(tmp_path / "plain.jsonl.gz", [{"user": "a", "text": "t"}])
  for path in (empty, cut, plain, tmp_path / "none.jsonl", tmp_path):
    with pytest.raises(errors.DataError) as error:
      files.from_jsonl(path, "user", "text")
    _assert_one_line(error, str(path))


def test_a_file_that_changed_after_indexing_is_noticed(tmp_path):
  path = _write(tmp_path / "a.jsonl", [{"user": "a", "text": "t"}] * 2)
  clients = files.from_jsonl(path, "user", "text")
  _write(path, [{"user": "b", "text": "t"}] * 2)
  with pytest.raises(errors.DataError, match="changed since"):
    clients.read("a")
  path.unlink()
  with pytest.raises(errors.DataError, match="No such file"):
    clients.read("a")


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
  """Builds a data set in both formats' folders; returns the good one."""
  tfds = pytest.importorskip("tensorflow_datasets")

  class FedfmToy(tfds.core.GeneratorBasedBuilder):
    """Three clients with numbers, text and a ragged field."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
      features = {
        "user": tfds.features.Text(),
        "number": np.int64,
        "x": tfds.features.Tensor(shape=(2,), dtype=np.float32),
        "text": tfds.features.Text(),
        "ragged": tfds.features.Sequence(np.int64),
      }
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i in range(30):
        yield (
          i,
          {
            "user": "abc"[i % 3],
            "number": i % 2,
            "x": np.full(2, i, np.float32),
            "text": f"té{i}",
            "ragged": list(range(i)),
          },
        )

  folder = tmp_path_factory.mktemp("tfds")
  tfds.disable_progress_bar()
  FedfmToy(data_dir=folder, file_format="array_record").download_and_prepare()
  return folder


def test_from_tfds_groups_by_client(tfds_dir):
  clients = files.from_tfds(
    "fedfm_toy", "train", "user", tfds_dir, fields=["x", "text"]
  )
  assert sorted(clients.ids) == ["a", "b", "c"]
  assert [clients.size(c) for c in "abc"] == [10, 10, 10]
  rows = clients.read("b")
  assert rows.keys() == {"x", "text"}
  assert rows["x"].dtype == np.float32 and rows["x"].shape == (10, 2)
  assert sorted(rows["x"][:, 0]) == list(range(1, 30, 3))
  assert rows["text"][0] == f"té{rows['x'][0, 0]:.0f}".encode()


def test_from_tfds_takes_integer_clients_and_slices(tfds_dir):
  clients = files.from_tfds(
    "fedfm_toy", "train[:20]", "number", tfds_dir, fields=["x"]
  )
  assert sorted(clients.ids) == ["0", "1"]
  assert sum(clients.size(c) for c in clients.ids) == 20


@pytest.mark.parametrize(
  "changes, parts",
  [
    ({"name": "no_such_data"}, ["'no_such_data'"]),
    ({"split": "tran"}, ["'tran'", "train"]),
    ({"client_key": "usr"}, ["'usr'", "did you mean 'user'"]),
    ({"fields": ["txt"]}, ["'txt'", "did you mean 'text'"]),
    ({"client_key": "x"}, ["record 0", "ndarray"]),
    ({"name": "mnist"}, ["not prepared", "array_record"]),
  ],
)
def test_from_tfds_refuses(tfds_dir, changes, parts):
  arguments = {"name": "fedfm_toy", "split": "train", "client_key": "user"}
  with pytest.raises(errors.DataError) as error:
    files.from_tfds(**(arguments | changes), data_dir=tfds_dir)
  _assert_one_line(error, *parts)


def test_from_tfds_refuses_ragged_fields_when_read(tfds_dir):
  clients = files.from_tfds("fedfm_toy", "train", "user", tfds_dir)
  with pytest.raises(errors.DataError) as error:
    clients.read("a")
  _assert_one_line(error, "'a'", "'ragged'", "shape")


def test_from_tfds_says_what_it_cannot_read_without_tensorflow(
  tfds_dir, tmp_path
):
  made = tfds_dir / "fedfm_toy" / "1.0.0"
  copy = tmp_path / "fedfm_toy" / "1.0.0"
  copy.mkdir(parents=True)
  for file in made.iterdir():
    text = file.read_bytes()
    if file.suffix == ".json":
      text = text.replace(b"array_record", b"tfrecord")
    (copy / file.name.replace("array_record", "tfrecord")).write_bytes(text)
  with pytest.raises(errors.DataError) as error:
    files.from_tfds("fedfm_toy", "train", "user", tmp_path)
  _assert_one_line(error, "tfrecord", "without TensorFlow", "array_record")


def test_from_tfds_says_when_files_are_damaged(tfds_dir, tmp_path):
  made = tfds_dir / "fedfm_toy" / "1.0.0"
  copy = tmp_path / "fedfm_toy" / "1.0.0"
  copy.mkdir(parents=True)
  for file in made.iterdir():
    data = file.read_bytes()
    cut = data if file.suffix == ".json" else data[: len(data) // 2]
    (copy / file.name).write_bytes(cut)
  with pytest.raises(errors.DataError) as error:
    files.from_tfds("fedfm_toy", "train", "user", tmp_path, fields=["x"])
  _assert_one_line(error, "fedfm_toy")


def test_importing_sources_does_not_import_tfds():
  code = (
    "import sys; from fedfm.data import files, python_stdlib, source;"
    "print([m for m in ('tensorflow_datasets', 'tensorflow') if m in"
    " sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
    cwd=pathlib.Path(__file__).parents[1],
  )
  assert done.stdout.strip() == "[]" and not done.stderr
