"""What is restored is bit for bit what was saved, or named and refused."""

import hashlib
import json
import logging
import pathlib
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from fedfm import checkpoint, errors, sharding
from fedfm.checkpoint import manifest


def make_state(mesh, seed=0):
  """A state with every kind of leaf that a run keeps, on one mesh."""
  rng = np.random.default_rng(seed)

  def put(x, *spec):
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P(*spec)))

  w = rng.normal(size=(8, 4)).astype(np.float32)
  w[0, 0], w[1, 1] = np.nan, -0.0
  return {
    "trainable": {
      "w": put(w, "clients", "fsdp"),
      "v": put(-w, "fsdp"),
      "half": put(w.astype(jnp.bfloat16), None, "clients"),
      "nothing": put(np.zeros((0, 3), np.float32)),
    },
    "keys": put(jax.random.split(jax.random.key(seed), 8), "clients"),
    "optimizer": (put(np.int32(seed + 7)), {"flag": put(np.array([True]))}),
    "store": rng.integers(0, 100, (3, 5)),
  }


def raw(tree):
  """Path -> dtype and bytes of every leaf."""
  return {
    path: (str(x.dtype), manifest.host(x).tobytes())
    for path, x in manifest.named_leaves(tree).items()
  }


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh({"clients": 4, "fsdp": 2})


@pytest.fixture(scope="module")
def saved(mesh, tmp_path_factory):
  """A folder with rounds 1 and 2, copied by each test that damages it."""
  folder = tmp_path_factory.mktemp("saved")
  with checkpoint.Checkpointer(folder) as checkpointer:
    for r in (1, 2):
      checkpointer.save(r, make_state(mesh, r), {"round": r, "epsilon": 0.1})
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


@pytest.mark.parametrize("clients,fsdp", [(4, 2), (1, 2), (1, 1)])
def test_restores_the_same_bits_on_any_mesh(saved, mesh, clients, fsdp):
  devices = jax.devices()[: clients * fsdp]
  other = sharding.make_mesh({"clients": clients, "fsdp": fsdp}, devices)
  target = checkpoint.abstract(make_state(other))
  with checkpoint.Checkpointer(saved, read_only=True) as checkpointer:
    round, state, extra = checkpointer.restore(target)
  assert (round, extra) == (2, {"round": 2, "epsilon": 0.1})
  assert raw(state) == raw(make_state(mesh, 2))
  assert isinstance(state["store"], np.ndarray)
  for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(target)):
    if isinstance(want, jax.ShapeDtypeStruct):
      assert got.sharding == want.sharding and got.dtype == want.dtype
  jax.random.normal(state["keys"][0], ())


def test_restores_a_round_by_number_and_lists_them(saved, mesh):
  with checkpoint.Checkpointer(saved, read_only=True) as checkpointer:
    assert checkpointer.all_rounds() == [1, 2] and checkpointer.latest() == 2
    _, state, _ = checkpointer.restore(make_state(mesh), round=1)
    with pytest.raises(errors.CheckpointError, match=r"no such .* \[1, 2\]"):
      checkpointer.restore(make_state(mesh), round=3)
  assert raw(state) == raw(make_state(mesh, 1))


def test_nothing_intact_restores_nothing(tmp_path, folder, mesh):
  with checkpoint.Checkpointer(tmp_path / "new") as checkpointer:
    assert checkpointer.restore(make_state(mesh)) is None
    assert checkpointer.latest() is None
  for r in ("1", "2"):
    shutil.rmtree(folder / r / "state")
  with checkpoint.Checkpointer(folder) as checkpointer:
    assert checkpointer.restore(make_state(mesh)) is None
    assert checkpointer.all_rounds() == []


def test_the_state_may_be_donated_while_it_is_saved(tmp_path, mesh):
  def put(x):
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("fsdp")))

  step = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  x = put(np.arange(2**18, dtype=np.float32))
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.save(1, {"x": x})
    x = step(x)
    checkpointer.wait()
    _, state, _ = checkpointer.restore({"x": x})
  np.testing.assert_array_equal(state["x"], np.arange(2**18))


def test_uncommitted_leaves_stay_uncommitted(tmp_path, mesh):
  state = {"round": jnp.zeros((), jnp.int32), "key": jax.random.key(1)}
  with checkpoint.Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state)
    _, restored, _ = checkpointer.restore(state)
  w = make_state(mesh)["trainable"]["v"]
  assert jax.jit(lambda w, s: w[0, 0] + s["round"])(w, restored).shape == ()
  assert raw(restored) == raw(state)


def _data_files(folder):
  return [p for p in (folder / "2" / "state").rglob("d/*") if p.is_file()]


def _flip(path, position):
  data = bytearray(path.read_bytes())
  data[position] ^= 4
  path.write_bytes(data)


def flip_stored_byte(folder):
  """Changes one weight in a way that every format check accepts."""
  spec = {
    "driver": "zarr3",
    "kvstore": f"file://{folder}/2/state/|ocdbt:trainable/v/",
  }
  array = ts.open(spec).result()
  value = np.array(array.read().result())
  value.view(np.uint8)[3, 2] ^= 1
  array.write(value).result()


def flip_file_bytes(folder):
  for path in _data_files(folder):
    _flip(path, path.stat().st_size // 2)


def truncate(folder):
  for path in _data_files(folder):
    path.write_bytes(path.read_bytes()[:-20])


def delete_data(folder):
  for path in _data_files(folder):
    path.unlink()


def delete_metadata(folder):
  (folder / "2" / "_CHECKPOINT_METADATA").unlink()


def swap_leaves(folder):
  store = ts.KvStore.open(f"file://{folder}/2/state/|ocdbt:").result()
  a, b = b"trainable/v/", b"trainable/w/"
  values = {k: store.read(k).result().value for k in store.list().result()}
  for key in values:
    if key.startswith((a, b)):
      store.delete_range(ts.KvStore.KeyRange(key, key + b"\0")).result()
  for key, value in values.items():
    for old, new in ((a, b), (b, a)):
      if key.startswith(old):
        store.write(key.replace(old, new), value).result()


def edit_extra(folder):
  path = folder / "2" / "_CHECKPOINT_METADATA"
  text = path.read_text()
  assert '"epsilon": 0.1' in text
  path.write_text(text.replace('"epsilon": 0.1', '"epsilon": 0.2'))


def empty_folder(folder):
  shutil.rmtree(folder / "2")
  (folder / "2").mkdir()


def a_file(folder):
  shutil.rmtree(folder / "2")
  (folder / "2").write_text("")


def another_round(folder):
  shutil.rmtree(folder / "2")
  shutil.copytree(folder / "1", folder / "2")


DAMAGE = {
  flip_stored_byte: "leaf trainable/v: got digest",
  flip_file_bytes: "unreadable",
  truncate: "unreadable",
  delete_data: "unreadable",
  delete_metadata: "unreadable: FileNotFoundError",
  swap_leaves: "leaf trainable/[vw]: got digest",
  edit_extra: "manifest was changed",
  empty_folder: "unreadable: FileNotFoundError",
  a_file: "unreadable: NotADirectoryError",
  another_round: "holds round 1",
}


@pytest.mark.parametrize("damage,named", DAMAGE.items())
def test_damage_is_set_aside_and_the_round_before_used(
  folder, mesh, caplog, damage, named
):
  damage(folder)
  state = make_state(mesh)
  with checkpoint.Checkpointer(folder, read_only=True) as reader:
    with pytest.raises(checkpoint.DamagedError, match=named):
      reader.restore(state, round=2)
    assert reader.restore(state)[0] == 1
  assert (folder / "2").exists()  # a reader moves nothing
  caplog.clear()
  with checkpoint.Checkpointer(folder) as checkpointer:
    with caplog.at_level(logging.WARNING, logger="fedfm"):
      round, state, _ = checkpointer.restore(state)
    assert round == 1 and raw(state) == raw(make_state(mesh, 1))
    (warning,) = [r.getMessage() for r in caplog.records if "fedfm" in r.name]
    assert "2.damaged" in warning and "\n" not in warning
    assert (folder / "2.damaged").exists()
    # training goes on and saves the same round again
    assert checkpointer.save(2, make_state(mesh, 2), block=True)
    assert checkpointer.restore(state)[0] == 2


def test_one_flipped_bit_anywhere_is_harmless_or_found(saved, mesh, tmp_path):
  rng = np.random.default_rng(0)
  names = sorted(p.relative_to(saved) for p in saved.rglob("2/**/*"))
  names = [n for n in names if (saved / n).is_file()]
  names = [n for n in names if (saved / n).stat().st_size]
  state, whole = make_state(mesh), raw(make_state(mesh, 2))
  found = 0
  for i, name in enumerate(rng.choice(names, 12)):
    folder = shutil.copytree(saved, tmp_path / str(i))
    _flip(folder / name, rng.integers((folder / name).stat().st_size))
    with checkpoint.Checkpointer(folder) as checkpointer:
      round, restored, _ = checkpointer.restore(state)
    found += round == 1
    assert round == 1 or raw(restored) == whole
  assert found > 0


def test_damage_twice_keeps_both(folder, mesh):
  with checkpoint.Checkpointer(folder) as checkpointer:
    for _ in range(2):
      delete_metadata(folder)
      checkpointer.restore(make_state(mesh))
      checkpointer.save(2, make_state(mesh, 2), block=True)
  names = {p.name for p in folder.iterdir()}
  assert names == {"1", "2", "2.damaged", "2.damaged.2"}


WRONG = {
  "leaf trainable/v: got dtype float32, expected float16": lambda t, s: (
    t.update(v=t["v"].astype(jnp.float16))
  ),
  r"leaf trainable/v: got shape \[8, 4\], expected \[4, 8\]": lambda t, s: (
    t.update(v=t["v"].T)
  ),
  "leaf trainable/vv: not in the checkpoint .*'trainable/v'": lambda t, s: (
    t.update(vv=t.pop("v"))
  ),
  "leaf store: not in the target": lambda t, s: s.pop("store"),
  "leaf keys: got dtype key<fry>, expected key<rbg>": lambda t, s: s.update(
    keys=jax.random.split(jax.random.key(0, impl="rbg"), 8)
  ),
}


@pytest.mark.parametrize("message,change", WRONG.items())
def test_a_wrong_target_is_an_error_and_moves_nothing(
  folder, mesh, change, message
):
  target = make_state(mesh)
  change(target["trainable"], target)
  with checkpoint.Checkpointer(folder) as checkpointer:
    with pytest.raises(errors.CheckpointError, match=message) as info:
      checkpointer.restore(target)
    assert checkpointer.all_rounds() == [1, 2]
  assert "\n" not in str(info.value)
  assert not isinstance(info.value, checkpoint.DamagedError)


def test_a_newer_format_is_an_error_and_moves_nothing(folder, mesh):
  path = folder / "2" / "_CHECKPOINT_METADATA"
  metadata = json.loads(path.read_text())
  newer = metadata["custom_metadata"]["fedfm"] | {"format": 3}
  del newer["digest"]
  text = json.dumps(newer, sort_keys=True).encode()
  newer["digest"] = hashlib.sha256(text).hexdigest()
  metadata["custom_metadata"]["fedfm"] = newer
  path.write_text(json.dumps(metadata))
  checkpointer = checkpoint.Checkpointer(folder)
  with pytest.raises(errors.CheckpointError, match="format 3 is newer than"):
    checkpointer.restore(make_state(mesh))
  assert checkpointer.all_rounds() == [1, 2]


def test_saving_a_round_again(folder, mesh):
  with checkpoint.Checkpointer(folder) as checkpointer:
    same = make_state(mesh, 2), {"round": 2, "epsilon": 0.1}
    assert not checkpointer.save(2, *same)
    assert checkpointer.save(2, make_state(mesh, 3), {}, block=True)
    _, state, extra = checkpointer.restore(make_state(mesh))
  assert extra == {} and raw(state) == raw(make_state(mesh, 3))
  assert {p.name for p in folder.iterdir()} == {"1", "2"}


def test_retention(tmp_path):
  losses = [5.0, 1.0, 4.0, 3.0, 9.0, 8.0, 7.0, 6.0]
  with checkpoint.Checkpointer(
    tmp_path, keep_last=2, keep_every=4, keep_best=lambda extra: extra["loss"]
  ) as checkpointer:
    for r, loss in enumerate(losses, start=1):
      checkpointer.save(r, {"x": np.full(2, r)}, {"loss": loss})
  assert {p.name for p in tmp_path.iterdir()} == {"2", "4", "7", "8"}


def test_a_full_disk_is_an_error_and_older_rounds_stay(folder, mesh):
  state = make_state(mesh)
  big = {"x": np.random.default_rng(0).integers(0, 256, 2**21, np.uint8)}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with checkpoint.Checkpointer(folder) as checkpointer:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, limits[1]))
    try:
      with pytest.raises(
        errors.CheckpointError, match=r"not saved: .*\[1, 2\]"
      ):
        checkpointer.save(3, big)
        checkpointer.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpointer.restore(state)[0] == 2
    assert checkpointer.save(3, big, block=True)
    assert checkpointer.latest() == 3
  assert {p.name for p in folder.iterdir()} == {"1", "2", "3"}


def test_leftovers_of_a_killed_save_are_no_checkpoint(folder, mesh):
  (folder / "3.orbax-checkpoint-tmp").mkdir()
  with checkpoint.Checkpointer(folder) as checkpointer:
    assert checkpointer.restore(make_state(mesh))[0] == 2
    assert checkpointer.save(4, make_state(mesh), block=True)
  assert {p.name for p in folder.iterdir()} == {"1", "2", "4"}


def test_refusals_before_anything_is_written(tmp_path, saved):
  with pytest.raises(errors.ConfigError, match="keep_last: got 0"):
    checkpoint.Checkpointer(tmp_path, keep_last=0)
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.CheckpointError, match="file"):
    checkpoint.Checkpointer(tmp_path / "file")
  with pytest.raises(errors.CheckpointError, match="missing"):
    checkpoint.Checkpointer(tmp_path / "missing", read_only=True)
  with pytest.raises(errors.CheckpointError, match="reading only"):
    checkpoint.Checkpointer(saved, read_only=True).save(3, {"x": np.ones(1)})
  checkpointer = checkpoint.Checkpointer(tmp_path)
  with pytest.raises(errors.CheckpointError, match="leaf x is int"):
    checkpointer.save(1, {"x": 1})
  with pytest.raises(errors.CheckpointError, match="extra: not JSON"):
    checkpointer.save(1, {"x": np.ones(1)}, {"epsilon": float("nan")})
  assert checkpointer.all_rounds() == []


def test_digest_is_of_content_not_of_placement(mesh):
  other = sharding.make_mesh({"clients": 2}, jax.devices()[:2])
  state = make_state(mesh)
  name = checkpoint.digest(state)
  assert name == checkpoint.digest(make_state(other))
  assert re.fullmatch("sha256:[0-9a-f]{64}", name)
  t = state["trainable"]
  changed = [
    make_state(mesh, 1),
    state | {"trainable": t | {"v": t["w"], "w": t["v"]}},
    state | {"trainable": t | {"v": t["v"].T}},
  ]
  names = {checkpoint.digest(s) for s in changed}
  assert len(names) == 3 and name not in names
