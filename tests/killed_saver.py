"""Saves rounds in forks of one process, which are killed at a chosen point.

Run as a script it reads a JSON object a line, {"folder", "point", "round",
"rounds"}, and answers with the exit status of the fork that did it. Imports
take seconds; the forks share them.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import sys
import threading
import time

import numpy as np

from fedfm import checkpoint

ROUNDS = 6
KEEP_LAST = 2


def state(round):
  """The state of a round, and nothing else."""
  rng = np.random.default_rng(round)
  return {"w": rng.normal(size=(50, 40)), "count": np.array(round)}


class Store:
  """An item of two files that hold a round's number."""

  def __init__(self):
    self.value, self.snapshot_hook = -1, lambda: None

  def snapshot(self, folder):
    (folder / "a").write_text(str(self.value))
    self.snapshot_hook()
    (folder / "deep").mkdir()
    (folder / "deep" / "b").write_text(str(self.value) * 100)

  def restore(self, folder):
    self.value = int((folder / "a").read_text())
    assert (folder / "deep" / "b").read_text() == str(self.value) * 100


def die():
  """Ends this process as `kill -9` does."""
  os.kill(os.getpid(), signal.SIGKILL)


def arm(point, round, folder, store):
  """Makes this process die at a point of a round."""
  real_rename, real_rmtree = os.rename, shutil.rmtree
  places = {
    "before commit": (str(folder / str(round)), False),
    "after commit": (str(folder / str(round)), True),
    "before deletion": (f"{folder}/{round}.deleted", False),
    "after deletion": (f"{folder}/{round}.deleted", True),
    "before items go": (f"{folder}/{round}.deleted.items", False),
    "before set aside": (f"{folder}/{round}.damaged", False),
    "after set aside": (f"{folder}/{round}.damaged", True),
    "items done": (f"{folder}/{round}.items", True),
  }
  target, after = places.get(point, ("", False))

  def rename(source, destination, **options):
    hit = str(destination) == target
    if hit and not after:
      die()
    real_rename(source, destination, **options)
    if hit:
      die()

  def rmtree(path, *arguments, **options):
    if point == "clean-up" and str(path).endswith(f"{round}.deleted"):
      shutil.move(path / "_CHECKPOINT_METADATA", folder.parent / "gone")
      die()
    real_rmtree(path, *arguments, **options)

  def watch():
    part = folder / f"{round}.orbax-checkpoint-tmp"
    while not part.exists() or not any(part.iterdir()):
      time.sleep(1e-4)
    die()

  def snapshot():
    if point == "snapshot" and store.value == round:
      die()

  os.rename, shutil.rmtree = rename, rmtree
  store.snapshot_hook = snapshot
  if point == "write":
    threading.Thread(target=watch, daemon=True).start()
  if point == "random":
    threading.Timer(random.Random(round).uniform(0, 0.4), die).start()


def save_all(folder, store, rounds=ROUNDS):
  """Restores what there is and saves the rounds that are left."""
  with checkpoint.Checkpointer(
    folder, keep_last=KEEP_LAST, items={"store": store}
  ) as checkpointer:
    restored = checkpointer.restore(state(0))
    first = restored[0] if restored else 0
    assert first in (0, store.value)
    for round in range(first + 1, rounds + 1):
      store.value = round
      checkpointer.save(round, state(round), {"round": round})


def main():
  for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
      folder, store = pathlib.Path(order["folder"]), Store()
      arm(order["point"], order["round"], folder, store)
      save_all(folder, store, order["rounds"])
      os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
  main()
