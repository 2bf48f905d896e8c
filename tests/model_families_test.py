"""Every family against what the Hugging Face implementations computed.

The fixtures are made by `make_model_fixtures.py`, which says what each is; one
test here makes them again where transformers is installed.
"""

import functools
import shutil

import jax
import jax.numpy as jnp
import make_model_fixtures
from make_model_fixtures import (
  CASES,
  FIXTURES,
  LENGTH,
  NEW,
  PADDING,
  PROMPT,
  SHORT,
  flip,
  padded,
  tokens,
)
import numpy as np
import pytest
import round_trip

from fedfm import sharding
from fedfm.models import attention, families, generation, huggingface, losses

# Whose cache is like another's of the list.
_ALIKE = ("llama_biases_tied", "qwen2_windows")
GREEDY = [
  pytest.param(name, marks=pytest.mark.slow if name in _ALIKE else ())
  for name, case in CASES.items()
  if case.greedy
]
# Layers of two kinds; the other families' are like these or Llama's.
MIXED = ["gemma3", pytest.param("gemma2", marks=pytest.mark.slow)]
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """All cases as whole folders."""
  root = tmp_path_factory.mktemp("models")
  shutil.copytree(FIXTURES, root, dirs_exist_ok=True)
  for name, case in CASES.items():
    if case.weights is not None:
      weights = FIXTURES / case.weights / "model.safetensors"
      shutil.copy(weights, root / name)
  return root


@functools.cache
def expected(name):
  with np.load(FIXTURES / name / "expected.npz") as values:
    return dict(values)


def rows():
  """The whole rows and the padded one as one batch, for one compilation."""
  row, mask, positions = padded()
  whole = np.broadcast_to(np.arange(LENGTH), (2, LENGTH))
  return (
    np.concatenate([tokens(), row]),
    np.concatenate([whole, positions]),
    np.concatenate([np.ones_like(whole), mask]).astype(np.int32),
  )


def hidden_of(model, params):
  ids, positions, segment_ids = rows()
  apply = jax.jit(functools.partial(model.apply, output="hidden"))
  return apply(params, ids, positions=positions, segment_ids=segment_ids)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_loss(root, name, tmp_path):
  model, params = huggingface.load(root / name, dtype="float32")
  want = expected(name)
  hidden = hidden_of(model, params)
  logits = model.unembed(params, hidden)
  np.testing.assert_allclose(logits[:2], want["logits"], **TOLERANCE)
  np.testing.assert_allclose(logits[2:, PADDING:], want["padded"], **TOLERANCE)
  nll = losses.cross_entropy(logits[:2, :-1], tokens()[:, 1:])
  np.testing.assert_allclose(jnp.mean(nll), want["loss"], rtol=1e-5)
  # The same weights with a head of its own, or without.
  flip(root / name, tmp_path)
  other, params = huggingface.load(tmp_path, dtype="float32")
  assert other.config.tie_embeddings != model.config.tie_embeddings
  logits = other.unembed(params, hidden[:1])
  np.testing.assert_allclose(logits, want["flipped"], **TOLERANCE)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.short])
def test_positions_stretched_by_length_follow_each_length(root, name):
  model, params = huggingface.load(root / name, dtype="float32")
  apply = jax.jit(model.apply)
  got = apply(params, tokens()[:1, :SHORT])
  want = expected(name)
  np.testing.assert_allclose(got, want["short"], **TOLERANCE)
  assert np.abs(got - want["logits"][:1, :SHORT]).max() > 1e-2


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_tokens_with_a_cache(root, name):
  model, params = huggingface.load(root / name, dtype="float32")
  got = generation.generate(
    model.apply,
    model.init_cache,
    (params,),
    tokens()[:, :PROMPT],
    max_new_tokens=NEW,
  )
  np.testing.assert_array_equal(got.tokens, expected(name)["greedy"])


def test_long_texts_are_attended_to_in_tiles(root, monkeypatch):
  """Windows by layer that are known at run time only; prompts into a cache."""
  monkeypatch.setattr(attention, "MAX_UNROLLED", 1)
  model, params = huggingface.load(root / "gemma3", dtype="float32")
  got = model.unembed(params, hidden_of(model, params))
  want = expected("gemma3")
  np.testing.assert_allclose(got[:2], want["logits"], **TOLERANCE)
  np.testing.assert_allclose(got[2:, PADDING:], want["padded"], **TOLERANCE)
  cache = model.init_cache(2, LENGTH + 3)
  apply = jax.jit(model.apply)
  _, cache = apply(params, tokens()[:, :5], cache=cache)
  got, _ = apply(params, tokens()[:, 5:], cache=cache)
  np.testing.assert_allclose(got, want["logits"][:, 5:], **TOLERANCE)


@pytest.mark.parametrize("name", MIXED)
def test_unrolled_layers_and_sharded_ones(root, name):
  """Windows by layer, static and not: a scan has the kind at run time only."""
  mesh = sharding.make_mesh({"clients": 2, "fsdp": 1, "tensor": 4})
  model, params = huggingface.load(
    root / name, mesh=mesh, dtype="float32", scan_layers=False
  )
  with jax.set_mesh(mesh):
    got = model.unembed(params, hidden_of(model, params))
  np.testing.assert_allclose(got[:2], expected(name)["logits"], **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bitwise_and_sharded_load_equals_unsharded(
  root, name, tmp_path
):
  round_trip.check_bitwise(root / name, tmp_path)


def test_fixtures_are_what_transformers_computes(tmp_path):
  pytest.importorskip("transformers", reason="needs the extra hf")
  pytest.importorskip("torch", reason="needs the extra hf")
  make_model_fixtures.make_all(tmp_path)
  for name in CASES:
    made, kept = tmp_path / name, FIXTURES / name
    weights = "model.safetensors"
    assert (made / weights).exists() == (kept / weights).exists()
    if (kept / weights).exists():
      assert (made / weights).read_bytes() == (kept / weights).read_bytes()
    assert families.read_config(made / "config.json") == families.read_config(
      kept / "config.json"
    )
    with np.load(made / "expected.npz") as values:
      assert values.keys() == expected(name).keys()
      for key, want in expected(name).items():
        np.testing.assert_allclose(values[key], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_what_is_saved(root, name, tmp_path):
  pytest.importorskip("transformers", reason="needs the extra hf")
  torch = pytest.importorskip("torch", reason="needs the extra hf")
  model, params = huggingface.load(root / name)
  huggingface.save(tmp_path, model, params)
  theirs = make_model_fixtures.load(tmp_path)
  with torch.no_grad():
    got = theirs(torch.tensor(tokens())).logits.numpy()
  np.testing.assert_allclose(got, expected(name)["logits"], atol=1e-5)
