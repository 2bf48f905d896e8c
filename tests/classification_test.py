"""A classification run from files to accuracy, on texts and on images."""

import json
import os
import pathlib
import zipfile

import jax
import numpy as np
import pytest
import tiny

from fedfm import (
  adapters,
  assembly,
  blueprint,
  data,
  errors,
  experiment,
  models,
)
from fedfm import settings as settings_lib
from fedfm.models import families, huggingface

ROOT = pathlib.Path(__file__).parent.parent
SHARED = pathlib.Path(
  os.environ.get("FEDFM_SHARED_DATA", ROOT.parent / "shared" / "data")
)
SIZES = {"width": 16, "num_layers": 1, "num_heads": 2, "mlp_width": 32}


def write_encoder(folder, **sizes):
  """A random byte BERT without a classifier."""
  config = models.EncoderConfig(
    vocab_size=272, max_length=32, num_types=1, pad_id=258, **(SIZES | sizes)
  )
  model = models.encoder(config)
  huggingface.save(folder, model, model.init(jax.random.key(1)))
  return str(folder)


def write_config(folder, config):
  """A folder of config.json alone, for random weights."""
  folder.mkdir(exist_ok=True)
  values = families.write_config(config, "float32")
  (folder / "config.json").write_text(json.dumps(values))
  return str(folder)


def write_texts(path, label=lambda i: i % 2):
  """Clients whose texts' first word tells the label."""
  with open(path, "w", encoding="utf-8") as file:
    for i in range(60):
      row = {"client": f"c{i % 5}", "text": f"{'ab'[i % 2] * 9} {i}"}
      file.write(json.dumps(row | {"label": label(i)}) + "\n")
  return str(path)


def write_images(path):
  """Images whose brighter half tells the label."""
  rng = np.random.default_rng(0)
  arrays = {}
  for part, n in (("train", 80), ("test", 20)):
    y = rng.integers(0, 2, n).astype(np.uint8)
    x = rng.integers(0, 99, (n, 8, 8)).astype(np.uint8)
    x[:, :4] += (150 * (1 - y))[:, None, None].astype(np.uint8)
    x[:, 4:] += (150 * y)[:, None, None].astype(np.uint8)
    arrays |= {f"x_{part}": x, f"y_{part}": y}
  np.savez(path, **arrays)
  return str(path)


def text_config(folder, **changes):
  config = {
    "rounds": 6,
    "clients_per_round": 4,
    "lanes": 1,
    "model": {"path": write_encoder(folder / "model"), "num_classes": 2},
    "adapter": {"kind": "lora", "rank": 2, "also": ("classifier", "pooler")},
    "data": {
      "task": "classification",
      "name": "jsonl",
      "path": write_texts(folder / "texts.jsonl"),
      "sequence_length": 16,
      "unseen_fraction": 0.2,
    },
    "client": {"optimizer": "adam", "learning_rate": 0.03, "epochs": 4},
    "eval": {"every": 6},
    "checkpoint": {"every": 6},
  }
  return {
    k: v | changes.get(k, {}) if isinstance(v, dict) else changes.get(k, v)
    for k, v in config.items()
  }


def image_config(folder, model, **changes):
  return text_config(
    folder,
    model={"path": model, "init": "random", "num_classes": 0},
    adapter={"kind": "full", "also": ()},
    data={
      "name": "npz",
      "path": write_images(folder / "images.npz"),
      "image_key": "x",
      "partition": "dirichlet",
      "num_clients": 5,
      "alpha": 1.0,
    },
    **changes,
  )


@pytest.mark.slow
def test_lora_and_a_new_classifier_learn_from_texts(tmp_path):
  with tiny.one_device():
    built = experiment.build(text_config(tmp_path))
    assert built.trainable.keys() == {
      *("layers/q_proj", "layers/v_proj"),
      *("classifier", "classifier_bias", "pooler", "pooler_bias"),
    }
    summary, state = experiment.run(built, tmp_path / "run")
  for name in ("seen", "unseen"):
    accuracy = f"eval/{name}/accuracy"
    assert summary["final"][accuracy] > 0.9
    assert summary["final"][accuracy] > summary["base"][accuracy] + 0.2
    assert f"eval/{name}/bits_per_byte" not in summary["final"]
  # Merged, saved and read again it is the same classifier.
  trainable = built.algorithm.effective_trainable(state)
  adapters.export(
    tmp_path / "merged", built.model, built.base, built.adapter, trainable
  )
  model, params = huggingface.load(tmp_path / "merged")
  rows = built.data.evals["seen"].read("c0")
  args = (rows["tokens"],)
  got = model.apply(params, *args, mask=rows["token_mask"])
  want = built.adapter.apply(
    built.base, trainable, *args, mask=rows["token_mask"]
  )
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  # So it is in PEFT's format, the classifier whole.
  adapters.peft.save(tmp_path / "peft", built.model, built.adapter, trainable)
  adapter, again = adapters.peft.load(tmp_path / "peft", built.model)
  jax.tree.map(np.testing.assert_array_equal, again, dict(trainable))
  assert adapter.config["paths"] == built.adapter.config["paths"]


@pytest.mark.slow
def test_a_cnn_learns_from_images(tmp_path):
  config = models.CNNConfig(
    num_classes=2, image_size=8, channels=(4, 4), hidden=8
  )
  folder = write_config(tmp_path / "cnn", config)
  with tiny.one_device():
    built = experiment.build(image_config(tmp_path, folder))
    summary, _ = experiment.run(built, tmp_path / "run")
  assert built.tokenizer is None
  assert len(built.data.evals["test"].ids) == 8
  assert summary["final"]["eval/test/accuracy"] > 0.9
  assert summary["base"]["eval/test/accuracy"] < 0.8


@pytest.mark.slow
def test_a_vit_learns_from_images(tmp_path):
  config = models.VisionConfig(
    image_size=8,
    patch_size=4,
    num_channels=1,
    num_classes=2,
    architecture="ViTForImageClassification",
    **SIZES,
  )
  folder = write_config(tmp_path / "vit", config)
  with tiny.one_device():
    summary = experiment.train(
      image_config(tmp_path, folder, rounds=10), tmp_path / "run"
    )
  assert summary["final"]["eval/test/accuracy"] > 0.9


def test_rows_of_texts_and_images():
  source = data.from_arrays(
    {"ann": {"text": ["abcdef", "", "é"], "label": [1, 0, 1]}}
  )
  rows = data.tokenize_labelled(source, data.byte_tokenizer(), 5, 2).read("ann")
  assert rows["tokens"].tolist() == [
    [256, 97, 98, 99, 257],
    [256, 257, 258, 258, 258],
    [256, 195, 169, 257, 258],
  ]
  np.testing.assert_array_equal(rows["token_mask"], rows["tokens"] != 258)
  assert rows["label"].tolist() == [1, 0, 1]
  whole = np.array([[[0, 255]]], np.uint8)
  for images in (whole, whole / np.float32(255)):
    source = data.from_arrays({"ann": {"x": images, "label": [0]}})
    got = data.images_labelled(source, 2).read("ann")["x"]
    assert got.dtype == np.float32 and got.tolist() == [[[0.0, 1.0]]]


def test_a_folder_may_hash_words(tmp_path):
  path = tmp_path / "hashed_words.json"
  path.write_text('{"num_buckets": 50}')
  tokenizer = data.load_tokenizer(tmp_path)
  ids = tokenizer.encode("A cat, a CAT")
  assert ids.tolist() == tokenizer.encode(b"a cat , a cat").tolist()
  # Pinned: runs of other machines and years must agree.
  assert ids.tolist() == [46, 22, 24, 46, 22]
  assert tokenizer.vocab_size == 53 and ids.min() >= 3
  for wrong in ("{", "[]", '{"num_buckets": 0}', '{"num_buckets": "9"}'):
    path.write_text(wrong)
    with pytest.raises(errors.DataError, match="num_buckets"):
      data.load_tokenizer(tmp_path)


def test_sentence_polarity_is_read_and_held_out(tmp_path):
  path = tmp_path / "data.zip"
  with zipfile.ZipFile(path, "w") as archive:
    for kind in ("neg", "pos"):
      lines = [f"{kind} caf\xe9 {i} " for i in range(50)]
      archive.writestr(
        f"some/rt-polarity.{kind}", "\n".join(lines).encode("latin-1")
      )
  got = data.sentence_polarity(path, 0.2)
  train = got.train.read("all")
  tests = [got.evals["test"].read(i) for i in got.evals["test"].ids]
  texts = [t for x in (train, *tests) for t in x["text"]]
  assert len(texts) == len(set(texts)) == 100 and len(train["text"]) == 80
  for x in (train, *tests):
    for text, label in zip(x["text"], x["label"]):
      assert text.startswith(("neg caf\xe9", "pos caf\xe9")[label])
  if not (SHARED / "sentence_polarity").is_dir():
    pytest.skip(f"no {SHARED}; FEDFM_SHARED_DATA says where data lies")
  real = data.sentence_polarity(
    SHARED / "sentence_polarity/sentence_polarity.zip", 0.2
  )
  labels = real.train.read("all")["label"]
  assert len(labels) == 8530 and 0.45 < labels.mean() < 0.55


def _break(folder, *, text=None, image=None, files=None, label=None):
  """Builds a config with one mistake in it."""
  if files is not None:
    np.savez(folder / "images.npz", **files)
  if image is not None:
    path = write_config(folder / "cnn", models.CNNConfig(num_classes=2))
    config = image_config(folder, path)
    for group, changes in image.items():
      config[group] = config[group] | changes
  else:
    config = text_config(folder)
    for group, changes in (text or {}).items():
      config[group] = config[group] | changes
    if label is not None:
      write_texts(folder / "texts.jsonl", label)
  assembly.build(settings_lib.from_dict(config))


@pytest.mark.parametrize(
  ("mistake", "message"),
  [
    (
      {"text": {"data": {"task": "language_model"}}},
      "data.task: got 'language_model', but model.path is a Encoder",
    ),
    (
      {"text": {"model": {"num_classes": 0}}},
      "model.num_classes: data.task 'classification' needs a classifier",
    ),
    (
      {"text": {"model": {"path": "", "num_classes": 2}}},
      "model.num_classes: got 2, but LlamaForCausalLM takes no classifier",
    ),
    (
      {"text": {"data": {"image_key": "x"}}},
      "data.image_key: got 'x', but model.path is a Encoder, which expects",
    ),
    (
      {"text": {"data": {"sequence_length": 33}}},
      "data.sequence_length: got 33, but the model's longest is 32",
    ),
    (
      {"text": {"adapter": {"also": ("clasifier",)}}},
      "no parameter holds 'clasifier'",
    ),
    (
      {"text": {"adapter": {"kind": "full"}}},
      "adapter.also: classifier is trained by 'full' already",
    ),
    ({"label": lambda i: "good"}, "'label' is 'good', expected an integer"),
    ({"label": lambda i: i % 3}, "holds label 2, expected 0 to 1"),
    (
      {"image": {"data": {"partition": "natural"}}},
      "data.num_clients: got 5 with data.partition 'natural'",
    ),
    (
      {"image": {"data": {"image_key": ""}}},
      "data.image_key: got '', but model.path is a CNN, which expects the",
    ),
    (
      {"image": {"data": {"task": "language_model"}}},
      "data.task: got 'language_model', but data.name 'npz' expects",
    ),
  ],
)
def test_mistakes_are_named(mistake, message, tmp_path):
  with pytest.raises(errors.FedFMError, match=message) as e:
    _break(tmp_path, **mistake)
  assert "\n" not in str(e.value)


def test_archives_that_are_none_are_refused(tmp_path):
  path = tmp_path / "x.npz"
  np.savez(path, x_train=np.zeros(2))
  with pytest.raises(errors.DataError, match="has no array y_train"):
    data.from_npz(path)
  path.write_bytes(b"PK nothing")
  for read in (data.from_npz, lambda p: data.sentence_polarity(p, 0.1)):
    with pytest.raises(errors.DataError, match="cannot be read"):
      read(path)


def test_configs_build_what_they_say():
  """The shipped models' folders, without data."""
  for name, shape in (("emnist_cnn", (2, 10)), ("vit_mnist", (2, 10))):
    config = families.read_config(
      ROOT / "configs" / "models" / name / "config.json"
    )[1]
    model = models.build(config)
    images = jax.ShapeDtypeStruct((2, 28, 28), "float32")
    assert jax.eval_shape(model.apply, model.shapes, images).shape == shape
    settings = settings_lib.from_dict(
      {
        "data": {"task": "classification", "image_key": "x"},
        "model": {"path": str(ROOT / "configs" / "models" / name)},
      }
    )
    blueprint.check_task(settings, config)
