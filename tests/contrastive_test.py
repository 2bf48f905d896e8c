"""A contrastive run of CLIP, from pairs of images and texts to retrieval."""

import itertools

import jax
import numpy as np
import pytest
import tiny

from fedfm import assembly, data, errors, experiment, models
from fedfm import settings as settings_lib
from fedfm.data import image_text
from fedfm.models import huggingface

TOWER = models.StackConfig(width=16, num_layers=1, num_heads=2, mlp_width=32)
KINDS = np.array(list(itertools.product((0, 1), repeat=4)))


def clip_config(**changes):
  values = {
    "text": TOWER,
    "image": TOWER,
    "projection_width": 8,
    "vocab_size": 272,
    "max_length": 16,
    "eos_id": 257,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
  }
  return models.CLIPConfig(**(values | changes))


def write_clip(folder, **changes):
  model = models.clip(clip_config(**changes))
  huggingface.save(folder, model, model.init(jax.random.key(1)))
  return str(folder)


def pairs(count, seed):
  """Images whose quadrants are bright where the text has a letter."""
  rng = np.random.default_rng(seed)
  kind = rng.integers(0, len(KINDS), count)
  x = rng.integers(0, 60, (count, 8, 8)).astype(np.uint8)
  for quadrant, (row, col) in enumerate(itertools.product((0, 4), repeat=2)):
    bright = 190 * KINDS[kind, quadrant].astype(np.uint8)
    x[:, row : row + 4, col : col + 4] += bright[:, None, None]
  words = np.where(KINDS[kind], list("abcd"), "-")
  return x, np.array(["".join(w) for w in words]), kind


def write_pairs(path, **changes):
  arrays = {}
  for seed, (part, count) in enumerate((("train", 64), ("test", 32))):
    x, text, kind = pairs(count, seed)
    tokens = [[256, *w.encode(), 257, 0] for w in text]
    arrays |= {f"x_{part}": x, f"text_{part}": text, f"y_{part}": kind}
    arrays[f"tokens_{part}"] = np.array(tokens, np.int32)
  np.savez(path, **(arrays | changes))
  return str(path)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
  return write_clip(tmp_path_factory.mktemp("clip") / "clip")


def config(folder, clip_folder, **changes):
  values = {
    "rounds": 12,
    "clients_per_round": 4,
    "lanes": 1,
    "model": {"path": str(clip_folder)},
    "adapter": {"kind": "full"},
    "data": {
      "task": "contrastive",
      "name": "npz",
      "path": str(folder / "pairs.npz"),
      "image_key": "x",
      "sequence_length": 8,
      "partition": "iid",
      "num_clients": 4,
    },
    "client": {
      "optimizer": "adam",
      "learning_rate": 0.003,
      "batch_size": 8,
      "epochs": 4,
    },
    "eval": {"every": 12, "batch_size": 8, "max_examples": 0},
    "checkpoint": {"every": 12},
  }
  if not (folder / "pairs.npz").exists():
    write_pairs(folder / "pairs.npz")
  return {
    k: v | changes.get(k, {}) if isinstance(v, dict) else changes.get(k, v)
    for k, v in values.items()
  }


@pytest.mark.slow
def test_clip_learns_to_retrieve(tmp_path, clip_folder):
  with tiny.one_device():
    built = experiment.build(config(tmp_path, clip_folder))
    summary, _ = experiment.run(built, tmp_path / "run")
  base, final = summary["base"], summary["final"]
  assert len(built.data.evals["test"].ids) == 4
  assert base["eval/test/loss"] > 1.9  # Chance of 8 is 2.08.
  assert final["eval/test/loss"] < 0.7 * base["eval/test/loss"]
  assert final["eval/test/accuracy"] > base["eval/test/accuracy"] + 0.2
  assert "eval/test/bits_per_byte" not in final
  assert built.ledger.flops_per_step > 0


def test_token_ids_are_what_their_texts_are():
  x, texts, _ = pairs(3, 0)
  ids = np.array([[256, *w.encode(), 257] for w in texts])
  source = data.from_arrays({"a": {"x": x, "text": texts, "ids": ids}})
  shapes = image_text.Shapes((8, 8, 1), 272, 257)
  by_text = data.image_text_pairs(source, shapes, 8, data.byte_tokenizer())
  by_id = data.image_text_pairs(source, shapes, 8, text_key="ids")
  got, want = by_id.read("a"), by_text.read("a")
  there = want["token_mask"] > 0
  np.testing.assert_array_equal(got["token_mask"], want["token_mask"])
  np.testing.assert_array_equal(got["tokens"][there], want["tokens"][there])
  np.testing.assert_array_equal(got["x"], x[..., None] / np.float32(255))
  assert there.sum(axis=1).tolist() == [6, 6, 6]
  # Where the highest token ends a text, what follows it is padding as well.
  highest = image_text.Shapes((8, 8, 1), 272, None)
  same = data.image_text_pairs(source, highest, 8, text_key="ids").read("a")
  np.testing.assert_array_equal(same["token_mask"], want["token_mask"])


def test_pairs_are_dealt_out_by_label(tmp_path, clip_folder):
  changes = {"partition": "shards", "shards": 1, "num_clients": 8}
  built = config(tmp_path, clip_folder, data=changes | {"token_key": "tokens"})
  source = experiment_data(built)
  for client_id in source.ids:
    words = np.unique(source.read(client_id)["tokens"], axis=0)
    assert len(words) <= 5  # Of 16 kinds; iid has more in 8 examples.
  assert sum(map(source.size, source.ids)) == 64


def experiment_data(values):
  with tiny.one_device():
    return assembly.build(settings_lib.from_dict(values)).data.train


LONG = np.zeros((64, 9), np.int32)
UNENDED = np.full((64, 4), 3, np.int32)
TOO_HIGH = np.full((64, 4), 272, np.int32)


@pytest.mark.parametrize(
  ("changes", "arrays", "message"),
  [
    ({"data": {"image_key": ""}}, {}, "image_key: got '', but model.path is a"),
    (
      {"data": {"name": "jsonl"}},
      {},
      "data.name: got 'jsonl', but data.task 'contrastive' expects images",
    ),
    (
      {"data": {"prompt_key": "q"}},
      {},
      "data.prompt_key: got 'q', but data.task 'contrastive' expects ''",
    ),
    (
      {"data": {"task": "language_model", "name": "jsonl"}},
      {},
      "data.task: got 'language_model', but model.path is a CLIP, which expects"
      " 'contrastive'",
    ),
    (
      {"data": {"task": "classification"}},
      {},
      "model.num_classes: data.task 'classification' needs a classifier",
    ),
    ({"data": {"sequence_length": 17}}, {}, "sequence_length: got 17, but the"),
    ({"client": {"batch_size": 1}}, {}, "client.batch_size: got 1, .* least 2"),
    ({"eval": {"batch_size": 1}}, {}, "eval.batch_size: got 1, .* least 2"),
    ({"client": {"accumulate": 2}}, {}, "client.accumulate: got 2, .* step"),
    ({"data": {"text_key": "txt"}}, {}, "has no array txt_train"),
    (
      {},
      {"x_train": np.zeros((64, 9, 8), np.uint8)},
      r"holds images of \[9, 8\], but the model's are \[8, 8, 1\]",
    ),
    ({}, {"text_train": np.zeros(64)}, "'text' is float64 .* expected text"),
    ({}, {"x_train": np.full((64, 8, 8), np.nan)}, "holds NaN or infinity"),
    ({}, {"x_test": np.zeros((3, 8, 8))}, "fields differ in their number"),
    (
      {"data": {"token_key": "tokens"}},
      {"tokens_train": LONG},
      "holds 9 tokens a text, expected 1 to data.sequence_length = 8",
    ),
    (
      {"data": {"token_key": "tokens"}},
      {"tokens_train": UNENDED},
      "example 0 has no token 257, which ends a text",
    ),
    (
      {"data": {"token_key": "tokens"}},
      {"tokens_train": TOO_HIGH},
      "holds token 272, expected 0 to 271",
    ),
    (
      {"data": {"token_key": "text"}},
      {},
      "'text' is object of shape .16., expected integers",
    ),
  ],
)
def test_mistakes_are_named(changes, arrays, message, tmp_path, clip_folder):
  write_pairs(tmp_path / "pairs.npz", **arrays)
  with pytest.raises(errors.FedFMError, match=message) as e:
    experiment_data(config(tmp_path, clip_folder, **changes))
  assert "\n" not in str(e.value)


def test_a_tokenizer_that_ends_texts_otherwise_is_refused(tmp_path):
  for eos, found in ((7, "token 7"), (None, "the highest token")):
    folder = write_clip(tmp_path / str(eos), eos_id=eos)
    with pytest.raises(errors.ConfigError, match=f"a text at {found}"):
      experiment_data(config(tmp_path, folder))


def test_other_models_are_not_contrastive(tmp_path):
  path = tiny.write_model(tmp_path / "decoder")
  with pytest.raises(errors.ConfigError, match="Decoder, which expects 'lang"):
    experiment_data(config(tmp_path, path))
