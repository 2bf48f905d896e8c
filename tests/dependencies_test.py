"""Text to pre-train on: nothing of what is protected, and nothing twice."""

import importlib.metadata
import pathlib

import pytest

from fedfm.data import dependencies


def lines(name, count, first=0):
  """Lines of a file that no other file has."""
  return [f"{name}_value_{i} = compute({i})" for i in range(first, count)]


def text(*parts):
  return "\n".join(line for part in parts for line in part) + "\n"


def test_shingles_are_of_runs_of_lines_that_say_something():
  own = lines("a", 4)
  spaced = ["", own[0], "  }", f"    {own[1]}", "pass", own[2], "", own[3]]
  assert dependencies.shingles(text(own)) == dependencies.shingles(text(spaced))
  assert len(dependencies.shingles(text(own))) == 2  # Of three lines each.
  assert dependencies.shingles(text(own[::-1])).isdisjoint(
    dependencies.shingles(text(own))
  )
  assert not dependencies.shingles(text(own[:2]))


@pytest.mark.parametrize(("copied", "is_kept"), [(0, True), (4, True), (9, 0)])
def test_copies_are_left_out(copied, is_kept):
  """Of 98 runs, `copied - 2` stand in the protected text: 2% or 7%."""
  secret = lines("secret", 50)
  content = text(secret[:copied], lines("own", 100 - copied))
  files = [("one", "a.py", content), ("one", "b.py", text(lines("b", 9)))]
  kept, left_out = dependencies.without_copies(
    files, ["unrelated", text(secret)]
  )
  assert kept == (files if is_kept else files[1:])
  assert left_out == ([] if is_kept else ["a.py"])


def test_a_copy_with_other_indentation_is_a_copy():
  secret = lines("secret", 20)
  moved = [f"      {line}  " for line in secret]
  kept, left_out = dependencies.without_copies(
    [("one", "a.py", text(["class A:"], moved))], [text(secret)]
  )
  assert not kept and left_out == ["a.py"]


def test_of_near_duplicates_the_first_stays():
  one, other = lines("one", 30), lines("other", 30)
  half = text(one[:15], lines("new", 30))  # 13 of 43 runs are known.
  files = [
    ("p", "first", text(one)),
    ("p", "again", text(one[:25], lines("new", 5))),  # 23 of 28 are.
    ("q", "other", text(other)),
    ("q", "half", half),
    ("q", "half again", half),
    ("r", "short", "x = 1\n"),  # No runs, so nothing to compare.
    ("r", "short again", "x = 1\n"),
  ]
  kept = dependencies.without_near_duplicates(files)
  assert [path for _, path, _ in kept] == [
    "first",
    "other",
    "half",
    "short",
    "short again",
  ]
  assert dependencies.without_near_duplicates(kept) == kept
  # What was left out does not count as known.
  late = [files[0], files[1], ("z", "z", text(lines("new", 5)))]
  assert len(dependencies.without_near_duplicates(late)) == 2


def test_files_of_distributions(tmp_path, monkeypatch):
  """Right suffix, size and encoding, each content once, no backports."""
  long = text(lines("long", 40))
  contents = {
    "pkg/a.py": long,
    "pkg/same.py": long,
    "pkg/b.pyi": text(lines("stub", 40)),
    "pkg/small.py": "x = 1\n",
    "pkg/large.py": "y" * 200_001,
    "backports/c.py": text(lines("old", 40)),
    "pkg/latin.py": text(lines("é", 40)),
  }
  for path, content in contents.items():
    (tmp_path / path).parent.mkdir(exist_ok=True)
    encoding = "latin-1" if "latin" in path else "utf-8"
    (tmp_path / path).write_text(content, encoding=encoding)

  class File(pathlib.PurePosixPath):
    def locate(self):
      return tmp_path / self

  names = [*contents, "pkg/gone.py"]
  monkeypatch.setattr(
    importlib.metadata, "files", lambda name: [File(n) for n in names]
  )
  assert dependencies.source_files(["pkg"]) == [("pkg", "pkg/a.py", long)]
  both = dependencies.source_files(["pkg"], (".py", ".pyi"))
  assert [path for _, path, _ in both] == ["pkg/a.py", "pkg/b.pyi"]
