"""Client sources: what they read, and what they refuse, with what message."""

import gzip
import json
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from reference import assert_one_line

from fedfm import errors
from fedfm.data import files, partition, source

ODD_IDS = ["../../etc/passwd", "a\0b", "x" * 300, "né\n", " "]


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


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


def test_whole_numbers_are_of_32_bits():
  high = np.iinfo(np.int32).max
  clients = source.from_arrays({"a": {"x": [high], "y": np.uint8([1])}})
  x = clients.read("a")["x"]
  assert (x.dtype, x.tolist()) == (np.int32, [high])
  assert clients.read("a")["y"].dtype == np.uint8
  with pytest.raises(ValueError, match="read-only"):
    x[0] = 0
  arrays = {"x": np.arange(4), "big": np.array([1, 2, 2**40, 4])}
  with pytest.raises(errors.DataError) as error:
    source.from_arrays({"a": arrays})
  assert_one_line(error, "client 'a': field 'big': ", str(2**40), "int32")
  with pytest.raises(errors.DataError, match="'big'"):
    partition.iid(arrays, 2)
  # What clients are told apart by is no field of theirs.
  by_key = partition.by_key(arrays, "big")
  assert [by_key.read(c)["x"].tolist() for c in by_key.ids[-1:]] == [[2]]
  with pytest.raises(errors.DataError, match=r"got list, expected {.*array}}$"):
    source.from_arrays([1])


def test_odd_ids_are_only_names():
  clients = source.from_arrays({c: {"x": [1.0]} for c in ODD_IDS})
  assert clients.ids == tuple(ODD_IDS)
  assert all(clients.size(c) == 1 for c in ODD_IDS)


@pytest.mark.parametrize("client_id", ["", 3, None, b"a", "\ud800"])
def test_bad_ids_are_refused(client_id):
  with pytest.raises(errors.DataError) as error:
    source.from_arrays({client_id: {"x": [1.0]}})
  assert_one_line(error, "client id")


def test_repeated_ids_are_refused():
  with pytest.raises(errors.DataError) as error:
    source.ClientSource(["a", "b", "a"], len, dict)
  assert_one_line(error, "'a'", "repeated")


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
  assert_one_line(error, *parts)


def test_no_clients_are_refused():
  with pytest.raises(errors.DataError, match="got none"):
    source.from_arrays({})


def test_unknown_client_names_the_nearest():
  clients = source.from_arrays({"client_1": {"x": [1]}})
  for method in (clients.read, clients.size, clients.index):
    with pytest.raises(errors.DataError) as error:
      method("client_l")
    assert_one_line(error, "'client_l'", "did you mean 'client_1'")


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


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_spread_covers_each_client_evenly(size, limit):
  full = source.from_arrays({"a": {"x": np.arange(size)}})
  few = source.spread(full, limit)
  rows = few.read("a")["x"]
  assert len(rows) == few.size("a") == min(size, limit)
  gaps = np.diff(rows)
  assert rows[0] == 0 and (gaps > 0).all()  # In order, none twice.
  if len(rows) > 1:
    assert rows[-1] == size - 1 and gaps.max() - gaps.min() <= 1
  with pytest.raises(errors.ConfigError, match="num_examples: got 0"):
    source.spread(full, 0)


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
  assert_one_line(error, f"{path}:3: ", *parts)


def test_unreadable_files_are_named(tmp_path):
  empty = tmp_path / "empty.jsonl"
  empty.write_text("\n")
  cut = tmp_path / "cut.jsonl.gz"
  cut.write_bytes(gzip.compress(b"x" * 1000)[:-12])
  plain = _write(tmp_path / "plain.jsonl.gz", [{"user": "a", "text": "t"}])
  for path in (empty, cut, plain, tmp_path / "none.jsonl", tmp_path):
    with pytest.raises(errors.DataError) as error:
      files.from_jsonl(path, "user", "text")
    assert_one_line(error, str(path))


def test_a_file_that_changed_after_indexing_is_noticed(tmp_path):
  path = _write(tmp_path / "a.jsonl", [{"user": "a", "text": "t"}] * 2)
  clients = files.from_jsonl(path, "user", "text")
  _write(path, [{"user": "b", "text": "t"}] * 2)
  with pytest.raises(errors.DataError, match="changed since"):
    clients.read("a")
  path.unlink()
  with pytest.raises(errors.DataError, match="No such file"):
    clients.read("a")


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
