"""Prompts dealt out by category before they share rows, and weighed as such."""

import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from fedfm import algorithms, assembly, data, errors
from fedfm import settings as settings_lib
from fedfm.data import instructions
from fedfm.data.prompt_formats import builtin

KINDS = ("open_qa", "poem", "list")


def write_prompts(path, count=60, **changes):
  """Prompts that say which kind they are, on clients that do not."""
  with open(path, "w", encoding="utf-8") as file:
    for i in range(count):
      kind = KINDS[i % 3]
      row = {"client": f"c{i % 4}", "q": f"{kind} {i}", "a": "yes"}
      row |= {"kind": kind, "number": i % 3}
      file.write(json.dumps(row | changes) + "\n")
  return str(path)


def load(folder, **changes):
  config = tiny.config(
    folder,
    data={
      "path": write_prompts(folder / "prompts.jsonl"),
      "prompt_key": "q",
      "response_key": "a",
      "template": "plain",
      "sequence_length": 64,
      "unseen_fraction": 0.0,
      "heldout_fraction": 0.0,
      "label_key": "kind",
      "num_clients": 3,
      "shards": 1,
    }
    | changes,
  )
  with tiny.one_device():
    return assembly.population_lib.load(
      settings_lib.from_dict(config), tiny_model()
    ).data.train


def tiny_model():
  return tiny.DecoderConfig(
    vocab_size=272, width=16, num_layers=1, num_heads=2, mlp_width=32
  )


def texts(rows):
  tokenizer = data.byte_tokenizer()
  return [tokenizer.decode(tokens) for tokens in rows["tokens"]]


@pytest.mark.parametrize("label_key", ["kind", "number"])
def test_shards_of_a_category_share_rows_within_a_client(label_key, tmp_path):
  source = load(tmp_path, partition="shards", label_key=label_key)
  found = set()
  for client_id in source.ids:
    rows = source.read(client_id)
    own = {kind for kind in KINDS for text in texts(rows) if kind in text}
    assert len(own) == 1
    found |= own
    assert rows["num_examples"].sum() == 20
    assert len(rows["tokens"]) < 20  # They share rows.
  assert found == set(KINDS)


def test_dirichlet_skews_categories_and_iid_does_not(tmp_path):
  def most(partition, **changes):
    source = load(tmp_path, partition=partition, num_clients=6, **changes)
    shares = []
    for client_id in source.ids:
      text = "".join(texts(source.read(client_id)))
      counts = np.array([text.count(kind) for kind in KINDS])
      assert counts.sum() == 10
      shares.append(counts.max() / 10)
    return np.mean(shares)

  assert most("dirichlet", alpha=0.01) > 0.8 > most("iid") + 0.1


def test_plain_documents_are_dealt_out_by_category(tmp_path):
  source = load(tmp_path, partition="shards", prompt_key="", text_key="q")
  for client_id in source.ids:
    text = "".join(texts(source.read(client_id)))
    assert sum(kind in text for kind in KINDS) == 1


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (None, "'kind' is None, expected a string or an integer"),
    ("", "'kind' is '', expected"),
    (True, "'kind' is True, expected"),
  ],
)
def test_categories_that_are_none_are_refused(value, message, tmp_path):
  path = write_prompts(tmp_path / "bad.jsonl", kind=value)
  with pytest.raises(errors.DataError, match=f"bad.jsonl:1: {message}"):
    load(tmp_path, path=path, partition="shards")
  with pytest.raises(errors.DataError, match="key 'knd' is missing .*'kind'"):
    load(tmp_path, partition="shards", label_key="knd")


def packed_source():
  """Two clients of 7 and 2 examples, a row of 16 tokens holding up to 3."""
  raw = data.from_arrays({
    "many": {"q": ["a"] * 7, "r": ["b"] * 7},
    "few": {"q": ["a"] * 2, "r": ["b"] * 2},
  })  # fmt: skip
  return data.instruct(
    raw,
    data.byte_tokenizer(),
    sequence_length=16,
    fields=instructions.Fields("q", "r"),
    prompt_format=builtin("plain"),
  )


def test_rows_count_their_examples():
  source = packed_source()
  # bos, "a", newline, "b", eos: 5 tokens an example, so 3 fit into 16.
  assert source.read("many")["num_examples"].tolist() == [3, 3, 1]
  assert source.read("few")["num_examples"].tolist() == [2]
  cohort = data.pack(source, ["many", "few"], batch_size=1, lanes=1)
  assert cohort.num_examples[0, :2].tolist() == [7, 2]
  assert "num_examples" not in cohort.batches
  # Only those of rows that are used count.
  cohort = data.pack(
    source, ["many", "few"], batch_size=1, lanes=1, max_examples=1, epochs=2
  )
  assert sorted(cohort.num_examples[0, :2].tolist()) == [2, 3]
  whole = data.pack(source, ["many"], batch_size=1, lanes=1, local_steps=2)
  assert whole.num_examples[0, 0] == 6


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_examples_weigh_clients_by_those_in_their_rows(weighting):
  def loss(w, base, batch, key):
    # Pulls by 1 from the client with one row, by 0 from the other.
    one_row = jnp.sum(batch["mask"]) == 1
    return w * jnp.where(one_row, 1.0, 0.0), {}

  algorithm = algorithms.fedavg(
    loss, client_optimizer=optax.sgd(1.0), weighting=weighting
  )
  cohort = data.pack(packed_source(), ["many", "few"], batch_size=4, lanes=2)
  state, _ = algorithm.round(algorithm.init(jnp.zeros(())), None, cohort)
  # 7 and 2 examples in 3 rows and 1.
  expected = {"examples": -2 / 9, "uniform": -1 / 2}[weighting]
  np.testing.assert_allclose(state.trainable, expected, rtol=1e-6)
