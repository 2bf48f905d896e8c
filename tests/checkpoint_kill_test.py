"""kill -9 at any point of a save: nothing is lost but what was being saved."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import killed_saver
import numpy as np
import pytest
import script_runs

from fedfm import checkpoint, errors

# The point, the round of it, and the newest round that must be there after.
POINTS = [
  ("write", 4, 3),
  ("before commit", 4, 3),
  ("after commit", 4, 4),
  ("snapshot", 4, 3),
  ("items done", 4, 3),
  ("before deletion", 2, 4),
  ("after deletion", 2, 4),
  ("before items go", 2, 4),
  ("clean-up", 2, 4),
]


@pytest.fixture(scope="module")
def forks():
  """Returns a function from folder, point and round to an exit status."""
  root = pathlib.Path(__file__).parent
  process = subprocess.Popen(
    [sys.executable, root / "killed_saver.py"],
    env=script_runs.environment(),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )

  def run(folder, point="", round=0, rounds=killed_saver.ROUNDS):
    order = {"folder": str(folder), "point": point, "round": round}
    order["rounds"] = rounds
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())

  yield run
  process.stdin.close()
  assert process.wait(60) == 0
  process.stdout.close()


def newest(folder):
  """The round that is restored; checks its content and its item's."""
  store = killed_saver.Store()
  with checkpoint.Checkpointer(
    folder, read_only=True, items={"store": store}
  ) as reader:
    restored = reader.restore(killed_saver.state(0))
  if restored is None:
    return 0
  round, state, extra = restored
  for name, value in killed_saver.state(round).items():
    np.testing.assert_array_equal(state[name], value)
  assert store.value == round and extra == {"round": round}
  return round


def assert_goes_on(forks, folder):
  """The next process ends with what an uninterrupted one leaves behind."""
  whole = folder.exists() and newest(folder) == killed_saver.ROUNDS
  assert forks(folder) == 0
  assert newest(folder) == killed_saver.ROUNDS
  names = {p.name for p in folder.iterdir()}
  expected = {"5", "5.items", "6", "6.items"}
  # Where nothing was left to save, nothing is deleted after it either.
  assert names >= expected if whole else names == expected


@pytest.mark.parametrize(("point", "round", "left"), POINTS)
def test_killed_while_saving(forks, tmp_path, point, round, left):
  folder = tmp_path / "checkpoints"
  assert forks(folder, point, round) == -signal.SIGKILL
  assert newest(folder) == left
  assert_goes_on(forks, folder)


@pytest.mark.parametrize("point", ["before set aside", "after set aside"])
def test_killed_while_restoring(forks, tmp_path, point):
  folder = tmp_path / "checkpoints"
  assert forks(folder, "after commit", 4) == -signal.SIGKILL
  (folder / "4" / "_CHECKPOINT_METADATA").write_text("{}")
  assert forks(folder, point, 4) == -signal.SIGKILL
  assert newest(folder) == 3
  assert forks(folder) == 0
  assert newest(folder) == killed_saver.ROUNDS
  names = {"4.damaged", "5", "5.items", "6", "6.items"}
  assert {p.name for p in folder.iterdir()} - {"4.damaged.items"} == names


def test_killed_at_random(forks, tmp_path):
  """Twenty times; each time it goes on from a round not before the last."""
  folder, before, killed = tmp_path / "checkpoints", 0, 0
  for seed in range(20):
    status = forks(folder, "random", seed)
    killed += status == -signal.SIGKILL
    now = newest(folder) if folder.exists() else 0
    assert now >= before
    before = now
    if status == 0:
      for path in folder.iterdir():
        os.rename(path, tmp_path / f"{seed} {path.name}")
      before = 0
  assert killed >= 10
  assert_goes_on(forks, folder)


def test_a_reader_sees_only_whole_rounds(forks, tmp_path):
  """It reads all the time while a run saves and deletes."""
  folder, seen = tmp_path / "checkpoints", []
  folder.mkdir()
  saver = threading.Thread(target=forks, args=(folder, "", 0, 15))
  saver.start()
  try:
    while saver.is_alive():
      seen.append(newest(folder))
  finally:
    saver.join()
  assert seen == sorted(seen) and len(set(seen)) > 3
  assert newest(folder) == 15


def test_a_save_that_was_killed_is_no_excuse_for_other_damage(tmp_path):
  folder = tmp_path / "checkpoints"
  killed_saver.save_all(folder, killed_saver.Store())
  (folder / "6.items" / "store" / "a").write_text("5")
  with checkpoint.Checkpointer(
    folder, items={"store": killed_saver.Store()}
  ) as checkpointer:
    with pytest.raises(
      checkpoint.DamagedError, match="item store, file a: got"
    ):
      checkpointer.verify(6)
    assert checkpointer.restore(killed_saver.state(0))[0] == 5
  names = {p.name for p in folder.iterdir()}
  assert names == {"5", "5.items", "6.damaged", "6.damaged.items"}
  with checkpoint.Checkpointer(folder) as checkpointer:
    # Who does not ask for the items gets the arrays alone.
    assert checkpointer.restore(killed_saver.state(0))[0] == 5
  other = {"shop": killed_saver.Store()}
  with (
    checkpoint.Checkpointer(folder, items=other) as checkpointer,
    pytest.raises(errors.CheckpointError, match="item shop: not in the"),
  ):
    checkpointer.restore(killed_saver.state(0))
  assert (folder / "5").exists()
