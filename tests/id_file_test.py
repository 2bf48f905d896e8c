"""Populations whose names stay on disk: the same clients, and no memory."""

import tracemalloc

import numpy as np
import pytest

from fedfm import data, errors
from fedfm.data import id_file, sampling

NAMES = [f"client {i} \u00e9" * (1 + i % 3) for i in range(300)]


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
  folder = tmp_path_factory.mktemp("ids") / "of" / "all"
  id_file.write(folder, iter(NAMES))
  assert [p.name for p in folder.parent.iterdir()] == ["all"]
  return id_file.IdFile(folder)


def source(ids):
  """Clients of one to four rows that say whose they are."""

  def row(client_id):
    return NAMES.index(client_id)

  def read(client_id):
    return {"x": np.full(1 + row(client_id) % 4, row(client_id), np.int32)}

  return data.ClientSource(ids, lambda i: 1 + row(i) % 4, read)


def test_names_are_those_that_were_written(ids):
  assert list(ids) == NAMES and len(ids) == 300
  assert (ids[-1], ids[7:9]) == (NAMES[-1], NAMES[7:9])
  assert [ids.row(name) for name in NAMES] == list(range(300))
  for other in ("client 300", "", None, 3, "\ud800"):
    assert ids.row(other) is None
  with pytest.raises(IndexError):
    ids[300]


def test_rounds_are_those_of_names_in_memory(ids):
  cohorts = []
  for names in (ids, NAMES):
    clients = source(names)
    sampler = sampling.uniform(clients.ids, 5, seed=3)
    assert clients.index(NAMES[9]) == 9
    chosen = sampler.sample(2)
    cohorts.append(data.pack(clients, chosen, batch_size=2, lanes=2))
  for name in ("row", "weight", "id_hash"):
    a, b = (getattr(cohort, name) for cohort in cohorts)
    np.testing.assert_array_equal(a, b)
  a, b = (cohort.batches["x"] for cohort in cohorts)
  np.testing.assert_array_equal(a, b)
  with pytest.raises(errors.DataError, match="'x' is not one of .* 300"):
    source(ids).size("x")


def test_hashes_that_collide_are_told_apart(tmp_path, monkeypatch):
  monkeypatch.setattr(id_file, "_hash", len)
  id_file.write(tmp_path / "ids", ["b", "a", "cc", "d"])
  found = id_file.IdFile(tmp_path / "ids")
  assert [found.row(name) for name in ("a", "b", "cc", "d", "e")] == [
    1, 0, 2, 3, None,
  ]  # fmt: skip
  with pytest.raises(errors.DataError, match="'a' is repeated"):
    id_file.write(tmp_path / "other", ["a", "b", "a"])
  assert [p.name for p in tmp_path.iterdir()] == ["ids"]


def test_a_round_of_many_clients_reads_few_names(tmp_path):
  number = 100_000
  id_file.write(tmp_path / "ids", map("client {}".format, range(number)))
  tracemalloc.start()
  clients = data.ClientSource(
    id_file.IdFile(tmp_path / "ids"), lambda i: 1, lambda i: {"x": np.zeros(1)}
  )
  chosen = sampling.uniform(clients.ids, 10).sample(0)
  rows = [clients.index(i) for i in chosen]
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert chosen == [f"client {row}" for row in rows]
  assert peak < number  # A byte a name; each takes 60 as a string.


@pytest.mark.parametrize("name", ["names.bin", "ends.npy", "hashes.npy"])
def test_damaged_files_are_named(tmp_path, name):
  folder = tmp_path / "ids"
  id_file.write(folder, ["a", "b"])
  with pytest.raises(errors.DataError, match="exists, expected a new folder"):
    id_file.write(folder, ["a"])
  file = folder / name
  if name == "names.bin":
    file.write_bytes(b"a")
  else:
    file.write_bytes(file.read_bytes()[:-4])
  with pytest.raises(errors.DataError, match="ids: .*ids: "):
    id_file.IdFile(folder)
  file.unlink()
  with pytest.raises(errors.DataError, match=name):
    id_file.IdFile(folder)


def test_no_names_are_refused(tmp_path):
  with pytest.raises(errors.DataError, match="got none"):
    id_file.write(tmp_path / "ids", [])
