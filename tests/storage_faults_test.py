"""Checkpoints on a disk that fails: nothing that may be whole is given up."""

import errno
import math
import os
import pathlib
import resource
import shutil

import numpy as np
import pytest

from fedfm import checkpoint, errors
from fedfm.checkpoint import checkpointer as checkpointers
from fedfm.checkpoint import items

METADATA = "_CHECKPOINT_METADATA"
TRANSIENT = ("EIO", "EMFILE", "ESTALE", "ETIMEDOUT", "EACCES", "ELOOP")


def state(round):
  return {"w": np.full((30, 20), round, np.float32)}


def names(folder):
  return {p.name for p in folder.iterdir()}


def loss(extra):
  return extra["loss"]


@pytest.fixture
def folder(tmp_path):
  """Rounds 1 to 3, each better than the one after it."""
  with checkpoint.Checkpointer(tmp_path, keep_last=None) as checkpointer:
    for r in (1, 2, 3):
      checkpointer.save(r, state(r), {"loss": float(r)})
  return tmp_path


def failing(monkeypatch, name, code):
  """Makes reading files of a name fail, in all but their being there."""
  real = pathlib.Path.read_text

  def read_text(self, *args, **kwargs):
    if self.name == name:
      raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
    return real(self, *args, **kwargs)

  monkeypatch.setattr(pathlib.Path, "read_text", read_text)


@pytest.mark.parametrize("code", TRANSIENT)
def test_a_manifest_that_cannot_be_read_now_is_not_damaged(
  folder, monkeypatch, code
):
  with checkpoint.Checkpointer(folder) as checkpointer:
    with monkeypatch.context() as patch:
      failing(patch, METADATA, code)
      with pytest.raises(errors.StorageError, match="3: unreadable") as error:
        checkpointer.restore(state(0))
    assert error.value.exit_code == 3 and "\n" not in str(error.value)
    assert names(folder) == {"1", "2", "3"}
    assert checkpointer.restore(state(0))[0] == 3


def test_arrays_that_cannot_be_read_now_are_not_damaged(folder):
  """A loop of links is an error without a code of its own, as EIO is."""
  for path in (folder / "3" / "state").rglob("d/*"):
    path.rename(path.with_name("away"))
    path.symlink_to(path)
  checkpointer = checkpoint.Checkpointer(folder)
  with pytest.raises(errors.StorageError, match="UNKNOWN: ") as error:
    checkpointer.restore(state(0))
  assert error.value.exit_code == 3 and "\n" not in str(error.value)
  assert names(folder) == {"1", "2", "3"}


@pytest.mark.parametrize(
  ("code", "damaged"),
  {
    "UNAVAILABLE": False,
    "DEADLINE_EXCEEDED": False,
    "ABORTED": False,
    "UNKNOWN": False,
    "RESOURCE_EXHAUSTED": False,
    "DATA_LOSS": True,
    "NOT_FOUND": True,
    "OUT_OF_RANGE": True,
  }.items(),
)
def test_the_first_code_of_tensorstore_decides(
  folder, monkeypatch, code, damaged
):
  def load(path, target):
    raise ValueError(f"{code}: Error reading: NOT_FOUND: UNKNOWN: x")

  monkeypatch.setattr(checkpointers.ocp, "load", load)
  reader = checkpoint.Checkpointer(folder, read_only=True)
  with pytest.raises(errors.CheckpointError) as error:
    reader.restore(state(0), round=3)
  kind = checkpoint.DamagedError if damaged else errors.StorageError
  assert type(error.value) is kind


def test_an_item_that_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch):
  def fail(file):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  (tmp_path / "store").mkdir()
  (tmp_path / "store" / "rows").write_text("x")
  monkeypatch.setattr(items, "_record", fail)
  with pytest.raises(errors.StorageError, match="item store: .*Input/output"):
    items.check_files("store", {}, tmp_path)
  with pytest.raises(checkpoint.DamagedError, match="item missing: .*no such"):
    items.check_files("missing", {}, tmp_path)


def test_an_older_damaged_manifest_does_not_stop_the_training(folder, caplog):
  """Scores are read from all manifests, that of the best round among them."""
  (folder / "1" / METADATA).write_text("{}")
  with checkpoint.Checkpointer(
    folder, keep_last=1, keep_best=loss
  ) as checkpointer:
    assert checkpointer.restore(state(0))[0] == 3
    for r in (4, 5):
      assert checkpointer.save(r, state(r), {"loss": float(r)}, block=True)
  assert names(folder) == {"1.damaged", "2", "5"}
  assert "set aside as 1.damaged" in caplog.text


def test_no_round_is_the_best_where_no_score_is_finite(tmp_path):
  with checkpoint.Checkpointer(
    tmp_path, keep_last=1, keep_best=lambda extra: math.inf
  ) as checkpointer:
    for r in (1, 2, 3):
      checkpointer.save(r, state(r))
  assert names(tmp_path) == {"3"}


@pytest.mark.parametrize("killed", [False, True])
def test_what_is_replaced_stays_until_the_new_one_is_whole(folder, killed):
  big = {"w": np.random.default_rng(0).integers(0, 256, 2**21, np.uint8)}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with checkpoint.Checkpointer(folder, keep_last=None) as checkpointer:
    if killed:  # While the new one is written.
      (folder / "3").rename(folder / "3.replaced")
      (folder / "3.orbax-checkpoint-tmp").mkdir()
    else:
      resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, limits[1]))
      try:
        with pytest.raises(errors.SaveError, match=r"not saved: "):
          checkpointer.save(3, big)
          assert (folder / "3.replaced").is_dir()
          checkpointer.wait()
      finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
      assert names(folder) == {"1", "2", "3"}
  with checkpoint.Checkpointer(folder, keep_last=None) as checkpointer:
    round, restored, _ = checkpointer.restore(state(0))
    assert round == 3 and restored["w"][0, 0] == 3
    assert checkpointer.save(3, big, block=True)
    assert checkpointer.restore(big)[0] == 3
  assert names(folder) == {"1", "2", "3"}


def test_a_folder_that_vanishes_is_the_machines(folder):
  checkpointer = checkpoint.Checkpointer(folder)
  shutil.rmtree(folder)
  for act in (
    lambda: checkpointer.save(4, state(4), block=True),
    lambda: checkpointer.restore(state(0)),
    checkpointer.all_rounds,
    checkpointer.set_aside,
  ):
    with pytest.raises(errors.StorageError, match="cannot be listed: No such"):
      act()


def test_a_round_that_cannot_be_renamed_is_the_machines(folder, monkeypatch):
  def rename(self, target):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

  (folder / "3" / METADATA).write_text("{}")
  monkeypatch.setattr(pathlib.Path, "rename", rename)
  checkpointer = checkpoint.Checkpointer(folder)
  with pytest.raises(errors.SaveError, match="3: cannot be renamed: Read-on"):
    checkpointer.restore(state(0))
