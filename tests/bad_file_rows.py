"""Bad files and folders, and what the one line about them must say."""

import io
import json
import shutil

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from fedfm import checkpoint

HEAD = (
  "import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict"
)
CONFIG_FILES = {
  "empty": ("", r"--config: .*config.py has no get_config"),
  "not Python": ("rounds: 3\n\0", r"--config: .* failed: SyntaxError"),
  "a mistake": ("import nowhere\n", r"--config: .* ModuleNotFoundError"),
  "ends": ("raise SystemExit(0)\n", r"--config: .* failed: SystemExit"),
  "a dict": (
    "def get_config():\n  return {}\n",
    r"--config: get_config.. of .* returned dict, expected a ConfigDict",
  ),
  "a field for a group": (
    f"{HEAD}({{'data': 3}})\n",
    r"data: got 3, expected fields",
  ),
  "a rate of 400 digits": (
    f"{HEAD}({{'client': {{'learning_rate': 10**400}}}})\n",
    r"client.learning_rate: got an integer of 1329 bits, expected .* 63",
  ),
  "an option of 400 digits": (
    f"{HEAD}({{'algorithm_options': {{'mu': 10**400}}}})\n",
    r"algorithm_options.mu: got an integer of 1329 bits",
  ),
  "a seed of 5,000 digits": (
    f"{HEAD}({{'seed': 10**5000}})\n",
    r"seed: got an integer of 16610 bits",
  ),
  "rounds of 5,000 digits": (
    f"{HEAD}({{'rounds': 10**5000}})\n",
    r"rounds: got an integer of 16610 bits",
  ),
  "a list of 5,000 digits": (
    f"{HEAD}({{'data': {{'path': [10**5000]}}}})\n",
    r"data.path: got a value of very many digits, expected str",
  ),
}
GOOD = b'{"client": "ann", "text": "good"}\n'
DATA = {
  "empty file": (b"", r"got no rows"),
  "no client": (b"\n\n", r"got no rows"),
  "not JSON": (GOOD + b"{", r"bad.jsonl:2: not JSON"),
  "a list": (GOOD + b"[1]", r"bad.jsonl:2: got a JSON list"),
  "deep": (GOOD + b"[" * 100_000, r"bad.jsonl:2: not JSON"),
  "missing key": (GOOD + b'{"client": "bo"}', r":2: key 'text' is missing"),
  "a number": (GOOD + b'{"client": 1, "text": ""}', r":2: 'client' is int"),
  "no id": (GOOD + b'{"client": "", "text": "x"}', r":2: 'client' is empty"),
  "no text": (GOOD + b'{"client": "bo", "text": ""}', r"'bo': has no text"),
  "not UTF-8": (GOOD + b'{"client": "\xff"}', r":2: not UTF-8 at byte 12"),
  "surrogate": (
    GOOD + b'{"client": "bo", "text": "\\ud800"}',
    r":2: 'text' holds a lone surrogate",
  ),
}


def edit_config(**fields):
  def edit(model):
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))

  return edit


def edit_weights(change):
  def edit(model):
    file = model / "model.safetensors"
    weights = safetensors_numpy.load_file(file)
    change(weights)
    safetensors_numpy.save_file(weights, file, metadata={"format": "pt"})

  return edit


def edit_bytes(change, name="model.safetensors"):
  return lambda model: (model / name).write_bytes(
    change((model / name).read_bytes())
  )


def twice(data):
  """Gives the first tensor's name a second entry in the header."""
  length = int.from_bytes(data[:8], "little")
  header = data[8 : 8 + length].rstrip()
  entries = json.loads(header)
  name = next(k for k in entries if k != "__metadata__")
  header = header[:-1] + f', "{name}": {json.dumps(entries[name])}}}'.encode()
  return len(header).to_bytes(8, "little") + header + data[8 + length :]


def a_file(model):
  shutil.rmtree(model)
  model.write_text("weights")


def only(name, content):
  """Leaves but one file beside the config."""

  def edit(model):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(content)

  return edit


def objects():
  buffer = io.BytesIO()
  np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
  return buffer.getvalue()


def missing_shard(model):
  name, index = "model-00001-of-00002.safetensors", {}
  with safetensors.safe_open(model / "model.safetensors", "np") as file:
    index["weight_map"] = dict.fromkeys(file.keys(), name)
  (model / "model.safetensors").unlink()
  (model / "model.safetensors.index.json").write_text(json.dumps(index))


def sharded(model):
  (model / "model.safetensors").unlink()
  index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
  (model / "model.safetensors.index.json").write_text(json.dumps(index))


NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"
WEIGHTS = {
  "no folder": (shutil.rmtree, r"model: found no model"),
  "a file": (a_file, r"/model: "),
  "pt": (only("model.pt", b"PK\x03\x04"), r"model.pt: pickled weights"),
  "object npy": (only("model.npy", objects()), r"model.npy: pickled weights"),
  "missing shard": (missing_shard, r"00001-of-00002.safetensors: no such file"),
  "transposed": (
    edit_weights(lambda w: w.update({UP: np.ascontiguousarray(w[UP].T)})),
    r"up_proj.weight has shape \[16, 32\], expected \[32, 16\]",
  ),
  "no weights": (
    lambda m: (m / "model.safetensors").unlink(),
    r"found neither model.safetensors nor",
  ),
  "pickle": (
    lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
    r"pytorch_model.bin: pickled weights .* not read",
  ),
  "pickle inside": (edit_bytes(lambda b: b"\x80\x04" + b), r"pickled weights"),
  "truncated": (edit_bytes(lambda b: b[:-4]), r"truncated or damaged"),
  "cut header": (edit_bytes(lambda b: b[:20]), r"truncated"),
  "empty": (edit_bytes(lambda b: b""), r"truncated"),
  "name twice": (edit_bytes(twice), r"is given twice"),
  "outside shard": (sharded, r"names '../other.safetensors', expected a file"),
  "NaN": (
    edit_weights(lambda w: w[NORM].fill(np.nan)),
    r"model.norm.weight holds NaN",
  ),
  "missing": (edit_weights(lambda w: w.pop(NORM)), r"norm.weight is missing"),
  "extra": (
    edit_weights(lambda w: w.update(more=w[NORM])),
    r"tensor more .* is not part",
  ),
  "shape": (
    edit_weights(lambda w: w.update({NORM: w[NORM][:3]})),
    r"norm.weight has shape \[3\], expected \[16\]",
  ),
  "integers": (
    edit_weights(lambda w: w.update({NORM: w[NORM].astype(np.int32)})),
    r"norm.weight is I32",
  ),
  "config cut": (edit_bytes(lambda b: b[:9], "config.json"), r"bad JSON"),
  "code": (
    edit_config(architectures=["Own"], auto_map={"AutoModel": "own.Own"}),
    r"Own",
  ),
}


def newer_format(workdir):
  file = workdir / "checkpoints" / "1" / "_CHECKPOINT_METADATA"
  metadata = json.loads(file.read_text())
  manifest = metadata["custom_metadata"]["fedfm"] | {"format": 9}
  del manifest["digest"]
  manifest["digest"] = checkpoint.json_digest(manifest)
  metadata["custom_metadata"]["fedfm"] = manifest
  file.write_text(json.dumps(metadata))


def checkpoints_file(workdir):
  shutil.rmtree(workdir / "checkpoints")
  (workdir / "checkpoints").write_text("")


def another_seed(workdir):
  file = workdir / "config.json"
  config = json.loads(file.read_text()) | {"seed": 3}
  file.write_text(json.dumps(config))


RUNS = {
  "another config": (another_seed, r"another config: seed: had 3, now 0"),
  "newer format": (newer_format, r"checkpoints/1: format 9 is newer than 2"),
  "checkpoints a file": (checkpoints_file, r"not a folder of checkpoints"),
  "broken config": (
    lambda w: (w / "config.json").write_text("{"),
    r"config.json: not JSON",
  ),
  "not a run": (
    lambda w: (w / "config.json").unlink(),
    r"workdir: .* is not a run",
  ),
}
