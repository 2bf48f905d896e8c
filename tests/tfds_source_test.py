"""Sources of TFDS data sets, without TensorFlow."""

import numpy as np
import pytest
from reference import assert_one_line

from fedfm import data_files, errors, models, population
from fedfm import settings as settings_lib
from fedfm.data import byte_tokenizer, files


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
  """Builds a data set in both formats' folders; returns the good one."""
  tfds = pytest.importorskip("tensorflow_datasets")

  class FedfmToy(tfds.core.GeneratorBasedBuilder):
    """Three clients with numbers, text and a ragged field."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
      features = {
        "user": tfds.features.Text(),
        "number": np.int64,
        "x": tfds.features.Tensor(shape=(2,), dtype=np.float32),
        "text": tfds.features.Text(),
        "ragged": tfds.features.Sequence(np.int64),
        "kind": tfds.features.ClassLabel(num_classes=3),
        "image": tfds.features.Tensor(shape=(4, 4, 1), dtype=np.uint8),
      }
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for i in range(30):
        yield (
          i,
          {
            "user": "abc"[i % 3],
            "number": i % 2,
            "x": np.full(2, i, np.float32),
            "text": f"té{i}",
            "ragged": list(range(i)),
            "kind": i % 3,
            "image": np.full((4, 4, 1), i, np.uint8),
          },
        )

  folder = tmp_path_factory.mktemp("tfds")
  tfds.disable_progress_bar()
  FedfmToy(data_dir=folder, file_format="array_record").download_and_prepare()
  return folder


def test_from_tfds_groups_by_client(tfds_dir):
  clients = files.from_tfds(
    "fedfm_toy", "train", "user", tfds_dir, fields=["x", "text"]
  )
  assert sorted(clients.ids) == ["a", "b", "c"]
  assert [clients.size(c) for c in "abc"] == [10, 10, 10]
  rows = clients.read("b")
  assert rows.keys() == {"x", "text"}
  assert rows["x"].dtype == np.float32 and rows["x"].shape == (10, 2)
  assert sorted(rows["x"][:, 0]) == list(range(1, 30, 3))
  assert rows["text"][0] == f"té{rows['x'][0, 0]:.0f}".encode()


def test_from_tfds_without_a_client_key_has_one_client(tfds_dir):
  clients = files.from_tfds("fedfm_toy", "train", "", tfds_dir, fields=["text"])
  by_user = files.from_tfds("fedfm_toy", "train", "user", tfds_dir, ["text"])
  assert clients.ids == ("all",)
  total = sum(by_user.size(client_id) for client_id in by_user.ids)
  assert clients.size("all") == total == len(clients.read("all")["text"])


def test_from_tfds_takes_integer_clients_and_slices(tfds_dir):
  clients = files.from_tfds(
    "fedfm_toy", "train[:20]", "number", tfds_dir, fields=["x"]
  )
  assert sorted(clients.ids) == ["0", "1"]
  assert sum(clients.size(c) for c in clients.ids) == 20


@pytest.mark.parametrize(
  "changes, parts",
  [
    ({"name": "no_such_data"}, ["'no_such_data'"]),
    ({"split": "tran"}, ["'tran'", "train"]),
    ({"client_key": "usr"}, ["'usr'", "did you mean 'user'"]),
    ({"fields": ["txt"]}, ["'txt'", "did you mean 'text'"]),
    ({"client_key": "x"}, ["record 0", "ndarray"]),
    ({"name": "mnist"}, ["not prepared", "array_record"]),
    ({"label_key": "knd"}, ["'knd'", "did you mean 'kind'"]),
    (
      {"label_key": "kind", "num_classes": 2},
      ["'kind' has 3 classes, but the model has 2"],
    ),
    (
      {"label_key": "number", "num_classes": 1},
      ["'number' is 1, expected 0 to 0"],
    ),
    ({"label_key": "text", "num_classes": 2}, ["'text' is |S", "an integer"]),
  ],
)
def test_from_tfds_refuses(tfds_dir, changes, parts):
  arguments = {"name": "fedfm_toy", "split": "train", "client_key": "user"}
  with pytest.raises(errors.DataError) as error:
    files.from_tfds(**(arguments | changes), data_dir=tfds_dir)
  assert_one_line(error, *parts)


def test_pairs_and_categories_are_read_from_tfds(tfds_dir, tmp_path):
  tower = models.StackConfig(width=4, num_layers=1, num_heads=1, mlp_width=4)
  clip = models.CLIPConfig(
    text=tower, image=tower, vocab_size=272, eos_id=257, image_size=4,
    patch_size=2, num_channels=1,
  )  # fmt: skip
  fields = {"name": "fedfm_toy", "path": str(tfds_dir), "num_clients": 3}
  fields |= {"partition": "shards", "shards": 1, "label_key": "kind"}
  fields |= {"client_key": "user", "unseen_fraction": 0.0}
  (tmp_path / "config.json").write_text("{}")

  def load(**changes):
    values = {"model": {"path": str(tmp_path)}, "data": fields | changes}
    return population.load(settings_lib.from_dict(values), clip).data.train

  by_pairs = load(task="contrastive", image_key="image", sequence_length=8)
  rows = [by_pairs.read(i) for i in by_pairs.ids]
  kinds = [np.unique(np.rint(255 * x["x"][:, 0, 0, 0]) % 3) for x in rows]
  assert sorted(k.tolist() for k in kinds) == [[0], [1], [2]]
  assert rows[0]["x"].shape[1:] == (4, 4, 1)
  texts = [byte_tokenizer().decode(t) for x in rows for t in x["tokens"]]
  seen = [int(t.removeprefix("té")) for t in texts]
  assert seen == [round(255 * i[0, 0, 0]) for x in rows for i in x["x"]]
  tuned = load(prompt_key="text", response_key="user", template="plain")
  counts = [tuned.read(i)["num_examples"].sum() for i in tuned.ids]
  assert sum(counts) == len(seen)


def test_from_tfds_refuses_ragged_fields_when_read(tfds_dir):
  clients = files.from_tfds("fedfm_toy", "train", "user", tfds_dir)
  with pytest.raises(errors.DataError) as error:
    clients.read("a")
  assert_one_line(error, "'a'", "'ragged'", "shape")


def test_from_tfds_says_what_it_cannot_read_without_tensorflow(
  tfds_dir, tmp_path
):
  made = tfds_dir / "fedfm_toy" / "1.0.0"
  copy = tmp_path / "fedfm_toy" / "1.0.0"
  copy.mkdir(parents=True)
  for file in made.iterdir():
    text = file.read_bytes()
    if file.suffix == ".json":
      text = text.replace(b"array_record", b"tfrecord")
    (copy / file.name.replace("array_record", "tfrecord")).write_bytes(text)
  with pytest.raises(errors.DataError) as error:
    files.from_tfds("fedfm_toy", "train", "user", tmp_path)
  assert_one_line(error, "tfrecord", "without TensorFlow", "array_record")


def test_from_tfds_says_when_files_are_damaged(tfds_dir, tmp_path):
  made = tfds_dir / "fedfm_toy" / "1.0.0"
  copy = tmp_path / "fedfm_toy" / "1.0.0"
  copy.mkdir(parents=True)
  for file in made.iterdir():
    data = file.read_bytes()
    cut = data if file.suffix == ".json" else data[: len(data) // 2]
    (copy / file.name).write_bytes(cut)
  with pytest.raises(errors.DataError) as error:
    files.from_tfds("fedfm_toy", "train", "user", tmp_path, fields=["x"])
  assert_one_line(error, "fedfm_toy")


def test_a_digest_is_of_clients_and_not_of_their_files(tfds_dir):
  """Files that are written again may differ in their bytes."""

  def digest(client_key, *fields):
    source = files.from_tfds("fedfm_toy", "train", client_key, tfds_dir, fields)
    data = {"name": "fedfm_toy", "path": "anywhere"}
    return data_files.digest(settings_lib.from_dict({"data": data}), source)

  name = digest("user", "x")
  assert name.startswith("sha256:") and name == digest("user", "x")
  assert len({name, digest("user", "number"), digest("kind", "x")}) == 3
