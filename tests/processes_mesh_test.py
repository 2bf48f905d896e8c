"""Meshes whose `fsdp` or `tensor` axis crosses processes, and which lanes."""

import json
import pathlib
import socket
import subprocess
import sys

import jax
import mesh_questions
import mesh_rounds
import numpy as np
import pytest
import script_runs

from fedfm import clients, data, errors, sharding

FOLDER = pathlib.Path(__file__).parent


def run_two(script, *names):
  """Runs a script as two processes of four devices; returns what they print."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  env = script_runs.environment(devices=4)
  running = [
    subprocess.Popen(
      [sys.executable, str(FOLDER / script), str(port), str(index), *names],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  printed = []
  for process in running:
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    # Gloo tells on standard output whom it is connected to.
    printed.append(json.loads(out.splitlines()[-1]))
  return printed


@pytest.mark.parametrize(
  "names",
  [
    ["a shard over all", "two shards of both"],
    pytest.param(list(mesh_rounds.MESHES)[2:], marks=pytest.mark.slow),
  ],
)
def test_an_axis_that_crosses_processes_has_the_numbers_of_one(names):
  expected = mesh_rounds.numbers("a shard each")
  assert expected["metrics"]["clients/participating"] == len(mesh_rounds.SIZES)
  for printed in run_two("mesh_rounds.py", *names):
    for name in names:
      jax.tree.map(
        lambda got, want, name=name: np.testing.assert_allclose(
          got, want, rtol=1e-5, atol=1e-7, err_msg=name
        ),
        printed[name],
        expected,
      )
    # Lanes that were dealt out by the process, as if it owned their shard.
    tensor_only, two_of_both = printed["refusals"]
    assert "of 2, but its devices hold [0, 1] of this mesh" in tensor_only
    assert "of 4, but its devices hold [0, 1, 2, 3] of" in two_of_both


@pytest.mark.slow
def test_a_model_that_is_split_over_processes_answers_as_one():
  one = sharding.make_mesh({"clients": 1}, jax.devices()[:1])
  expected = mesh_questions.answers(one)
  assert expected["said"] == [1, 1]
  assert run_two("mesh_questions.py") == [expected, expected]


class Chip:
  """What a mesh asks of a device of a process that is not here."""

  platform = device_kind = "cpu"

  def __init__(self, number, per_process):
    self.id, self.process_index = number, number // per_process


def mesh_of(axes, per_process=4, order=None):
  chips = [Chip(i, per_process) for i in range(int(np.prod([*axes.values()])))]
  if order is not None:
    chips = [chips[i] for i in order]
  return sharding.make_mesh(axes, chips)


@pytest.mark.parametrize(
  ("axes", "lanes", "expected"),
  [
    # As the pod configs have it: 256 or 128 hosts of four chips, and two.
    (
      {"clients": 16, "fsdp": 64},
      64,
      lambda p: range(p // 16 * 4, p // 16 * 4 + 4),
    ),
    ({"clients": 8, "fsdp": 64}, 8, lambda p: [p // 16]),
    ({"clients": 1, "fsdp": 256, "tensor": 4}, 1, lambda p: [0]),
    ({"clients": 1, "fsdp": 8}, 3, lambda p: [0, 1, 2]),
    # Whole shards in a process: equal blocks of the lanes.
    (
      {"clients": 512, "fsdp": 2},
      1024,
      lambda p: range(4 * p, 4 * p + 4),
    ),
    ({"clients": 4, "tensor": 4}, 4, lambda p: [p]),
  ],
)  # fmt: skip
def test_a_process_has_the_lanes_of_its_devices(axes, lanes, expected):
  mesh = mesh_of(axes)
  count = mesh.size // 4
  for process in {0, 1, count // 2, count - 1}:
    got = clients.own_lanes(mesh, lanes, process)
    assert got == list(expected(process))
  assert clients.own_lanes(mesh, lanes, count) == []


def test_shards_of_a_process_need_not_be_neighbours():
  """As on a torus, where an axis goes through the hosts in another way."""
  dealt = [i // 2 + i % 2 * 4 for i in range(8)]
  mesh = mesh_of({"clients": 8}, order=dealt)
  assert clients.own_lanes(mesh, 16, 1) == [2, 3, 6, 7, 10, 11, 14, 15]
  mesh = mesh_of({"clients": 4, "fsdp": 2}, order=dealt)
  assert clients.own_lanes(mesh, 4, 1) == [0, 1, 2, 3]


def test_shards_that_do_not_divide_the_lanes_are_refused():
  with pytest.raises(errors.ConfigError) as raised:
    clients.own_lanes(mesh_of({"clients": 8, "fsdp": 4}), 12)
  assert str(raised.value) == "lanes: mesh.clients = 8 does not divide 12 lanes"


def test_any_lanes_can_be_packed_alone():
  """Such as those of a process whose devices are apart; others' clients too."""
  source = mesh_rounds.make_source()
  whole = data.pack(source, source.ids, batch_size=2, lanes=4)
  part = data.pack(
    source, source.ids, batch_size=2, lanes=4, own_lanes=[0, 2, 3]
  )
  assert part.part == (4, (0, 2, 3))
  assert whole.part is None
  for name in ("slot", "start", "end", "id_hash", "row", "num_steps", "weight"):
    expected = getattr(whole, name)[[0, 2, 3]]
    np.testing.assert_array_equal(getattr(part, name), expected)
  for name, expected in whole.batches.items():
    np.testing.assert_array_equal(part.batches[name], expected[[0, 2, 3]])
  for name in ("boundaries", "num_segments", "order"):
    np.testing.assert_array_equal(getattr(part, name), getattr(whole, name))


def test_a_part_is_not_taken_for_all_lanes():
  """Nor in one process, where it would be a smaller cohort."""
  source = mesh_rounds.make_source()
  part = data.pack(source, source.ids, batch_size=8, lanes=4, own_lanes=[1, 3])
  mesh = sharding.make_mesh({"clients": 1}, jax.devices()[:1])
  with pytest.raises(errors.ConfigError) as raised:
    clients.put(part, mesh)
  assert str(raised.value) == (
    "lanes: process 0 packed lanes [1, 3] of 4, but its devices hold "
    "[0, 1, 2, 3] of this mesh; expected "
    "data.pack(own_lanes=clients.own_lanes(mesh, 4))"
  )
