"""What is kept, what a manifest says, and what a reader sees meanwhile."""

import hashlib
import json

import jax
import numpy as np
import pytest

from fedfm import checkpoint, errors


def state(round):
  return {"w": np.full((30, 20), round, np.float32), "key": jax.random.key(7)}


def names(folder):
  return {p.name for p in folder.iterdir()}


def test_the_newest_regular_round_is_kept(tmp_path):
  with checkpoint.Checkpointer(
    tmp_path, keep_last=1, regular=4
  ) as checkpointer:
    for round in (4, 5, 6):
      checkpointer.save(round, state(round))
    checkpointer.wait()
    assert names(tmp_path) == {"4", "6"}
    for round in (8, 9):
      checkpointer.save(round, state(round))
  assert names(tmp_path) == {"8", "9"}


def test_only_chosen_rounds_are_restored(tmp_path):
  with checkpoint.Checkpointer(tmp_path, keep_last=None) as checkpointer:
    for round in range(1, 6):
      checkpointer.save(round, state(round))
    target = state(0)
    assert checkpointer.restore(target, choose=lambda r: r < 4)[0] == 3
    assert checkpointer.restore(target, choose=lambda r: r > 5) is None
    (tmp_path / "4" / "_CHECKPOINT_METADATA").write_text("{}")
    even = checkpointer.restore(target, choose=lambda r: r % 2 == 0)
    assert even[0] == 2
  assert names(tmp_path) == {"1", "2", "3", "4.damaged", "5"}


def test_a_manifest_says_what_made_it(tmp_path):
  run = {"config": {"rounds": 3}, "config_digest": "0" * 64, "base": None}
  with checkpoint.Checkpointer(tmp_path, run=run) as checkpointer:
    checkpointer.save(1, state(1), {"losses": [0.1]}, block=True)
    manifest = checkpointer.manifest(1)
    checkpointer.verify(1)
  assert manifest["run"] == run and manifest["extra"] == {"losses": [0.1]}
  assert manifest["versions"]["jax"] == jax.__version__
  assert manifest["saved"].startswith("20") and manifest["format"] == 2
  assert [leaf["path"] for leaf in manifest["leaves"]] == ["key", "w"]


def test_an_older_format_is_refused_and_stays(tmp_path):
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state(1), block=True)
    file = tmp_path / "1" / "_CHECKPOINT_METADATA"
    metadata = json.loads(file.read_text())
    old = metadata["custom_metadata"]["fedfm"] | {"format": 1}
    del old["digest"]
    text = json.dumps(old, sort_keys=True).encode()
    old["digest"] = hashlib.sha256(text).hexdigest()
    metadata["custom_metadata"]["fedfm"] = old
    file.write_text(json.dumps(metadata))
    with pytest.raises(errors.CheckpointError, match="1 is older than 2"):
      checkpointer.restore(state(0))
  assert names(tmp_path) == {"1"}


def test_verify_reads_everything(tmp_path):
  with checkpoint.Checkpointer(tmp_path, keep_last=None) as checkpointer:
    for round in (1, 2):
      checkpointer.save(round, state(round), block=True)
    for path in (tmp_path / "2" / "state").rglob("d/*"):
      path.write_bytes(path.read_bytes()[:-9])
    checkpointer.verify(1)
    with pytest.raises(checkpoint.DamagedError, match="2: unreadable"):
      checkpointer.verify(2)
    with pytest.raises(errors.CheckpointError, match="no such checkpoint"):
      checkpointer.verify(3)
  assert names(tmp_path) == {"1", "2"}
