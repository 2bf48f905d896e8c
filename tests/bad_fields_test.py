"""Every mistake in a field ends in one clear line, before a compilation."""

import jax.numpy as jnp
import pytest
import tiny

from fedfm import errors, experiment


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tiny")


def test_the_listener_sees_what_is_compiled(compiled):
  jnp.arange(3) + 1
  assert compiled


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
  ({"client": {"accumulate": 0}}, r"^client.accumulate: got 0"),
  (
    {"client": {"batch_size": 4, "accumulate": 3}},
    r"^client.accumulate: 3 microbatches do not divide client.batch_size 4",
  ),
  ({"model": {"loss_chunk": -1}}, r"^model.loss_chunk: got -1"),
  ({"model": {"loss_chunk": "big"}}, r"^model.loss_chunk: got 'big'"),
  ({"model": {"remat": "mpl"}}, r"^model.remat: .*'mlp'"),
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
  (
    {"algorithm": "fedprox", "algorithm_options": {"m": 1}},
    r"^algorithm_options.m: unknown option .*mean .mu",
  ),
  (
    {"algorithm": "flora", "adapter": {"kind": "full"}},
    r"^adapter.kind: got 'full', but algorithm 'flora' needs 'lora'",
  ),
  (
    {"algorithm": "flexlora", "aggregator": "median"},
    r"^aggregator: got 'median', but algorithm 'flexlora' expects 'mean'",
  ),
  (
    {"algorithm": "fedex_lora", "server": {"learning_rate": 0.5}},
    r"^server.learning_rate: got 0.5, but algorithm 'fedex_lora' expects None",
  ),
  (
    {"algorithm": "hetlora", "algorithm_options": {"ranks": (1, 4)}},
    r"^algorithm_options.ranks: got 4, expected 1 to adapter.rank, .* 2",
  ),
  (
    {
      "algorithm": "flora",
      "algorithm_options": {"residual": "low_rank", "residual_rank": 17},
    },
    r"^algorithm_options.residual_rank: got 17, expected 1 to 16 for layers/",
  ),
  ({"algorithm": "feddpa_f"}, r"^algorithm_options.global_rounds: missing"),
  ({"communication": {"up": "int16"}}, r"^communication.up: .*mean 'int"),
  ({"communication": {"down": "gzip"}}, r"^communication.down: .*known: bfl"),
  (
    {"communication": {"up": "top_k", "up_options": {"fraction": 0.0}}},
    r"^communication.up_options.fraction: got 0.0, expected in \(0, 1\]",
  ),
  (
    {"communication": {"up": "int8", "up_options": {"bits": 3}}},
    r"^communication.up_options.bits: unknown option \(there are none\)",
  ),
  (
    {"communication": {"down_options": {"rank": 3}}},
    r"^communication.down: got 'none'",
  ),
  ({"realism": {"dropout": 1.0}}, r"^realism.dropout: got 1.0"),
  ({"realism": {"late": "wait"}}, r"^realism.late: got 'wait'"),
  ({"devices": {"spread": -1.0}}, r"^devices.spread: got -1.0"),
  ({"data": {"schedule": "phase"}}, r"^data.schedule: .*'phases'"),
  (
    {"data": {"schedule": "arrivals"}},
    r"^data.schedule_options.rounds: missing",
  ),
  (
    {"sampler": "elastic", "sampler_options": {"counts": [1, 4]}},
    r"^sampler_options.counts: got \(1, 4\), .* 1 to 3",
  ),
  (
    {"sampler_options": {"counts": [1]}},
    r"^sampler_options.counts: unknown option",
  ),
  (
    {
      "algorithm": "streaming_diloco",
      "algorithm_options": {"num_fragments": 2},
    },
    r"^algorithm_options.num_fragments: got 2 for 1 layers",
  ),
  (
    {"algorithm": "streaming_diloco", "client": {"local_steps": 0}},
    r"^client.local_steps: got 0, expected at least one for each of 4",
  ),
  (
    {
      "algorithm": "streaming_diloco",
      "algorithm_options": {"num_fragments": 1},
      "communication": {"down": "int8"},
    },
    r"^communication.down: got 'int8', but algorithm 'streaming_diloco' exp",
  ),
  (
    {"algorithm": "fedkseed", "client": {"optimizer": "adam"}},
    r"^client.optimizer: got 'adam', but algorithm 'fedkseed' expects 'sgd'",
  ),
  (
    {"algorithm": "zero_padding", "communication": {"up": "int8"}},
    r"^communication.up: got 'int8', but algorithm 'zero_padding' expects",
  ),
  (
    {"algorithm": "afl", "communication": {"down": "int8"}},
    r"^communication.down: got 'int8', but algorithm 'afl' expects 'none'",
  ),
  (
    {"algorithm": "fedsvd", "server": {"optimizer": "adam"}},
    r"^server.optimizer: got 'adam', but algorithm 'fedsvd' expects 'sgd'",
  ),
  (
    {"algorithm": "fedkseed", "client": {"schedule": "cosine"}},
    r"^client.schedule: got 'cosine', but algorithm 'fedkseed' expects",
  ),
  (
    {"algorithm": "fedkseed", "server": {"learning_rate": 0.5}},
    r"^server.learning_rate: got 0.5, but algorithm 'fedkseed'",
  ),
  (
    {"algorithm": "diloco", "clients_per_round": 8, "lanes": 16},
    r"^lanes: got 16, expected a divisor of the 8 clients",
  ),
  (
    {"data": {"partition": "merged", "num_clients": 11}},
    r"^data.num_clients: got 11, but there are 8 to merge",
  ),
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
  (
    {"algorithm": "forward_gradients", "client": {"accumulate": 2}},
    r"^client.accumulate: got 2, but algorithm .*: expected 1",
  ),
  (
    {"algorithm": "per_fedavg", "data": {"sequence_length": 1100}},
    r"^data.sequence_length: got 1100, but .*: expected at most 1024",
  ),
  (
    {"algorithm": "per_fedavg", "model": {"attention_kernel": "splash"}},
    r"^model.attention_kernel: got 'splash', but .*: expected 'xla'",
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
  ({"model": {"path": "nowhere"}}, r"^model.path: nowhere: found no model"),
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
  assert "\n" not in str(error.value)
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
