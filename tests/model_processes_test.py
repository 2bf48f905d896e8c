"""Two processes load and save one model: each reads its own part only."""

import json
import pathlib
import socket
import subprocess
import sys

from make_model_fixtures import FIXTURES
import pytest
from safetensors import numpy as safetensors_numpy
import script_runs

ROOT = pathlib.Path(__file__).parent.parent
SOURCE = FIXTURES / "gemma3"
CHILD = """
import json, sys
import jax
port, index, source, output = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(index))
from fedfm import model_folders, sharding
from fedfm.checkpoint import manifest
from fedfm.models import huggingface, tensor_files

read = []
original = tensor_files.TensorEntry.read

def counted(self, index):
  part = original(self, index)
  read.append(part.size)
  return part

tensor_files.TensorEntry.read = counted
mesh = sharding.make_mesh({"clients": 1, "fsdp": 2, "tensor": 1})
model, params = huggingface.load(source, mesh=mesh)
leaves = jax.tree.leaves(params)
held = sum(s.data.size for x in leaves for s in x.addressable_shards)
huggingface.save(output + "/saved", model, params, max_shard_bytes=4000)
model_folders.convert(source, output + "/orbax", "orbax", mesh)
_, again = model_folders.load(output + "/orbax", mesh)
assert manifest.digest(again) == manifest.digest(params)
whole = sum(x.size for x in leaves)
first = sum(read[: len(read) // 2])  # The conversion loads once more.
print(json.dumps({"read": first, "held": held, "whole": whole}))
"""


@pytest.mark.slow
def test_two_processes_load_and_save(tmp_path):
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  env = script_runs.environment(devices=1)
  arguments = [str(SOURCE), str(tmp_path)]
  running = [
    subprocess.Popen(
      [sys.executable, "-c", CHILD, str(port), str(i), *arguments],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  for process in running:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    counts = json.loads(out.splitlines()[-1])
    # What is not split, embeddings and norms, is in both.
    assert counts["read"] == counts["held"] < 0.75 * counts["whole"]
  want = safetensors_numpy.load_file(SOURCE / "model.safetensors")
  got = {}
  files = sorted((tmp_path / "saved").glob("model-*.safetensors"))
  assert len(files) > 2
  for file in files:
    got |= safetensors_numpy.load_file(file)
  assert got.keys() == want.keys()
  for name, value in want.items():
    assert got[name].tobytes() == value.tobytes(), name
