"""Runs of replicas: on their lanes, elastic, resumed; the shipped configs."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
import tiny

from fedfm import experiment, metrics, settings

ROOT = pathlib.Path(__file__).parent.parent


def get_config(name):
  """What a file in `configs/` gives, as a nested dict."""
  file = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config().to_dict()


def test_the_shipped_configs_are_settings():
  plain = settings.from_dict(get_config("diloco"))
  assert plain.clients_per_round == plain.data.num_clients
  # Photon's recipe: averaging as it is, and smaller batches at a higher rate.
  photon = settings.from_dict(get_config("photon"))
  assert photon.algorithm == "photon" and photon.server.learning_rate == 1
  assert photon.client.batch_size < plain.client.batch_size
  assert photon.client.learning_rate > plain.client.learning_rate
  assert photon.client.optimizer == "adamw"
  compared = get_config("compare_diloco")
  for name, arm in compared["arms"].items():
    merged = {**compared["base"], **arm}
    merged["data"] = compared["base"]["data"] | arm["data"]
    merged["client"] = compared["base"]["client"] | arm["client"]
    merged["eval"] = compared["base"]["eval"] | arm["eval"]
    s = settings.from_dict(merged)
    per_round = s.client.local_steps
    if s.algorithm == "streaming_diloco":
      per_round //= s.algorithm_options["num_fragments"]
    # The same inner steps of every replica, all of them in every round.
    assert s.rounds * per_round == 128, name
    assert s.clients_per_round == s.data.num_clients, name


@pytest.mark.slow
def test_a_run_of_streaming_replicas_resumes_to_the_bit(tmp_path):
  model = tiny.write_model(tmp_path / "deep", num_layers=2)
  config = tiny.config(
    tmp_path,
    rounds=4,
    clients_per_round=8,
    algorithm="streaming_diloco",
    algorithm_options={"num_fragments": 2, "overlap": 1},
    sampler="elastic",
    sampler_options={"counts": [4, 8], "rounds_each": 1},
    model={"path": model},
    adapter={"kind": "full"},
    client={"optimizer": "adamw", "learning_rate": 0.01, "local_steps": 4},
    communication={"up": "e3m0"},
    eval={"every": 2},
    checkpoint={"every": 1},
  )
  built = experiment.build(config)
  assert built.aligned and built.num_lanes == 8
  rows = built.state_shardings.clients[0]["weights"]["layers"]["q_proj"]
  assert rows.spec[0] == "clients"
  _, whole = experiment.run(built, tmp_path / "whole")
  experiment.train(config | {"rounds": 2}, tmp_path / "parts")
  _, resumed = experiment.run(built, tmp_path / "parts")
  for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed)):
    np.testing.assert_array_equal(jax.device_get(x), jax.device_get(y))
  first, second = (
    [
      {
        k: v
        for k, v in line.items()
        if k.split("/")[0] not in ("time", "memory")
      }
      for line in metrics.read(tmp_path / name)
    ]
    for name in ("whole", "parts")
  )
  assert first == second
  sent = [line["comm/bytes_up"] for line in first[1:]]
  assert sent[0] < sent[2] and first[1]["clients/participating"] == 4
  assert first[4]["clients/participating"] == 8
