"""Every mistake ends in one clear line, before anything is compiled."""

import json
import os
import pathlib
import re
import subprocess
import sys

from absl import flags
import jax
import jax.numpy as jnp
import pytest
import tiny

from fedfm import errors, experiment, run_folder, settings

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import train  # noqa: E402

import command_line  # noqa: E402

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tiny")


@pytest.fixture
def compiled():
  """A list that grows with every program that jax compiles."""
  names = []

  def listen(event, seconds, **kwargs):
    del seconds
    if event == COMPILE_EVENT:
      names.append(kwargs)

  jax.clear_caches()
  jax.monitoring.register_event_duration_secs_listener(listen)
  yield names
  jax.monitoring.unregister_event_duration_listener(listen)


def test_the_listener_sees_what_is_compiled(compiled):
  jnp.arange(3) + 1
  assert compiled


def one_line(error) -> str:
  message = str(error.value)
  assert "\n" not in message
  return message


# What to change in a good config, and what the message must say.
FIELDS = [
  ({"round": 3}, r"^round: unknown field \(did you mean 'rounds'\?\)$"),
  ({"client": {"learning_rat": 0.1}}, r"^client.learning_rat: .*learning_rate"),
  ({"mesh": {"client": 2}}, r"^mesh.client: unknown field .*'clients'"),
  ({"mesh": {"expert": 2}}, r"^mesh.expert: unknown field"),
  ({"client": 3}, r"^client: got 3, expected fields"),
  ({"rounds": "ten"}, r"^rounds: got 'ten', expected int"),
  ({"rounds": 2.0}, r"^rounds: got 2.0, expected int"),
  ({"rounds": True}, r"^rounds: got True, expected int"),
  ({"rounds": None}, r"^rounds: got None, expected int"),
  ({"model": {"scan_layers": 1.5}}, r"^model.scan_layers: .*expected bool"),
  ({"adapter": {"targets": 7}}, r"^adapter.targets: got 7"),
  ({"data": {"path": 3}}, r"^data.path: got 3, expected str"),
  ({"rounds": 0}, r"^rounds: got 0, expected at least 1"),
  ({"rounds": -5}, r"^rounds: got -5"),
  ({"clients_per_round": 0}, r"^clients_per_round: got 0"),
  ({"seed": -1}, r"^seed: got -1, expected 0 <= seed < 2\*\*32"),
  ({"seed": 2**32}, r"^seed: got 4294967296"),
  (
    {"client": {"learning_rate": float("nan")}},
    r"^client.learning_rate: got nan",
  ),
  ({"client": {"learning_rate": -0.1}}, r"^client.learning_rate: got -0.1"),
  (
    {"server": {"learning_rate": float("inf")}},
    r"^server.learning_rate: got inf",
  ),
  (
    {"server": {"momentum": 1.0}},
    r"^server.momentum: got 1.0, expected 0 <= x < 1",
  ),
  ({"client": {"batch_size": 0}}, r"^client.batch_size: got 0"),
  ({"lanes": 0}, r"^lanes: got 0"),
  ({"lanes": "many"}, r"^lanes: got 'many', expected 'auto' or"),
  ({"sampler": "unifrom"}, r"^sampler: .*did you mean 'uniform'"),
  (
    {"client": {"optimizer": "adm"}},
    r"^client.optimizer: .*did you mean 'adam'",
  ),
  ({"server": {"optimizer": "yogy"}}, r"^server.optimizer: .*'yogi'"),
  ({"client": {"schedule": "cosin"}}, r"^client.schedule: .*'cosine'"),
  ({"client": {"weighting": "token"}}, r"^client.weighting: .*'tokens'"),
  ({"adapter": {"kind": "lroa"}}, r"^adapter.kind: .*'lora'"),
  ({"model": {"dtype": "float8"}}, r"^model.dtype: got 'float8'"),
  ({"data": {"unseen_fraction": 1.0}}, r"^data.unseen_fraction: got 1.0"),
  ({"data": {"path": ""}}, r"^data.path: got '', but data.name 'jsonl'"),
  # Those that need the data, the model or the devices.
  ({"algorithm": "fedavgg"}, r"^algorithm: .*did you mean 'fedavg'"),
  ({"algorithm": "fedprox"}, r"^client.proximal: got 0.0, but .*'fedprox'"),
  ({"clients_per_round": 9}, r"^clients_per_round: got 9, .*has 8 clients"),
  ({"mesh": {"clients": 3}}, r"^mesh: clients=3 .* needs 3 devices, .* are 8"),
  ({"mesh": {"fsdp": 3}}, r"^mesh: 8 devices do not divide .*product 3"),
  ({"mesh": {"clients": 0}}, r"^mesh.clients: got 0"),
  ({"mesh": {"fsdp": -1}}, r"^mesh: only one axis may be -1"),
  (
    {"mesh": {"fsdp": 4}},
    r"^client.batch_size: mesh.fsdp = 4 does not divide 2",
  ),
  (
    {"client": {"batch_size": 4}, "mesh": {"fsdp": 4}},
    r"^eval.batch_size: mesh.fsdp = 4 does not divide 2",
  ),
  ({"lanes": 12}, r"^lanes: mesh.clients = 8 does not divide 12 lanes"),
  ({"adapter": {"rank": 17}}, r"^adapter.rank: got 17, expected 1 to 16"),
  ({"adapter": {"targets": ["q_prj"]}}, r"^adapter.targets: .*'q_proj'"),
  ({"adapter": {"targets": []}}, r"^adapter.targets: got \(\)"),
  (
    {"data": {"sequence_length": 65}},
    r"^data.sequence_length: got 65, but the model's longest is 64",
  ),
  ({"data": {"path": "nowhere.jsonl"}}, r"^nowhere.jsonl: cannot be read"),
  ({"data": {"text_key": "txt"}}, r"data.jsonl:1: key 'txt' is missing"),
  ({"data": {"name": "nothing"}}, r"nothing"),
  ({"model": {"path": "nowhere"}}, r"^nowhere/config.json: "),
]


@pytest.mark.parametrize(
  ("changes", "message"), FIELDS, ids=[str(row[0]) for row in FIELDS]
)
def test_a_bad_field_is_named(folder, compiled, changes, message):
  workdir = folder / "run"
  config = tiny.config(folder, **changes)
  compiled.clear()  # The first call writes the model.
  with pytest.raises(errors.FedFMError, match=message) as error:
    experiment.train(config, workdir)
  one_line(error)
  assert not compiled
  assert not workdir.exists()


def test_an_axis_that_does_not_divide_the_weights(folder, compiled):
  config = tiny.config(folder, client={"batch_size": 8}, eval={"batch_size": 8})
  narrow = tiny.write_model(folder / "narrow", width=12)
  config |= {"mesh": {"fsdp": 8}, "model": {"path": narrow}}
  compiled.clear()
  with pytest.raises(errors.ConfigError, match="mesh.fsdp: 8 does not divide"):
    experiment.train(config, folder / "run")
  assert not compiled


def test_a_vocabulary_smaller_than_the_tokenizers(folder, compiled):
  model = tiny.write_model(folder / "few tokens", vocab_size=256)
  config = tiny.config(folder, model={"path": model})
  compiled.clear()
  with pytest.raises(errors.ConfigError, match="vocabulary of 256 is .* 272"):
    experiment.train(config, folder / "run")
  assert not compiled


GOOD = json.dumps({"client": "ann", "text": "a good line"})


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    ("{not json", r"bad.jsonl:2: not JSON"),
    ("[1, 2]", r"bad.jsonl:2: got a JSON list, expected an object"),
    ('{"client": "bob"}', r"bad.jsonl:2: key 'text' is missing"),
    ('{"client": 3, "text": "x"}', r"bad.jsonl:2: 'client' is int"),
    ('{"client": "", "text": "x"}', r"bad.jsonl:2: 'client' is empty"),
    ('{"client": "bob", "text": ""}', r"bad.jsonl: client 'bob': .*no text"),
  ],
)
def test_bad_data_names_file_and_line(folder, compiled, bad, message):
  path = folder / "bad.jsonl"
  path.write_text(f"{GOOD}\n{bad}\n{GOOD}\n")
  config = tiny.config(folder, data={"path": str(path)}, clients_per_round=1)
  compiled.clear()
  with pytest.raises(errors.DataError, match=message) as error:
    experiment.train(config, folder / "run")
  one_line(error)
  assert not compiled


def files(workdir):
  return {p: p.read_bytes() for p in sorted(workdir.rglob("*")) if p.is_file()}


def test_a_folder_of_another_run_is_refused_untouched(folder, compiled):
  config = tiny.config(folder)
  workdir = folder / "other"
  stored = settings.to_dict(experiment.as_settings(config | {"seed": 3}))
  run_folder.claim(workdir, stored).close()
  (workdir / "metrics.jsonl").write_text('{"round": 0}\n')
  before = files(workdir)
  compiled.clear()
  with pytest.raises(errors.ConfigError) as error:
    experiment.train(config | {"algorithm": "fedadam"}, workdir)
  message = one_line(error)
  assert "seed: had 3, now 0" in message
  assert 'algorithm: had "fedavg", now "fedadam"' in message
  assert files(workdir) == before and not compiled


@pytest.mark.parametrize("kind", ["file", "below a file", "not a run"])
def test_a_workdir_that_is_no_run(folder, tmp_path, compiled, kind):
  config = tiny.config(folder)
  (tmp_path / "thesis.txt").write_text("years of work")
  workdir, message = {
    "file": (tmp_path / "thesis.txt", "is a file"),
    "below a file": (tmp_path / "thesis.txt" / "run", "is a file"),
    "not a run": (tmp_path, "not empty .has 'thesis.txt'"),
  }[kind]
  before = files(tmp_path)
  compiled.clear()
  with pytest.raises(errors.CheckpointError, match=message):
    experiment.train(config, workdir)
  assert files(tmp_path) == before and not compiled


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("", r"has no get_config"),
    ("def get_config(:\n", r"failed: SyntaxError: "),
    ("import nowhere\n", r"failed: ModuleNotFoundError: .*nowhere"),
    ("raise ValueError('a\\nb')\n", r"failed: ValueError: a"),
    ("def get_config():\n  return {}.x\n", r"failed: AttributeError"),
    ("def get_config():\n  return {}\n", r"returned dict, expected a Config"),
    ("raise SystemExit(0)\n", r"failed: SystemExit"),
    (
      "from ml_collections import config_dict as c\ndef get_config():\n"
      "  return c.ConfigDict({'rounds': c.required_placeholder(int)})\n",
      r"failed: RequiredValueError",
    ),
  ],
)
def test_a_bad_config_file_is_named(tmp_path, content, message):
  file = tmp_path / "config.py"
  file.write_text(content)
  with pytest.raises(errors.ConfigError, match=message) as error:
    command_line.load_config(str(file))
  assert str(error.value).startswith("--config: ")
  assert str(file) in str(error.value)


@pytest.mark.parametrize(
  ("name", "message"),
  [("missing.py", "is not a file"), ("config.json", "expected a .py file")],
)
def test_what_is_not_a_config_file(tmp_path, name, message):
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(errors.ConfigError, match=message):
    command_line.load_config(str(tmp_path / name))


@pytest.fixture
def command(folder, tmp_path, monkeypatch):
  """Returns a function from extra arguments to a whole command line."""
  file = tmp_path / "config.py"
  file.write_text(
    "import ml_collections\ndef get_config():\n"
    f"  return ml_collections.ConfigDict({tiny.config(folder)!r})\n"
  )
  monkeypatch.setattr(command_line, "_OVERRIDES", [])
  yield lambda *arguments: [
    str(ROOT / "scripts" / "train.py"),
    f"--config={file}",
    f"--workdir={tmp_path / 'run'}",
    *arguments,
  ]
  flags.FLAGS.unparse_flags()


COMMANDS = [
  ("--round=3", r"Unknown command line flag 'round'"),
  ("extra", r"'extra' is not a flag"),
  ("--config.rounds", r"--config.rounds: got no value"),
  ("--config=", r"--config: '' is not a file"),
  ("--config.round=3", r"round: unknown field .*'rounds'"),
  ("--config.client.lr=3", r"client.lr: unknown field"),
  ("--config.rounds.x=3", r"rounds.x: unknown field"),
  ("--config.rounds=3.5", r"rounds: got '3.5', expected int"),
  ("--config.rounds=0", r"rounds: got 0, expected at least 1"),
  ("--config.mesh.clients=two", r"mesh.clients: got 'two', expected int"),
  ("--config.mesh=3", r"mesh: got '3', expected fields"),
  ("--config.model.scan_layers=maybe", r"model.scan_layers: got 'maybe'"),
  ("--config.client.learning_rate=nan", r"client.learning_rate: got nan"),
  ("--config.lanes=12", r"lanes: mesh.clients = 8 does not divide 12 lanes"),
  ("--process_id=0", r"--coordinator, --num_processes and --process_id go"),
]


@pytest.mark.parametrize(("argument", "message"), COMMANDS)
def test_a_bad_command_ends_with_code_2(
  command, tmp_path, monkeypatch, capsys, argument, message
):
  monkeypatch.setattr(sys, "argv", command(argument))
  with pytest.raises(SystemExit) as ended:
    command_line.run(train.main)
  assert ended.value.code == 2
  out, err = capsys.readouterr()
  assert not out and err.count("\n") == 1
  assert re.match(f"error: .*{message}", err)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["config", "workdir"])
def test_a_required_flag_is_named(command, monkeypatch, capsys, flag):
  argv = [a for a in command() if not a.startswith(f"--{flag}")]
  monkeypatch.setattr(sys, "argv", argv)
  with pytest.raises(SystemExit) as ended:
    command_line.run(train.main)
  assert ended.value.code == 2
  assert f"--{flag}" in capsys.readouterr().err


def test_a_field_in_place_of_a_group_is_named(tmp_path, monkeypatch):
  file = tmp_path / "config.py"
  file.write_text(
    "import ml_collections\ndef get_config():\n"
    "  return ml_collections.ConfigDict({'data': 3})\n"
  )
  monkeypatch.setattr(command_line, "_OVERRIDES", [("data.path", "x")])
  with pytest.raises(errors.ConfigError, match="data.path: .* data = 3"):
    command_line.load_config(str(file))


def run_script(argv):
  return subprocess.run(
    [sys.executable, *argv],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )


def test_a_real_process_prints_one_line(command, tmp_path):
  process = run_script(command("--config.adapter.rank=17"))
  assert process.returncode == 2 and not process.stdout
  (line,) = process.stderr.splitlines()
  assert line.startswith("error: adapter.rank: got 17, expected 1 to 16")
  assert not (tmp_path / "run").exists()


def test_help_is_no_mistake(command, tmp_path):
  process = run_script(command("--help"))
  assert process.returncode == 0 and not process.stderr
  assert "--workdir" in process.stdout and "resumes" in process.stdout
  assert not (tmp_path / "run").exists()
