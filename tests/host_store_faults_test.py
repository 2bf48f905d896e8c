"""What a client store does about kills, full disks and damaged files."""

import os
import pathlib
import shutil

import numpy as np
import pytest
import reference
from store_states import (
  STATE,
  N,
  again_of,
  assert_equal,
  assert_is,
  initial,
  states_of,
  written,
)

from fedfm import errors
from fedfm.clients import host_store, sealing
from fedfm.clients.host_store import HostStore
from fedfm.clients.row_files import RowFiles

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


class Killed(BaseException):
  """In place of a kill: nothing handles it."""


def dies_at(monkeypatch, index):
  """Ends what is done at the write, rename or deletion with this index.

  A write is torn: some of it is on the disk.
  """
  count = iter(range(index + 1))

  def counted(real, tear=None):
    def call(*args, **options):
      if next(count, index) == index:
        if tear is not None:
          tear(real, *args)
        raise Killed
      return real(*args, **options)

    return call

  torn = counted(os.pwrite, lambda real, f, x, at: real(f, bytes(x)[:40], at))
  monkeypatch.setattr(os, "pwrite", torn)
  monkeypatch.setattr(os, "replace", counted(os.replace))
  for name in ("unlink", "rename"):
    monkeypatch.setattr(
      pathlib.Path, name, counted(getattr(pathlib.Path, name))
    )
  rmtree = counted(shutil.rmtree, lambda real, path, **_: torn_tree(path))
  monkeypatch.setattr(host_store.shutil, "rmtree", rmtree)


def torn_tree(path):
  for file in sorted(path.rglob("rows"))[:1]:
    os.unlink(file)


# A round whose store drops two others: two logs, two floors, four rows in each
# copy, and four logs that go.
@pytest.mark.parametrize("index", range(16))
def test_a_process_that_dies_while_it_writes_leaves_every_version(
  tmp_path, monkeypatch, index
):
  folder = tmp_path / "store"
  made = again_of(folder)
  made.write([0, 3], states_of([0, 3], 1), 1)
  made.write([3, 4], states_of([3, 4], 2), 2)
  made.close()
  made = again_of(folder, oldest=2)
  with monkeypatch.context() as patch:
    dies_at(patch, index)
    with pytest.raises(Killed):
      made.write([0, 1, 3], states_of([0, 1, 3], 3), 3)
  # A reader beside it, before another process puts it in order.
  reader = HostStore(folder, STATE, N, read_only=True)
  assert_is(lambda rows: reader.read(rows, 2), 2)
  again = again_of(folder)
  again.roll_back(2)
  assert_is(again.read, 2)
  again.write([0, 1, 3], states_of([0, 1, 3], 3), 3)
  assert_is(again.read, 3)
  assert again.damage(np.arange(N), 3) == []


@pytest.mark.parametrize("index", range(7))
def test_a_store_that_dies_while_it_is_made_anew_is_made_again(
  tmp_path, monkeypatch, index
):
  """Going back to the start is what does it, once logs were dropped."""
  folder = tmp_path / "store"
  made = again_of(folder, oldest=1)
  made.write([1], states_of([1], 1), 1)
  with monkeypatch.context() as patch:
    dies_at(patch, index)
    with pytest.raises(Killed):
      made.roll_back(0)
  again = again_of(folder)
  again.roll_back(0)
  assert_equal(again.read(np.arange(N)), initial(N))
  again.write([1], states_of([1], 1), 1)
  again.roll_back(0)
  assert_equal(again.read(np.arange(N)), initial(N))


def test_a_full_disk_is_told_and_undone(opened_store, tmp_path, monkeypatch):
  """At every file that is written for a round."""
  real = sealing.os.replace
  for index in range(2):
    count = iter(range(index + 1))

    def full(*paths, count=count, index=index):
      if next(count, index) == index:
        raise OSError(28, "No space left on device")
      real(*paths)

    with monkeypatch.context() as patch:
      patch.setattr(os, "replace", full)
      with pytest.raises(errors.SaveError, match="No space left") as error:
        opened_store.write([0, 2, 4], states_of([0, 2, 4], 4), 4)
    reference.check_message(error.value, ["store"])
    assert not list((tmp_path / "store").rglob("*.tmp"))
    again = again_of(tmp_path / "store")
    again.roll_back(3)
    assert_is(again.read, 3)


def test_what_does_not_change_is_not_written(opened_store, tmp_path):
  opened_store.write([0, 4], opened_store.read([0, 4]), 4)
  logs = tmp_path / "store" / "first" / "logs"
  assert sorted(p.name for p in logs.iterdir()) == ["1", "2", "3", "4"]
  assert (logs / "4").stat().st_size == 16 + sealing.DIGEST
  assert_is(lambda rows: opened_store.read(rows, 4), 3)


def flip(path: pathlib.Path, at: int):
  content = bytearray(path.read_bytes())
  content[at] ^= 4
  with open(path, "r+b") as file:  # In place, as a disk does.
    file.write(content)


def cut(path: pathlib.Path, at: int):
  os.truncate(path, at)


def zero(path: pathlib.Path, at: int):
  with open(path, "r+b") as file:
    file.seek(at // 100 * 100)
    file.write(b"\0" * 100)


def delete(path: pathlib.Path, at: int):
  del at
  path.unlink()


# Records are of 42 bytes; 0, 3 and that of new clients, 6, are in `rows`.
ROW = 42
FAULTS = [
  (flip, "rows", 3 * ROW + 20),
  (flip, "rows", 3 * ROW + 1),
  (flip, "rows", 5 * ROW + 1),  # Of a client that never took part.
  (flip, "rows", 5 * ROW + 20),
  (flip, "rows", N * ROW + 20),
  (cut, "rows", 3 * ROW + 30),
  (cut, "rows", 0),
  (zero, "rows", 3 * ROW),
  (delete, "rows", 0),
  (flip, "logs/2", 3),
  (flip, "logs/2", 60),
  (cut, "logs/3", 30),
  (cut, "logs/3", 100),
  (cut, "logs/3", 0),
  (delete, "logs/2", 0),
  (delete, "logs/3", 0),
  (flip, "store.json", 30),
  (cut, "store.json", 5),
  (delete, "store.json", 0),
]


@pytest.mark.parametrize("copy", ["first", "second"])
@pytest.mark.parametrize(("fault", "name", "at"), FAULTS)
def test_what_is_damaged_is_taken_from_the_other_copy(
  tmp_path, caplog, copy, fault, name, at
):
  folder = tmp_path / "store"
  made = written(folder, oldest=1)
  assert made._size == ROW
  fault(folder / copy / name, at)
  # In the process that wrote it, in one beside it, and in the next.
  reader = HostStore(folder, STATE, N, read_only=True)
  for version in (3, 2, 1):
    assert_is(lambda rows, v=version: reader.read(rows, v), version)
    assert_is(lambda rows, v=version: made.read(rows, v), version)
  made.write([2], states_of([2], 5), 5)
  made.roll_back(3)
  assert_is(made.read, 3)
  made.close()
  again = again_of(folder)
  again.check(3)
  for version in (3, 2, 1):
    again.roll_back(version)
    assert_is(again.read, version)
  # And then from the second alone, or the first.
  other = {"first": "second", "second": "first"}[copy]
  again.close()
  if name != "rows":
    shutil.rmtree(folder / other)
    again = again_of(folder)
    assert_is(again.read, 1)
    assert again.damage(np.arange(N), 1) == []


def test_damage_in_both_copies_is_named(tmp_path):
  folder = tmp_path / "store"
  made = written(folder, oldest=1)
  for copy in ("first", "second"):
    flip(folder / copy / "rows", 3 * ROW + 20)
  made.read([3])  # It is in a log.
  made.read([0, 1, 3, 4], 3)
  with pytest.raises(sealing.DamagedRowsError) as error:
    made.read([0, 3], 1)
  reference.check_message(error.value, ["store", "client 3", "both copies"])
  # The row of another client is no row of this one.
  for copy in ("first", "second"):
    content = (folder / copy / "rows").read_bytes()
    content = content[3 * ROW : 4 * ROW] + content[ROW:]
    (folder / copy / "rows").write_bytes(content)
  with pytest.raises(errors.CheckpointError, match="client 0 is damaged"):
    again_of(folder).read([0], 1)
  for fault, name, at, word in (
    (flip, "logs/2", 60, "logs/2: is damaged"),
    (delete, "logs/2", 0, "logs/2: is missing"),
    (delete, "logs/3", 0, "logs/3: is missing"),
  ):
    folder = tmp_path / f"{fault.__name__} {name[-1]}"
    made = written(folder, oldest=1)
    for copy in ("first", "second"):
      fault(folder / copy / name, at)
    again = again_of(folder)
    for version in range(int(name[-1]), 4):
      with pytest.raises(sealing.DamagedRowsError, match=word):
        again.check(version)
    before = int(name[-1]) - 1
    again.check(before)
    again.roll_back(before)
    assert_is(again.read, before)


def test_one_copy_that_is_damaged_is_told_apart(tmp_path):
  folder = tmp_path / "store"
  made = written(folder, oldest=1)
  assert made.damage(np.arange(N), 1) == []
  flip(folder / "second" / "rows", 3 * ROW + 20)
  (found,) = made.damage(np.arange(N), 1)
  assert found == f"{folder}/second: the state of client 3 is damaged"
  # Whole, but another than in the first.
  record = np.zeros(ROW, np.uint8)
  record[sealing.DIGEST :] = 1
  sealing.seal(3, record)
  second = RowFiles(folder / "second", N + 1, ROW)
  second.open(read_only=False)
  second.put(3, record)
  (found,) = made.damage(np.arange(N), 1)
  assert found == f"{folder}: the copies of the state of client 3 differ"


def test_a_store_that_is_gone_is_not_made_anew_silently(tmp_path):
  folder = tmp_path / "store"
  with pytest.raises(errors.CheckpointError) as error:
    HostStore(folder, STATE, N, may_create=False)
  reference.check_message(error.value, ["store", "missing", "checkpoints"])
  assert not folder.exists()
  written(folder, oldest=1)
  for copy in ("first", "second"):
    (folder / copy / "store.json").write_text("{")
  before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
  with pytest.raises(errors.CheckpointError, match="no intact store.json"):
    again_of(folder)
  assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
