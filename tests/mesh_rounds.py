"""Rounds on meshes of eight devices, here or in a process with half of them.

As a script: `mesh_rounds.py PORT INDEX MESH...` is one of two processes with
four devices each; it prints what `numbers` gives, and `refusals`.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedfm import algorithms, clients, data, errors, sharding

# Axis sizes, lanes, and whether neighbours in the mesh are of two processes.
MESHES = {
  "a shard over all": ({"clients": 1, "fsdp": 8}, 1, False),
  "two shards of both": ({"clients": 2, "fsdp": 4}, 4, True),
  "fsdp and tensor": ({"clients": 1, "fsdp": 4, "tensor": 2}, 3, False),
  "tensor only": ({"clients": 1, "tensor": 8}, 2, False),
  "tensor across": ({"clients": 4, "tensor": 2}, 4, True),
  "a shard each": ({"clients": 2, "fsdp": 2, "tensor": 2}, 2, False),
  "lanes only": ({"clients": 8}, 16, True),
}
SIZES = [3, 9, 17, 2, 5, 4, 1, 8, 12, 6]


def make_mesh(name):
  axes, _, dealt = MESHES[name]
  devices = jax.devices()
  if dealt:  # Device 0 of the first process, 0 of the second, 1 of the first.
    devices = [devices[i // 2 + i % 2 * 4] for i in range(8)]
  return sharding.make_mesh(axes, devices)


def make_source():
  rng = np.random.default_rng(0)
  return data.from_arrays(
    {
      f"client {i}": {
        "x": rng.normal(size=(n, 3)).astype(np.float32),
        "y": rng.normal(size=n),  # float64, which jax makes float32.
      }
      for i, n in enumerate(SIZES)
    }
  )


def loss(w, base, batch, key):
  del base, key
  squares = (batch["x"] @ w - batch["y"]) ** 2
  count = batch["mask"].sum()
  return (squares * batch["mask"]).sum() / jnp.maximum(count, 1), {
    "tokens": count
  }


def numbers(name):
  """Runs two rounds of SCAFFOLD; checks on the way what lies where.

  Returns:
    What comes of them: numbers by name.
  """
  mesh, lanes, source = make_mesh(name), MESHES[name][1], make_source()
  read = []
  watched = dataclasses.replace(
    source, read_fn=lambda c: read.append(c) or source.read(c)
  )
  own = clients.own_lanes(mesh, lanes)
  packed, whole = (
    [
      data.pack(
        s,
        source.ids,
        batch_size=8,
        lanes=lanes,
        shuffle=True,
        round=r,
        own_lanes=o,
      )
      for r in range(2)
    ]
    for s, o in ((watched, own), (source, None))
  )
  cohorts = [clients.put(c, mesh) for c in packed]
  several = clients.put_rounds(packed, mesh)
  check_placed(cohorts[0], whole[0])
  check_placed(several, jax.tree.map(lambda *x: np.stack(x), *whole))
  slots = whole[0].num_steps.shape[1]
  at = whole[0].order[: len(SIZES)] // slots
  mine = {f"client {c}" for c in np.flatnonzero(np.isin(at, own))}
  assert set(read) == mine | {"client 0"}, (set(read), mine)

  algorithm = algorithms.scaffold(
    loss, client_optimizer=optax.sgd(0.1), num_clients=len(SIZES)
  )
  everywhere = jax.NamedSharding(mesh, jax.P())
  with jax.set_mesh(mesh):
    init = jax.jit(algorithm.init, out_shardings=everywhere)
    state = init(np.zeros(3, np.float32))
    step = jax.jit(algorithm.round, out_shardings=everywhere)
    for cohort in cohorts:
      # One dispatch at a time: virtual CPU devices deadlock with more queued.
      state, metrics = jax.block_until_ready(step(state, None, cohort))
  return {
    "trainable": np.asarray(state.trainable).tolist(),
    "clients": [np.asarray(x).tolist() for x in jax.tree.leaves(state.clients)],
    "metrics": {k: np.asarray(v).tolist() for k, v in metrics.items()},
  }


def check_placed(placed, whole):
  for x, expected in zip(jax.tree.leaves(placed), jax.tree.leaves(whole)):
    assert x.shape == expected.shape
    for shard in x.addressable_shards:
      part = expected[shard.index]
      np.testing.assert_array_equal(shard.data, part.astype(shard.data.dtype))


def refusals():
  """Cohorts that lack lanes of this process's devices; returns the errors."""
  said = []
  for name in ("tensor only", "two shards of both"):
    mesh, lanes, source = make_mesh(name), MESHES[name][1], make_source()
    cohort = data.pack(
      source,
      source.ids,
      batch_size=8,
      lanes=lanes,
      process_index=jax.process_index(),
      process_count=2,
    )
    try:
      clients.put(cohort, mesh)
    except errors.ConfigError as e:
      said.append(str(e))
  return said


if __name__ == "__main__":
  port, index, *names = sys.argv[1:]
  jax.distributed.initialize(f"localhost:{port}", 2, int(index))
  result = {name: numbers(name) for name in names}
  print(json.dumps(result | {"refusals": refusals()}))
