"""Files of JSON, one or many: rows with several texts, or with tokens."""

import gzip
import json

import pytest

from fedfm import data, errors

KEYS = ("ask", "about", "say")
ROWS = [
  {"ask": "a", "about": "", "say": "b", "more": 1},
  {"ask": "c", "about": "d", "say": "e", "more": 2},
]


def write(folder, **files):
  """Writes rows, a text, or bytes to each file."""
  for name, content in files.items():
    name, dot, suffix = name.rpartition("_")
    path = folder / f"{name}.{suffix}"
    if isinstance(content, list) and suffix == "json":
      content = json.dumps(content)
    elif isinstance(content, list):
      content = "\n".join(map(json.dumps, content))
    path.write_text(content)
  return folder


def test_every_file_is_a_client(tmp_path):
  write(tmp_path, part_10_json=ROWS, part_2_jsonl=ROWS[:1], other_json=[])
  source = data.from_files(tmp_path, "part_*", KEYS, required=("ask", "say"))
  assert source.ids == ("part_2", "part_10")
  assert [source.size(i) for i in source.ids] == [1, 2]
  read = source.read("part_10")
  assert {k: x.tolist() for k, x in read.items()} == {
    "ask": ["a", "c"],
    "about": ["", "d"],
    "say": ["b", "e"],
  }
  write(tmp_path, part_2_jsonl=ROWS)
  with pytest.raises(errors.DataError, match="got 2 rows, expected 1"):
    source.read("part_2")


@pytest.mark.parametrize(
  "files, message",
  [
    ({}, "holds no file"),
    ({"a_json": []}, "a.json: got no rows"),
    ({"a_json": "{}"}, "a.json: got a JSON dict, expected an array"),
    ({"a_json": "[1, 2"}, "a.json: not JSON"),
    ({"a_json": [ROWS[0], 3]}, "a.json, row 1: got a JSON int"),
    ({"a_json": [{"ask": "a"}]}, "a.json, row 0: key 'about' is missing"),
    ({"a_jsonl": [*ROWS, {"aks": ""}]}, "a.jsonl:3: key 'ask' .*'aks'"),
    ({"a_json": [ROWS[0] | {"say": ""}]}, "a.json, row 0: 'say' is empty"),
    ({"a_json": [ROWS[0] | {"ask": 1}]}, "a.json, row 0: 'ask' is int"),
    ({"a_json": ROWS, "a_jsonl": ROWS}, "is the client 'a'"),
  ],
)
def test_bad_files_are_one_line(tmp_path, files, message):
  write(tmp_path, **files)
  with pytest.raises(errors.DataError, match=message) as e:
    data.from_files(tmp_path, "*", KEYS, required=("ask", "say"))
  assert "\n" not in str(e.value)


def test_a_missing_folder_is_named(tmp_path):
  with pytest.raises(errors.DataError, match="no: is not a folder"):
    data.from_files(tmp_path / "no", "*", "ask")


@pytest.mark.parametrize("compressed", [False, True])
def test_lines_hold_several_texts_or_tokens(tmp_path, compressed):
  path = tmp_path / ("rows.jsonl" + ".gz" * compressed)
  rows = [row | {"who": who, "ids": [1, 2]} for row, who in zip(ROWS, "xy")]
  content = "\n".join(map(json.dumps, rows)).encode()
  path.write_bytes(gzip.compress(content) if compressed else content)
  source = data.from_jsonl(path, "who", KEYS, token_key="ids")
  assert source.ids == ("x", "y")
  read = source.read("y")
  assert [read[k].tolist() for k in KEYS] == [["c"], ["d"], ["e"]]
  assert read["ids"][0].tolist() == [1, 2]
  everyone = data.from_jsonl(path, "", "ask")
  assert everyone.ids == ("all",)
  assert everyone.read("all")["ask"].tolist() == ["a", "c"]


@pytest.mark.parametrize("ids", [3, [], [1.0], ["a"], [True], [2**31]])
def test_tokens_are_checked(tmp_path, ids):
  path = tmp_path / "rows.jsonl"
  path.write_text(json.dumps({"who": "x", "ids": ids}))
  with pytest.raises(errors.DataError, match="rows.jsonl:1: 'ids' "):
    data.from_jsonl(path, "who", (), token_key="ids")
