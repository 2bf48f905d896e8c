"""Runs whose clients keep models of their own, on the devices and the host."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest
from script_runs import script
import tiny

from fedfm import (
  assembly,
  baselines,
  checkpoint,
  errors,
  evaluation,
  experiment,
  hosting,
  interruption,
  metrics,
  personalization,
  planning,
  questions,
)

POPULATIONS = ("seen", "unseen")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tiny")


def config_of(folder, **changes):
  """Ditto on LoRA of one kernel, three rounds."""
  changes = {
    "rounds": 3,
    "algorithm": "ditto",
    "adapter": {"targets": ("q_proj",)},
    "eval": {"every": 3},
  } | changes
  return tiny.config(folder, **changes)


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """Everything here runs on one of the devices, which compiles faster."""
  with tiny.one_device():
    yield


def lines_of(workdir):
  return [
    {k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))}
    for line in metrics.read(workdir)
  ]


@pytest.fixture(scope="module")
def on_host(folder):
  """A run with its clients on the host, and its lines."""
  workdir = folder / "host"
  config = config_of(
    folder,
    client={"store": "host"},
    checkpoint={"keep_best": "eval/seen/personal_loss"},
  )
  experiment.train(config, workdir)
  return config, workdir, lines_of(workdir)


def test_personal_models_are_evaluated(on_host, folder):
  """Against each client's model taken out and evaluated by itself."""
  _, workdir, lines = on_host
  opened, state = experiment.open_run(workdir)
  assert opened.client_store == "host" and int(state.clients) == 3
  train = list(opened.data.train.ids)
  stored = opened.host.read(np.arange(len(train)), version=3)
  took_part = [
    np.any(x != jax.device_get(opened.host.initial)["layers/q_proj"]["b"])
    for x in stored["layers/q_proj"]["b"]
  ]
  assert any(took_part) and not all(took_part)
  assert set(opened.data.evals) == set(POPULATIONS)
  for population, source in opened.data.evals.items():
    expected = []
    for client_id in source.ids:
      row = train.index(client_id) if client_id in train else None
      own = opened.host.initial
      if row is not None:
        own = jax.tree.map(lambda x, row=row: x[row], stored)
      by_client = opened.evaluate_clients(own)[population]
      at = by_client["ids"].index(client_id)
      one = {k: v[at : at + 1] for k, v in by_client.items() if k != "ids"}
      expected.append(evaluation.client_metrics(one)["loss"][0])
    got = lines[-1][f"eval/{population}/personal_loss"]
    np.testing.assert_allclose(got, np.mean(expected), rtol=1e-5)
    # Before training all have what all were given.
    first = lines[0][f"eval/{population}/personal_loss"]
    np.testing.assert_allclose(
      first, lines[0][f"eval/{population}/loss"], rtol=1e-6
    )
  unseen = [lines[i]["eval/unseen/personal_loss"] for i in (0, -1)]
  assert unseen[0] == pytest.approx(unseen[1], rel=1e-6)
  assert lines[-1]["eval/seen/personal_loss"] != lines[-1]["eval/seen/loss"]
  assert score_of(workdir, 3) == lines[-1]["eval/seen/personal_loss"]


@pytest.mark.slow
def test_questions_are_put_to_each_clients_own_model(on_host, tmp_path):
  _, workdir, _ = on_host
  opened, state = experiment.open_run(workdir)
  stored = opened.host.read(np.arange(len(opened.data.train.ids)), version=3)
  asked = {"client 0": 0, "client 1": 1, "stranger": None}
  rows = []
  for client_id, at in asked.items():
    own = opened.host.initial
    if at is not None:
      row = opened.data.train.index(client_id)
      own = jax.tree.map(lambda x, row=row: x[row], stored)
    model = personalization.personal_model(opened, state, client_id)
    jax.tree.map(np.testing.assert_array_equal, model, own)
    for i in range(2):
      row = {"question": f"the {i}", "choices": ["cat", "dog"], "answer": i}
      rows.append(row | {"client": client_id})
  path = tmp_path / "questions.jsonl"
  path.write_text("\n".join(map(json.dumps, rows)))
  ask = (f"--multiple_choice={path}", "--per_client", "--json")
  code, out, err = script("evaluate.py", f"--workdir={workdir}", *ask)
  assert code == 0, err
  found = {
    row["client"]: row
    for row in json.loads(out)["rows"]
    if row["population"] == "multiple_choice"
  }
  questions_of = questions.read(path, choices=True)
  for client_id in asked:
    own = [q for q in questions_of if q.client == client_id]
    model = personalization.personal_model(opened, state, client_id)
    expected = questions.multiple_choice(
      opened.loss, (model, opened.base), opened.tokenizer, 64, own
    )
    for name in ("accuracy", "accuracy_normalised"):
      assert found[client_id][f"personal_{name}"] == expected[name].mean()
    assert "personal_chance" not in found[client_id]


def score_of(workdir, round):
  """By which a round is the best, as its checkpoint says."""
  with checkpoint.Checkpointer(
    workdir / "checkpoints", read_only=True
  ) as reader:
    return reader.manifest(round)["extra"]["score"]


@pytest.mark.slow
def test_the_store_on_the_devices_gives_the_same_run(on_host, folder):
  config, _, lines = on_host
  workdir = folder / "device"
  experiment.train(
    config | {"client": {**config["client"], "store": "device"}}, workdir
  )
  assert not (workdir / "clients").exists()
  for line, expected in zip(lines_of(workdir), lines):
    assert line == pytest.approx(expected, rel=1e-5)
  # And its personal models, read by another program.
  opened, state = experiment.open_run(workdir)
  got = personalization.evaluate(opened, state)
  assert got == pytest.approx(
    {k: v for k, v in lines[-1].items() if "personal_" in k}, rel=1e-5
  )


@pytest.mark.slow
def test_a_continued_run_has_the_bits_of_an_uninterrupted_one(on_host, folder):
  config, whole, lines = on_host
  workdir = folder / "continued"
  experiment.train(config | {"rounds": 2}, workdir)
  experiment.train(config, workdir)
  resumed = [line for line in lines_of(workdir) if line["round"] in (0, 1, 3)]
  assert resumed == [line for line in lines if line["round"] in (0, 1, 3)]
  assert hosting.verify(workdir, 3) == hosting.verify(whole, 3)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_goes_back_to_an_older_checkpoint_with_its_clients(
  on_host, folder, lost
):
  """The newest checkpoints are damaged; the store is of the last round."""
  config, whole, lines = on_host
  workdir = folder / f"damaged{lost}"
  experiment.train(config, workdir)
  for round_number in range(4 - lost, 4):
    for file in (workdir / "checkpoints" / str(round_number)).rglob("*"):
      if file.is_file():
        file.write_bytes(b"")
  experiment.train(config, workdir)
  assert lines_of(workdir) == lines
  assert hosting.verify(workdir, 3) == hosting.verify(whole, 3)


@pytest.mark.slow
def test_a_roll_back_takes_the_clients_along(on_host, folder, monkeypatch):
  """In round 4 all clients are bad, so rounds 3 and 4 never were."""
  real, write = assembly.Experiment.cohort, metrics.MetricsWriter.write

  def cohort(self, index):
    packed = real(self, index)
    if index != 3:
      return packed
    mask = packed.batches["loss_mask"] * np.nan
    batches = packed.batches | {"loss_mask": mask}
    return dataclasses.replace(packed, batches=batches)

  def write_and_stop(self, line):
    write(self, line)
    if line["round"] == 4:
      signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(assembly.Experiment, "cohort", cohort)
  config = on_host[0] | {
    "rounds": 6,
    "checkpoint": {"every": 2},
    "safety": {"on_bad_loss": "roll_back"},
  }
  on_device = {"client": config["client"] | {"store": "device"}}
  runs = {"rolled": config, "device": config | on_device, "stopped": config}
  with monkeypatch.context() as patch:
    patch.setattr(metrics.MetricsWriter, "write", write_and_stop)
    with pytest.raises(interruption.Stopped):
      experiment.train(config, folder / "stopped")
  for name, values in runs.items():
    experiment.train(values, folder / name)
  found = {name: lines_of(folder / name) for name in runs}
  assert found["rolled"][4]["safety/rolled_back_to"] == 2
  assert found["stopped"] == found["rolled"]
  for line, expected in zip(found["device"], found["rolled"]):
    for name in ("clients/nonfinite_ids", "safety/problem"):
      assert line.pop(name, None) == expected.pop(name, None)
    if expected["round"] == 4:
      assert line.pop("train/loss") is expected.pop("train/loss") is None
    assert line == pytest.approx(expected, rel=1e-5)
  states = [hosting.verify(folder / n, 6) for n in ("rolled", "stopped")]
  assert states[0] == states[1]


@pytest.mark.slow
def test_a_run_without_a_checkpoint_begins_anew(on_host, folder):
  config, whole, lines = on_host
  workdir = folder / "anew"
  experiment.train(config, workdir)
  for place in (workdir / "checkpoints").iterdir():
    place.rename(workdir / f"lost {place.name}")
  with pytest.raises(errors.CheckpointError, match="no intact checkpoint"):
    experiment.train(config, workdir)
  (workdir / "metrics.jsonl").unlink()  # As the message says.
  experiment.train(config, workdir)
  assert lines_of(workdir) == lines
  assert hosting.verify(workdir, 3) == hosting.verify(whole, 3)


def test_a_store_on_the_host_needs_a_run(on_host):
  built = experiment.build(on_host[0])
  with pytest.raises(errors.ConfigError, match="client.store: 'host' needs"):
    _ = built.run_round


@pytest.mark.slow
def test_fine_tuned_models_are_those_of_training_alone(folder):
  config = config_of(
    folder,
    algorithm="fedavg",
    rounds=1,
    server={"average": 0.5},
    eval={"every": 1, "finetune_steps": 2},
    checkpoint={"keep_best": "eval/seen/finetuned_loss"},
  )
  workdir = folder / "tuned"
  experiment.train(config, workdir)
  lines = lines_of(workdir)
  names = [k for k in lines[-1] if "finetuned_" in k]
  assert all(k.startswith("eval/seen/") for k in names) and names
  assert not any("personal_" in k for k in lines[-1])
  assert score_of(workdir, 1) == lines[-1]["eval/seen/finetuned_loss"]
  opened, state = experiment.open_run(workdir)
  # The average is half way between the first model and the last.
  mean = opened.algorithm.effective_trainable(state)
  for got, first, last in zip(
    jax.tree.leaves(mean),
    jax.tree.leaves(opened.trainable),
    jax.tree.leaves(state.trainable),
  ):
    np.testing.assert_allclose(got, (first + last) / 2, rtol=1e-6, atol=1e-8)
  assert lines[-1]["eval/seen/loss"] == pytest.approx(
    opened.evaluate(mean)["eval/seen/loss"]
  )
  # From the average, by the baseline's own code, client by client.
  ids = [i for i in opened.data.evals["seen"].ids if i in opened.data.train.ids]
  start = dataclasses.replace(opened, trainable=mean)
  expected = []
  for client_id in ids[:2]:
    tuned = baselines.local_only(start, [client_id], 2)
    by_client = opened.evaluate_clients(jax.tree.map(lambda x: x[0], tuned))
    at = by_client["seen"]["ids"].index(client_id)
    expected.append(by_client["seen"]["loss_sum"][at])
  found = personalization.evaluate_finetuned(opened, state, opened.base)["seen"]
  at = [found["ids"].index(i) for i in ids[:2]]
  np.testing.assert_allclose(found["loss_sum"][at], expected, rtol=1e-5)


BAD = [
  # Neither does the algorithm make them, nor do unseen clients have the data.
  (
    {"checkpoint": {"keep_best": "eval/seen/personal_loss"}},
    r"checkpoint.keep_best: got 'eval/seen/personal_loss'",
  ),
  (
    {
      "checkpoint": {"keep_best": "eval/unseen/finetuned_loss"},
      "eval": {"finetune_steps": 1},
    },
    r"checkpoint.keep_best: got 'eval/unseen/finetuned_loss' .*'eval/seen/",
  ),
  ({"client": {"store": "disk"}}, r"client.store: got 'disk'"),
  ({"eval": {"finetune_steps": -1}}, r"eval.finetune_steps: got -1"),
  ({"server": {"average": 1.0}}, r"server.average: got 1.0, expected 0 <="),
  (
    {"algorithm": "scaffold", "client": {"optimizer": "adamw"}},
    r"client.optimizer: got 'adamw', which adapts .* scaffold takes SGD",
  ),
  (
    {"algorithm": "ifca", "aggregator": "median"},
    r"aggregator: got 'median', but algorithm 'ifca' expects 'mean'",
  ),
  (
    {"algorithm": "fedper"},
    r"algorithm_options.local_parts: missing, expected a value",
  ),
  (
    {"algorithm": "fedper", "algorithm_options": {"local_parts": ["c"]}},
    r"local_parts: the trainable has no 'c'",
  ),
  (
    {"algorithm": "ditto", "algorithm_options": {"lam": -1}},
    r"algorithm_options.lam: got -1.0, expected a number in \[0, inf\)",
  ),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_settings_are_named(folder, changes, message):
  with pytest.raises(errors.ConfigError, match=message) as error:
    experiment.build(tiny.config(folder, **changes))
  assert "\n" not in str(error.value)


def test_the_store_is_chosen_by_size(folder, monkeypatch):
  assert experiment.build(config_of(folder)).client_store == "device"
  monkeypatch.setattr(planning, "_MOST_DEVICE_BYTES", 1000)
  assert experiment.build(config_of(folder)).client_store == "host"
  stateless = config_of(folder, algorithm="fedavg", client={"store": "host"})
  assert experiment.build(stateless).client_store == "device"
