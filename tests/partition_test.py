"""Partitions: nothing lost or doubled, and the skew that was asked for."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from fedfm import data, errors
from fedfm.data import partition


def _data(num_examples, num_labels=10):
  index = np.arange(num_examples)
  return {"x": index, "label": (index * 7919) % num_labels}


def _sizes(source):
  return [source.size(c) for c in source.ids]


def _label_shares(source, num_labels):
  """Returns [clients, labels]."""
  return np.array(
    [
      np.bincount(source.read(c)["label"], minlength=num_labels)
      / source.size(c)
      for c in source.ids
    ]
  )


PARTITIONS = {
  "iid": lambda a, n, seed: partition.iid(a, n, seed=seed),
  "dirichlet": lambda a, n, seed: partition.dirichlet(a, n, 0.3, seed=seed),
  "one_label": lambda a, n, seed: partition.dirichlet(a, n, 1e-9, seed=seed),
  "shards": lambda a, n, seed: partition.shards(a, n, seed=seed),
}


@pytest.mark.parametrize("name", PARTITIONS)
@settings(max_examples=25, deadline=None)
@given(
  num_examples=st.integers(20, 200),
  num_clients=st.integers(1, 10),
  num_labels=st.integers(1, 12),
  seed=st.integers(0, 2**32 - 1),
)
def test_every_example_is_used_exactly_once(
  name, num_examples, num_clients, num_labels, seed
):
  arrays = _data(num_examples, num_labels)
  source = PARTITIONS[name](arrays, num_clients, seed)
  assert source.ids == tuple(f"client_{i:05d}" for i in range(num_clients))
  rows = [source.read(c) for c in source.ids]
  used = np.concatenate([r["x"] for r in rows])
  np.testing.assert_array_equal(np.sort(used), arrays["x"])
  for client_id, r in zip(source.ids, rows):
    assert len(r["x"]) == source.size(client_id) >= 1
    np.testing.assert_array_equal(r["label"], arrays["label"][r["x"]])


@pytest.mark.parametrize("name", PARTITIONS)
def test_seed_decides(name):
  arrays = _data(100)
  first, same, other = (
    PARTITIONS[name](arrays, 5, seed).read("client_00002")["x"].tolist()
    for seed in (0, 0, 1)
  )
  assert first == same != other


@pytest.mark.parametrize("name", ["iid", "dirichlet"])
def test_sizes_differ_by_at_most_one(name):
  assert sorted(_sizes(PARTITIONS[name](_data(103), 10, 0))) == [10] * 7 + (
    [11] * 3
  )


@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_dirichlet_shares_have_the_mean_and_variance_of_the_definition(alpha):
  # Unequal labels: the prior p is the data's own, as in the paper.
  label = np.repeat(np.arange(4), [20_000, 40_000, 60_000, 80_000])
  source = partition.dirichlet({"label": label}, 2000, alpha, seed=3)
  shares = _label_shares(source, 4)
  p = np.array([0.1, 0.2, 0.3, 0.4])
  np.testing.assert_allclose(shares.mean(0), p, atol=1e-9)

  def variance(concentration):
    dirichlet = p * (1 - p) / (concentration + 1)
    # Multinomial counts of n = 100 examples add to the Dirichlet's variance.
    return dirichlet + (p * (1 - p) - dirichlet) / 100

  np.testing.assert_allclose(shares.var(0), variance(alpha), rtol=0.15)
  total = shares.var(0).sum()
  assert abs(total / variance(alpha).sum() - 1) < 0.06
  # And not those of twice or half the concentration.
  for wrong in (alpha / 2, alpha * 2):
    assert abs(total / variance(wrong).sum() - 1) > 0.12


def test_dirichlet_of_infinite_alpha_is_iid():
  arrays = _data(20_000)
  for alpha in (1e9, np.inf):
    shares = _label_shares(partition.dirichlet(arrays, 50, alpha), 10)
    # Multinomial with 400 examples: standard deviation 0.015.
    assert abs(shares.std() / np.sqrt(0.1 * 0.9 / 400) - 1) < 0.15


def test_dirichlet_of_tiny_alpha_gives_clients_one_label():
  shares = _label_shares(partition.dirichlet(_data(5000), 100, 1e-6), 10)
  # Clients served last take what is left over.
  assert np.mean(shares.max(1) > 0.99) > 0.7


def test_shards_limit_the_labels_of_a_client():
  source = partition.shards(_data(6000), 30, shards_per_client=2)
  labels = [len(set(source.read(c)["label"])) for c in source.ids]
  assert max(labels) <= 2 and _sizes(source) == [200] * 30
  uneven = partition.shards(_data(6001), 7, shards_per_client=3)
  for client_id in uneven.ids:
    # A shard of 285 examples spans at most one boundary of labels of 600.
    assert len(set(uneven.read(client_id)["label"])) <= 2 * 3


def test_by_key_makes_a_client_of_each_value():
  arrays = {"x": np.arange(6), "user": np.array(["b", "a", "b", "c", "a", "b"])}
  source = partition.by_key(arrays, "user")
  assert source.ids == ("a", "b", "c")
  assert [source.read(c)["x"].tolist() for c in source.ids] == [
    [1, 4],
    [0, 2, 5],
    [3],
  ]
  assert source.read("a").keys() == {"x"}
  numbered = partition.by_key({"x": [1, 2, 3], "n": [700, 7, 7]}, "n")
  assert numbered.ids == ("client_00007", "client_00700")
  assert numbered.read("client_00007")["x"].tolist() == [2, 3]


def test_merged_clients_hold_all_examples_in_even_parts():
  members = data.from_arrays(
    {f"member {n}": {"x": np.full(n, n)} for n in (1, 2, 3, 4, 6)}
  )
  whole = partition.merged(members, 2)
  assert whole.ids == ("client_00000", "client_00001")
  # Largest first to the smallest: 6, then 4 and 3, then 2, then 1.
  got = [whole.read(i)["x"].tolist() for i in whole.ids]
  assert got == [[6] * 6 + [2] * 2, [4] * 4 + [3] * 3 + [1]]
  assert [whole.size(i) for i in whole.ids] == [8, 8]
  with pytest.raises(errors.ConfigError, match="num_clients: got 6, .* 5 to"):
    partition.merged(members, 6)


@pytest.mark.parametrize(
  "make, error, parts",
  [
    (
      lambda a: partition.iid(a, 101),
      errors.ConfigError,
      ["num_clients", "101", "100"],
    ),
    (
      lambda a: partition.iid(a, 0),
      errors.ConfigError,
      ["num_clients", "0"],
    ),
    (
      lambda a: partition.iid(a, 5, seed=-1),
      errors.ConfigError,
      ["seed", "-1"],
    ),
    (
      lambda a: partition.dirichlet(a, 5, 0.0),
      errors.ConfigError,
      ["alpha", "0.0"],
    ),
    (
      lambda a: partition.dirichlet(a, 5, float("nan")),
      errors.ConfigError,
      ["alpha", "nan"],
    ),
    (
      lambda a: partition.dirichlet(a, 5, 1.0, min_examples=21),
      errors.ConfigError,
      ["num_clients", "5", "21", "100"],
    ),
    (
      lambda a: partition.dirichlet(a, 5, 1.0, label_key="lable"),
      errors.ConfigError,
      ["label_key", "'lable'", "did you mean 'label'"],
    ),
    (
      lambda a: partition.shards(a, 30, 4),
      errors.ConfigError,
      ["num_clients", "30", "4", "120", "100"],
    ),
    (
      lambda a: partition.shards(a, 30, 0),
      errors.ConfigError,
      ["shards_per_client", "0"],
    ),
    (
      lambda a: partition.by_key(a, "user"),
      errors.ConfigError,
      ["key", "'user'"],
    ),
    (
      lambda a: partition.by_key({"x": [0.5, 1.5], "y": [1, 2]}, "x"),
      errors.ConfigError,
      ["'x'", "float64"],
    ),
    (
      lambda a: partition.by_key({"x": [1, 2]}, "x"),
      errors.DataError,
      ["'x'", "only one"],
    ),
    (
      lambda a: partition.iid({"x": [1.0, np.nan]}, 1),
      errors.DataError,
      ["arrays", "'x'", "NaN"],
    ),
  ],
)
def test_bad_arguments_are_named(make, error, parts):
  with pytest.raises(error) as info:
    make(_data(100))
  assert "\n" not in str(info.value)
  assert all(part in str(info.value) for part in parts), str(info.value)
