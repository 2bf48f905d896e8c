"""Bad input by family, and what the one line about it must say."""

import io
import json
import shutil

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from fedfm import checkpoint

HUGE = "1" + "0" * 400

# Fields, as a command line gives them, and what the line must say.
CONFIG = {
  "client.learning_rat=1": r"client.learning_rat: unknown .*learning_rate'",
  "nothing.at.all=1": r"nothing.at.all: unknown field",
  "rounds=ten": r"rounds: got 'ten', expected int",
  "rounds=1e3": r"rounds: got '1e3', expected int",
  "rounds=0": r"rounds: got 0, expected at least 1",
  "rounds_per_dispatch=0": r"rounds_per_dispatch: got 0, expected at least 1",
  "rounds_per_dispatch=3": (
    r"rounds: got 2, expected a multiple of rounds_per_dispatch = 3"
  ),
  "rounds=-1": r"rounds: got -1, expected at least 1",
  "seed=-1": r"seed: got -1, expected 0 <= seed < 2\*\*32",
  "seed=4294967296": r"seed: got 4294967296, expected",
  "clients_per_round=0": r"clients_per_round: got 0, expected at least 1",
  "clients_per_round=9": r"clients_per_round: got 9, .* has 8 clients",
  "lanes=0": r"lanes: got 0, expected",
  "lanes=12": r"lanes: mesh.clients = 8 does not divide 12",
  "client.learning_rate=nan": r"client.learning_rate: got nan, expected",
  "data.alpha=nan": r"data.alpha: got nan, expected a finite number",
  "client.learning_rate=-1": r"client.learning_rate: got -1.0, expected",
  f"client.learning_rate={HUGE}": r"client.learning_rate: got inf, expected",
  "client.clip_norm=-1": r"client.clip_norm: got -1.0, expected",
  "server.learning_rate=inf": r"server.learning_rate: got inf, expected",
  "client.weighting=tokns": r"client.weighting: got 'tokns' .*'tokens'",
  "sampler=poison": r"sampler: got 'poison' .*'poisson'",
  "algorithm=fedavgg": r"algorithm: got 'fedavgg' .*'fedavg'",
  "aggregator=crum": r"aggregator: got 'crum' .*'krum'",
  "aggregator_options.f=1": r"aggregator_options.f: unknown option",
  "mesh.clients=3": r"mesh: clients=3 .* needs 3 devices, .* are 8",
  "mesh.clients=16": r"mesh: clients=16 .* needs 16 devices, .* are 8",
  "mesh.expert=2": r"mesh.expert: unknown field",
  "mesh.fsdp=0": r"mesh.fsdp: got 0, expected",
  "mesh.fsdp=8": r"client.batch_size: mesh.fsdp = 8 does not divide 2",
  "adapter.rank=17": r"adapter.rank: got 17, expected 1 to 16",
  "adapter.targets=q_prj": r"adapter.targets: .*'q_proj'",
  "data.sequence_length=65": r"data.sequence_length: got 65, .* is 64",
  "deterministic=true": r"lanes: got 'auto', but deterministic",
  "checkpoint.keep_last=0": r"checkpoint.keep_last: got 0, expected",
  "checkpoint.keep_best=eval/unsen/loss": r"checkpoint.keep_best: .*unseen",
  "checkpoint.keep_best=eval/seen/personal_loss": (
    r"checkpoint.keep_best: got 'eval/seen/personal_loss' .*'eval/seen/"
  ),
  "checkpoint.every=0": r"checkpoint.every: got 0, expected at least 1",
  "client.epochs=0": r"client.epochs: got 0, expected at least 1",
  "client.store=disk": r"client.store: got 'disk'",
  "data.schedule=phase": r"data.schedule: .*'phases'",
  "eval.finetune_steps=-1": r"eval.finetune_steps: got -1, expected at least 0",
  "model.quantize=int5": r"model.quantize: got 'int5' .*'int8'",
  "realism.dropout=2": r"realism.dropout: got 2.0",
  "server.average=1": r"server.average: got 1.0, expected 0 <= x < 1",
  "checkpoint.best_is=low": r"checkpoint.best_is: got 'low' .*'lowest'",
  "safety.on_bad_loss=rollback": r"safety.on_bad_loss: .*'roll_back'",
  "safety.max_jump=0.5": r"safety.max_jump: got 0.5, expected more than 1",
  "safety.window=2": r"safety.window: got 2, expected at least 3",
  "model.dtype=float8": r"model.dtype: got 'float8'",
  "data.name=jsonn": r"jsonn",
  "privacy.kind=gausian": r"privacy.kind: got 'gausian' .*'gaussian'",
  "privacy.delta=0": r"privacy.delta: got 0.0, expected in \(0, 1\)",
  "privacy.delta=1": r"privacy.delta: got 1.0, expected in \(0, 1\)",
  "privacy.clip_norm=0": r"privacy.clip_norm: got 0.0, expected .* above 0",
  "privacy.accountant=prv": r"privacy.accountant: got 'prv'",
  "privacy.epsilon=2": r"privacy.epsilon: got 2.0, but privacy.kind is 'none'",
  "privacy.kind=gaussian": r"privacy.noise_multiplier: missing",
}
GAUSSIAN = ("--config.privacy.kind=gaussian", "--config.sampler=poisson")
NOISE = (*GAUSSIAN, "--config.privacy.noise_multiplier=1.1")
SECURE = ("--config.privacy.secure_aggregation.enabled=true",)
PRIVACY = {
  (*NOISE, "--config.privacy.epsilon=2"): (
    r"privacy.epsilon: got 2.0, and privacy.noise_multiplier 1.1; expected one"
  ),
  (*GAUSSIAN, "--config.privacy.noise_multiplier=nan"): (
    r"privacy.noise_multiplier: got nan, expected"
  ),
  (*GAUSSIAN, "--config.privacy.epsilon=-1"): (
    r"privacy.epsilon: got -1.0, expected"
  ),
  (*NOISE, "--config.sampler=uniform"): (
    r"privacy.accountant: got 'pld', but sampler 'uniform' .* expected 'rdp'"
  ),
  (*NOISE, "--config.sampler=round_robin"): (
    r"sampler: got 'round_robin', which no accountant matches, expected"
  ),
  (*NOISE, "--config.sampler=weighted", "--config.privacy.accountant=rdp"): (
    r"sampler: got 'weighted', which no accountant matches"
  ),
  (*NOISE, "--config.realism.availability=0.5"): (
    r"realism.availability: got 0.5, but privacy.kind 'gaussian' expects 1.0"
  ),
  (*NOISE, "--config.safety.on_bad_loss=roll_back"): (
    r"safety.on_bad_loss: got 'roll_back', .* privacy.kind 'gaussian' expects"
  ),
  (*NOISE, "--config.algorithm=scaffold"): (
    r"algorithm: got 'scaffold', .* privacy.kind 'gaussian' expects one of fed"
  ),
  (*NOISE, "--config.aggregator=median"): (
    r"aggregator: got 'median', but privacy.kind 'gaussian' expects 'mean'"
  ),
  (*SECURE, "--config.aggregator=median"): (
    r"aggregator: got 'median', but .*secure_aggregation, .* expects 'mean'"
  ),
  (*SECURE, "--config.algorithm=qfedavg"): (
    r"algorithm: got 'qfedavg', .*secure_aggregation, .* expects one of fedavg"
  ),
  (*SECURE, "--config.communication.up=int8"): (
    r"communication.up: got 'int8', but .*secure_aggregation, .* 'none'"
  ),
  (*SECURE, "--config.privacy.secure_aggregation.bits=16"): (
    r"privacy.secure_aggregation.bits: got 16, but sums of 3 clients, each up "
    r"to clip norm 1 x scale 65536, expect at least 19"
  ),
  (*SECURE, "--config.privacy.secure_aggregation.threshold=4"): (
    r"privacy.secure_aggregation.threshold: got 4, expected 1 to the 3 clients"
  ),
  (*SECURE, "--config.privacy.secure_aggregation.rounding=up"): (
    r"privacy.secure_aggregation.rounding: got 'up'"
  ),
  (*NOISE, *SECURE, "--config.privacy.secure_aggregation.scale=16"): (
    r"privacy.secure_aggregation.scale: got 16, with which rounding \d+ values"
  ),
}
# Several fields that contradict each other, and other flags.
COMMANDS = {
  ("--config.deterministic=1", "--config.lanes=8", "--config.mesh.fsdp=2"): (
    r"deterministic: got a mesh of fsdp = 2, tensor = 1, expected 1 and 1"
  ),
  (
    "--config.aggregator=krum",
    "--config.aggregator_options.num_byzantine=1",
  ): r"clients_per_round: got 3, but aggregator 'krum' expects at least 5",
  (
    "--config.aggregator=trimmed_mean",
    "--config.aggregator_options.num_byzantine=-1",
  ): r"aggregator_options.num_byzantine: got -1",
  (
    "--config.aggregator=trimmed_mean",
    "--config.aggregator_options.num_byzantine=2",
  ): r"clients_per_round: got 3, but aggregator 'trimmed_mean' expects at",
  (
    "--config.algorithm=ditto",
    "--config.client.store=host",
    "--config.deterministic=1",
    "--config.lanes=8",
  ): r"client.store: got 'host', but deterministic = True expects 'device'",
  ("--config.data.index=i", "--config.data.partition=iid"): (
    r"data.partition: got 'iid', but data.index expects 'natural'"
  ),
  ("--config.data.index=i",): r"eval.max_clients: got 0, but data.index",
  ("--config.data.index=i", "--config.sampler=weighted"): (
    r"sampler: got 'weighted', but data.index expects 'uniform' or"
  ),
  ("--config.data.index=i", "--config.data.name=files"): (
    r"data.name: got 'files', but data.index expects 'jsonl'"
  ),
  (
    "--config.checkpoint.every=3",
    "--config.rounds_per_dispatch=2",
  ): r"checkpoint.every: got 3, expected a multiple of rounds_per_dispatch = 2",
  (
    "--config.checkpoint.every=2",
    "--config.rounds_per_dispatch=2",
    "--config.safety.on_bad_loss=roll_back",
  ): r"rounds_per_dispatch: got 2, but safety.on_bad_loss = 'roll_back'",
  (
    "--config.algorithm=ditto",
    "--config.client.store=host",
    "--config.checkpoint.every=2",
    "--config.rounds_per_dispatch=2",
  ): r"rounds_per_dispatch: got 2, but clients' states .* are on the host",
  (
    "--config.algorithm=streaming_diloco",
    "--config.client.optimizer=adam",
    "--config.algorithm_options.num_fragments=2",
  ): r"algorithm_options.num_fragments: got 2 for 1 layers",
  (
    "--config.aggregator=bulyan",
    "--config.aggregator_options.num_byzantine=1",
  ): r"clients_per_round: got 3, but aggregator 'bulyan' expects at least 7",
  ("--config.rounds",): r"--config.rounds: got no value",
  ("--profile_round=0",): r"profile_round: got 0, expected 1 to rounds = 2",
  ("--profile_round=x",): r"profile_round.*x",
  ("--round=3",): r"Unknown command line flag 'round'",
  ("again",): r"arguments: 'again' is not a flag",
  ("--config=no.py",): r"--config: 'no.py' is not a file",
  (
    "--coordinator=h:1",
    "--num_processes=2",
    "--process_id=2",
  ): r"--process_id: got 2, expected 0 to 1",
  ("--coordinator=h:1",): r"--coordinator, --num_processes and --process_id",
  (
    "--coordinator=nowhere",
    "--num_processes=2",
    "--process_id=1",
  ): r"--coordinator: got 'nowhere', expected host:port",
}
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
    "import ml_collections\ndef get_config():\n"
    "  return ml_collections.ConfigDict({'data': 3})\n",
    r"data: got 3, expected fields",
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
