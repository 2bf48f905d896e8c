"""Whatever is in a file or a config: it is taken as it is, or refused."""

import gzip
import json
import math
import pathlib
import shutil

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
import tiny

from fedfm import checkpoint, data, errors, settings
from fedfm.models import huggingface

# The default run looks briefly, the slow one for minutes.
BRIEF = hypothesis.settings(
  max_examples=100, deadline=None, database=None, derandomize=True
)
EFFORT = [
  pytest.param(60, id="brief"),
  pytest.param(1500, id="long", marks=pytest.mark.slow),
]


def search(examples, strategy, check):
  """Calls `check` with examples; raises for the smallest one that fails."""

  @hypothesis.settings(
    BRIEF,
    max_examples=examples,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(strategy)
  def run(example):
    check(example)

  run()


def one_line(error):
  assert str(error) and "\n" not in str(error)


def field_paths():
  default = settings.to_dict(settings.Settings())
  for name, value in default.items():
    if isinstance(value, dict) and not name.endswith("options"):
      yield from (f"{name}.{field}" for field in value)
    else:
      yield name


SCALARS = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(),
  st.integers(-3, 20),
  # By their exponents: Python prints none of the largest.
  st.sampled_from([31, 63, 64, 1400, 17_000]).map(lambda bits: -(2**bits)),
  st.sampled_from([31, 63, 64, 1400, 17_000]).map(lambda bits: 2**bits),
  st.floats(),
  st.text(max_size=8),
  st.sampled_from(["auto", "True", "1e9", "nan", "lora", "sgd", "[1]", "-0"]),
)
VALUES = st.recursive(
  SCALARS,
  lambda inner: st.one_of(
    st.lists(inner, max_size=3),
    st.dictionaries(st.text(max_size=5), inner, max_size=3),
  ),
  max_leaves=4,
)
NAMES = st.one_of(st.sampled_from(sorted(field_paths())), st.text(max_size=12))


def check_finite(value):
  if isinstance(value, dict):
    for part in value.values():
      check_finite(part)
  elif isinstance(value, float):
    assert math.isfinite(value)


@pytest.mark.parametrize("examples", EFFORT)
def test_configs(examples):
  """Nested fields of any value give settings that JSON can hold, or a line."""

  def check(changes):
    values = {}
    for path, value in changes.items():
      group, _, name = path.partition(".")
      if name and isinstance(values.setdefault(group, {}), dict):
        values[group][name] = value
      else:
        values[group] = value
    try:
      built = settings.from_dict(values)
    except errors.ConfigError as e:
      one_line(e)
      return
    plain = json.loads(json.dumps(settings.to_dict(built)))
    assert settings.from_dict(plain) == built
    check_finite({k: v for k, v in plain.items() if "options" not in k})

  search(3 * examples, st.dictionaries(NAMES, VALUES, max_size=4), check)


@pytest.mark.parametrize("examples", EFFORT)
def test_overrides(examples):
  """As text of a command line; what is taken means the same as a value."""

  def check(example):
    path, text = example
    try:
      kind = settings.field_type(path)
      if hasattr(kind, "__dataclass_fields__"):
        return
      value = settings.convert(text, kind, path)
    except errors.ConfigError as e:
      one_line(e)
      return
    again = settings.convert(value, kind, path)
    np.testing.assert_equal(again, value)  # NaN is NaN here.

  search(3 * examples, st.tuples(NAMES, st.text(max_size=12)), check)


def damaged(content):
  """Strategy of the bytes of a file with something done to them."""
  size = len(content)

  def flip(where):
    changed = bytearray(content)
    for position, value in where:
      changed[position] ^= value
    return bytes(changed)

  def splice(parts):
    (begin, end), middle = sorted(parts[0]), parts[1]
    return content[:begin] + middle + content[end:]

  spot = st.integers(0, size - 1)
  flips = st.lists(st.tuples(spot, st.integers(1, 255)), min_size=1, max_size=4)
  return st.one_of(
    flips.map(flip),
    spot.map(lambda end: content[:end]),
    st.tuples(st.tuples(spot, spot), st.binary(max_size=9)).map(splice),
    st.binary(max_size=60),
  )


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
@pytest.mark.parametrize("examples", EFFORT)
def test_jsonl(tmp_path, examples, name):
  rows = [{"client": c, "text": t} for c in "ab" for t in ("one", "é\n", "x")]
  text = "".join(json.dumps(row) + "\n" for row in rows).encode()
  content = gzip.compress(text, mtime=0) if name.endswith("gz") else text

  def check(example):
    path = tmp_path / name
    path.write_bytes(example)
    try:
      source = data.from_jsonl(path, "client", "text")
      read = {i: source.read(i)["text"] for i in source.ids}
    except errors.DataError as e:
      one_line(e)
      return
    # What is taken is what a plain reader finds.
    if name.endswith("gz"):
      example = gzip.decompress(example)
    expected = {}
    for line in example.split(b"\n"):
      if line.strip():
        row = json.loads(line.decode())
        expected.setdefault(row["client"], []).append(row["text"])
    assert {i: list(texts) for i, texts in read.items()} == expected
    assert [source.size(i) for i in source.ids] == [
      len(texts) for texts in expected.values()
    ]

  search(2 * examples, damaged(content), check)


@pytest.mark.parametrize("examples", EFFORT)
def test_model_folders(tmp_path, examples):
  """A damaged header or config is refused, or changes nothing that is read."""
  good = pathlib.Path(tiny.write_model(tmp_path / "good", width=4))
  _, params = huggingface.load(good)
  weights = (good / "model.safetensors").read_bytes()
  header = 8 + int.from_bytes(weights[:8], "little")
  config = (good / "config.json").read_bytes()
  bad = tmp_path / "bad"
  bad.mkdir()

  def check(example):
    name, content = example
    (bad / "config.json").write_bytes(config)
    (bad / "model.safetensors").write_bytes(weights)
    if name == "header":
      content, name = content + weights[header:], "model.safetensors"
    (bad / name).write_bytes(content)
    try:
      model, loaded = huggingface.load(bad)
    except errors.FedFMError as e:
      one_line(e)
      return
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    if name == "model.safetensors":
      jax.tree.map(np.testing.assert_array_equal, loaded, params)
    else:
      for x in jax.tree.leaves(loaded):
        assert np.isfinite(x).all()
      assert model.config.vocab_size == 272

  strategy = st.one_of(
    damaged(weights[:header]).map(lambda b: ("header", b)),
    damaged(config).map(lambda b: ("config.json", b)),
  )
  search(examples, strategy, check)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("saved")
  with checkpoint.Checkpointer(folder) as checkpointer:
    for round in (1, 2):
      checkpointer.save(round, state(round), {"losses": [0.5, round]})
  return folder


def state(round):
  rng = np.random.default_rng(round)
  return {"w": rng.normal(size=(6, 5)), "n": np.array(round)}


@pytest.mark.parametrize("examples", EFFORT)
def test_checkpoints(saved, tmp_path, examples):
  """A damaged file gives the bits that were saved, or the round before."""
  files = sorted(p.relative_to(saved) for p in (saved / "2").rglob("*"))
  files = [f for f in files if (saved / f).is_file()]
  contents = {f: (saved / f).read_bytes() for f in files}
  files = [f for f in files if contents[f]]
  folder, found = tmp_path / "checkpoints", set()

  def check(example):
    file, content = example
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    if content is None:
      (folder / file).unlink()
    else:
      (folder / file).write_bytes(content)
    with checkpoint.Checkpointer(folder) as checkpointer:
      round, got, extra = checkpointer.restore(state(0))
      assert extra == {"losses": [0.5, round]}
      found.add(round)
      for name, value in state(round).items():
        np.testing.assert_array_equal(got[name], value)
      assert (folder / "2.damaged").exists() == (round == 1)

  strategy = st.one_of(
    *(damaged(contents[f]).map(lambda b, f=f: (f, b)) for f in files),
    st.sampled_from([(f, None) for f in files]),
  )
  search(examples, strategy, check)
  assert found == {1, 2}
