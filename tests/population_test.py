"""Populations by config: dealt anew, and few clients to evaluate on."""

import collections
import pathlib

import numpy as np
import pytest
import tiny

from fedfm import blueprint, errors, experiment, model_folders, population

CNN = pathlib.Path(__file__).parents[1] / "configs/models/small_cnn"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tiny")


def load(folder, **changes):
  settings = experiment.as_settings(tiny.config(folder, **changes))
  config = model_folders.read_config(blueprint.model_folder(settings))
  return population.load(settings, config).data


def rows(source):
  """How often each row is there, over all clients."""
  return collections.Counter(
    row.tobytes() for i in source.ids for row in source.read(i)["tokens"]
  )


def test_iid_keeps_the_rows_and_the_sizes(folder):
  natural = load(folder)
  for seed in (0, 1):
    dealt = load(folder, data={"partition": "iid"}, seed=seed)
    assert rows(dealt.train) == rows(natural.train)
    sizes = [natural.train.size(i) for i in natural.train.ids]
    assert [dealt.train.size(i) for i in dealt.train.ids] == sizes
  other = load(folder, data={"partition": "iid"})
  first = dealt.train.ids[0]
  a, b = (x.train.read(first)["tokens"] for x in (dealt, other))
  assert (a != b).any()  # The seed decides.


def test_the_number_of_clients_can_be_chosen(folder):
  dealt = load(folder, data={"partition": "iid", "num_clients": 5})
  assert len(dealt.train) == 5
  sizes = [dealt.train.size(i) for i in dealt.train.ids]
  assert max(sizes) - min(sizes) <= 1


def test_a_partition_without_labels_is_refused(folder):
  with pytest.raises(errors.DataError, match="key .label. is missing"):
    load(folder, data={"partition": "dirichlet"})


def test_natural_clients_are_labels(folder):
  natural = load(folder)
  dealt = load(
    folder,
    data={
      "partition": "dirichlet",
      "alpha": 0.01,
      "label_key": "client",
      "num_clients": 3,
    },
  )
  read = [dealt.train.read(i) for i in dealt.train.ids]
  labels = np.concatenate([x["client"] for x in read])
  sizes = [natural.train.size(i) for i in natural.train.ids]
  assert np.bincount(labels).tolist() == sizes
  # A row still is of the client that its label says.
  for tokens, label in zip(read[0]["tokens"], read[0]["client"]):
    own = natural.train.read(natural.train.ids[label])["tokens"]
    assert (own == tokens).all(axis=1).any()


def test_few_clients_are_evaluated_on(folder):
  natural = load(folder)
  few = load(folder, eval={"max_clients": 3})
  assert few.train.ids == natural.train.ids
  ids = sorted(natural.evals["seen"].ids)
  assert few.evals["seen"].ids[0] == ids[0]
  assert few.evals["seen"].ids[-1] == ids[-1]
  assert len(few.evals["seen"]) == 3
  assert few.evals["unseen"].ids == natural.evals["unseen"].ids  # It has two.


def test_dealt_clients_hold_examples_out(folder):
  rng = np.random.default_rng(0)
  arrays = {}
  for part, n in (("train", 60), ("test", 8)):
    arrays[f"x_{part}"] = rng.random((n, 28, 28)).astype(np.float32)
    arrays[f"y_{part}"] = rng.integers(0, 10, n)
  np.savez(folder / "images.npz", **arrays)
  digits = {
    "model": {"path": str(CNN), "init": "random"},
    "adapter": {"kind": "full"},
    "eval": {"max_clients": 3},
    "data": {
      "task": "classification",
      "name": "npz",
      "path": str(folder / "images.npz"),
      "image_key": "x",
      "partition": "dirichlet",
      "num_clients": 5,
    },
  }
  whole = load(folder, **digits)
  digits["data"]["dealt_heldout_fraction"] = 0.25
  split = load(folder, **digits)
  assert split.train.ids == whole.train.ids
  assert set(whole.evals) == {"test"} and set(split.evals) == {"seen", "test"}
  assert len(split.evals["seen"]) == 3
  for client in split.evals["seen"].ids:
    size = whole.train.size(client)
    own = (split.train.read(client), split.evals["seen"].read(client))
    assert len(own[1]["x"]) == max(1, round(0.25 * size))
    joined = np.concatenate([part["x"] for part in own])
    everything = whole.train.read(client)["x"]
    assert sorted(x.tobytes() for x in joined) == sorted(
      x.tobytes() for x in everything
    )


@pytest.mark.parametrize("partition", ["natural", "iid"])
def test_natural_clients_hold_out_already(folder, partition):
  data = {"partition": partition, "dealt_heldout_fraction": 0.1}
  with pytest.raises(errors.ConfigError, match="^data.dealt_heldout_fraction"):
    load(folder, data=data)
