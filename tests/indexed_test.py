"""A million clients by an index on disk: a round names none but its cohort."""

import json
import tracemalloc

import numpy as np
import pytest
import tiny

from fedfm import data, errors, experiment
from fedfm.data import indexed

NAMES = [f"client {i} \u00e9" for i in (3, 1, 2, 0, 9, 7)]


def write(path, names=NAMES, rows=lambda i: 1 + i % 3):
  """Writes lines of clients, each client's together."""
  with open(path, "w", encoding="utf-8") as file:
    for i, name in enumerate(names):
      for row in range(rows(i)):
        line = {"client": name, "text": f"words {row} of {name}"}
        file.write(json.dumps(line, ensure_ascii=False) + "\n\n")
  return path


def source(path, index):
  return data.from_indexed_jsonl(path, index, "client", "text")


def test_reads_are_those_of_the_file_in_memory(tmp_path):
  path = write(tmp_path / "data.jsonl")
  expected = data.from_jsonl(path, "client", "text")
  for _ in range(2):  # Writes the index, and finds it.
    found = source(path, tmp_path / "of" / "index")
    assert list(found.ids) == list(expected.ids) == NAMES
    for name in NAMES:
      assert found.size(name) == expected.size(name)
      np.testing.assert_array_equal(
        found.read(name)["text"], expected.read(name)["text"]
      )
  assert [p.name for p in (tmp_path / "of").iterdir()] == ["index"]


def test_files_that_do_not_go_with_an_index_are_named(tmp_path):
  path = write(tmp_path / "data.jsonl", ["a", "b", "a"])
  with pytest.raises(errors.DataError, match="'a' is repeated.*follow each"):
    source(path, tmp_path / "index")
  assert not (tmp_path / "index").exists()
  write(path)
  found = source(path, tmp_path / "index")
  path.write_text(path.read_text().replace("client 3", "client 4"))
  with pytest.raises(errors.DataError, match="changed since it was indexed"):
    found.read(NAMES[0])
  write(path, NAMES[:3])
  with pytest.raises(errors.DataError, match="data.index: .* is of 6 clients"):
    source(path, tmp_path / "index")
  (tmp_path / "index" / "begins.npy").unlink()
  with pytest.raises(errors.DataError, match="data.index: .*begins.npy"):
    source(path, tmp_path / "index")
  path.write_text('{"client": "a", "text": ""}\n{"client": "b", "text": "b"}')
  with pytest.raises(errors.DataError, match="client 'a': has no text"):
    source(path, tmp_path / "other")
  path.write_text('{"client": "a", "text": 3}\n')
  with pytest.raises(errors.DataError, match="data.jsonl:1: 'text' is int"):
    source(path, tmp_path / "other")


def test_clients_are_held_out_and_no_example_twice(tmp_path):
  path = write(tmp_path / "data.jsonl", [f"c{i}" for i in range(40)])
  found = source(path, tmp_path / "index")
  split = indexed.hold_out(found, 0.25, 0.3, max_clients=9)
  unseen = set(found.ids) - set(split.train.ids)
  assert len(unseen) == 10 and list(split.train.ids) == sorted(
    split.train.ids, key=found.index
  )
  assert set(split.evals["unseen"].ids) < unseen
  assert len(split.evals["unseen"]) == 9
  assert unseen.isdisjoint(split.evals["seen"].ids)
  for row, name in enumerate(split.train.ids):
    assert split.train.index(name) == row
  with pytest.raises(errors.DataError, match="is not one of the source's 30"):
    split.train.index(min(unseen))
  for name in split.evals["seen"].ids:
    parts = [split.train.read(name), split.evals["seen"].read(name)]
    got = sorted(x for part in parts for x in part["text"])
    assert got == sorted(found.read(name)["text"]) and len(parts[1]["text"])
  with pytest.raises(errors.ConfigError, match="data.unseen_fraction: 0.99"):
    indexed.hold_out(found, 0.99, 0, max_clients=9)


def built(folder, path, **changes):
  config = tiny.config(folder, eval={"max_clients": 3, "max_examples": 1})
  own = {"path": str(path), "index": str(folder / "index")}
  return tiny.build(
    folder, data=config["data"] | own, eval=config["eval"], **changes
  )


@pytest.mark.slow
def test_a_run_by_an_index(tmp_path):
  write(tmp_path / "by_index.jsonl", [f"c{i}" for i in range(40)])
  one = built(tmp_path, tmp_path / "by_index.jsonl", rounds=1)
  summary = experiment.run(one, tmp_path / "run")[0]
  assert summary["final"]["eval/unseen/loss"] > 0


@pytest.mark.slow
def test_a_million_clients_take_no_memory(tmp_path):
  number = 1_000_000
  path = tmp_path / "million.jsonl"
  write(path, map("client {}".format, range(number)), rows=lambda i: 1)
  source(path, tmp_path / "index")
  tracemalloc.start()
  one = built(tmp_path, path, client={"batch_size": 2}, rounds=1)
  assert len(one.data.train) == 800_000
  cohort = one.cohort(0)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  # Rows of the clients that are trained on take 8 bytes each, and are sorted;
  # names would take 60 more.
  assert peak < 32 * number
  state, got = one.run_round(one.initial_state(), one.base, cohort)
  assert got["clients/participating"] == 3 and int(state.round) == 1
