"""The losses against formulas in NumPy, and what masks must do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import errors
from fedfm.models import losses

VOCAB = 7


def apply(trainable, base, tokens):
  """A bigram model: logits of the next token are a row of a table."""
  return (trainable + base)[tokens]


def example(seed=0, batch=3, seq=5):
  rng = np.random.default_rng(seed)
  table = jnp.asarray(rng.normal(size=(VOCAB, VOCAB)), jnp.float32)
  return table, {
    "tokens": rng.integers(0, VOCAB, (batch, seq)),
    "loss_mask": rng.integers(0, 2, (batch, seq)).astype(np.float32),
    "mask": np.ones(batch, np.float32),
  }


def by_hand(table, batch):
  """Sum of nats, tokens and hits, one token at a time."""
  total = count = hits = 0
  table = np.asarray(table, np.float64)
  for row, marks, on in zip(batch["tokens"], batch["loss_mask"], batch["mask"]):
    for before, token, mark in zip(row[:-1], row[1:], marks[1:]):
      if mark and on:
        p = np.exp(table[before]) / np.exp(table[before]).sum()
        total, count = total - np.log(p[token]), count + 1
        hits += int(p.argmax() == token)
  return total, count, hits


def test_cross_entropy_is_exact_and_survives_large_logits():
  logits = jnp.asarray([[0.0, 1.0, 2.0], [1e4, 0.0, -1e4], [0.0, 1e4, 0.0]])
  got = losses.cross_entropy(logits, jnp.asarray([2, 0, 0]))
  want = [np.log(np.exp([-2.0, -1.0, 0.0]).sum()), 0.0, 1e4]
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_cross_entropy_gradient_is_softmax_minus_one_hot():
  logits = jnp.asarray([0.3, -1.0, 2.0])
  got = jax.grad(lambda x: losses.cross_entropy(x, jnp.asarray(1)))(logits)
  np.testing.assert_allclose(
    got, jax.nn.softmax(logits) - jnp.asarray([0.0, 1.0, 0.0]), atol=1e-6
  )


def test_language_model_matches_by_hand():
  table, batch = example()
  batch["mask"][1] = 0
  loss, aux = losses.language_model(apply)(table, 0 * table, batch, None)
  total, count, hits = by_hand(table, batch)
  assert 0 < count < 12
  np.testing.assert_allclose(loss, total / count, rtol=1e-6)
  np.testing.assert_allclose(aux["loss_sum"], total, rtol=1e-6)
  assert (int(aux["tokens"]), int(aux["correct"])) == (count, hits)


def test_what_is_masked_does_not_matter():
  table, batch = example()
  batch["mask"][2] = 0
  batch["loss_mask"][:, -1] = 0
  other = {k: v.copy() for k, v in batch.items()}
  other["tokens"][2] = 0
  other["tokens"][:, -1] = 3  # Never predicted, nor does it predict.
  other["loss_mask"][2] = 1
  other["loss_mask"][:, 0] = 1 - other["loss_mask"][:, 0]
  run = jax.value_and_grad(losses.language_model(apply), has_aux=True)
  a, b = (run(table, 0 * table, x, None) for x in (batch, other))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["mask", "loss_mask"])
def test_nothing_to_predict_is_zero(name):
  table, batch = example()
  batch[name][:] = 0
  run = jax.value_and_grad(losses.language_model(apply), has_aux=True)
  (loss, aux), gradient = run(table, 0 * table, batch, None)
  assert float(loss) == 0 and float(aux["tokens"]) == 0
  np.testing.assert_array_equal(gradient, 0)


def test_sums_add_up_over_batches():
  table, batch = example(batch=4)
  loss_fn = losses.language_model(apply)
  whole = loss_fn(table, 0 * table, batch, None)[1]
  parts = [
    loss_fn(table, 0 * table, {k: v[i : i + 2] for k, v in batch.items()}, None)
    for i in (0, 2)
  ]
  for name, value in whole.items():
    np.testing.assert_allclose(
      value, parts[0][1][name] + parts[1][1][name], rtol=1e-6
    )


def test_classification_matches_by_hand():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(5, 3))
  labels, mask = np.array([0, 1, 2, 1, 0]), np.array([1, 1, 0, 1, 1.0])
  batch = {"x": logits.astype(np.float32), "label": labels, "mask": mask}
  loss_fn = losses.classification(lambda trainable, base, x: trainable * x)
  loss, aux = loss_fn(jnp.ones(()), None, batch, None)
  nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(5), labels]
  np.testing.assert_allclose(loss, (nll * mask).sum() / 4, rtol=1e-5)
  assert int(aux["tokens"]) == 4
  hits = ((logits.argmax(-1) == labels) * mask).sum()
  assert int(aux["correct"]) == hits


def test_classification_of_padding_only_is_zero():
  batch = {
    "x": jnp.ones((2, 3)),
    "label": jnp.zeros(2, jnp.int32),
    "mask": jnp.zeros(2),
  }
  loss_fn = losses.classification(lambda trainable, base, x: trainable * x)
  run = jax.value_and_grad(loss_fn, has_aux=True)
  (loss, _), gradient = run(jnp.ones(()), None, batch, None)
  assert float(loss) == 0 and float(gradient) == 0


CHUNK_BATCH, CHUNK_SEQ, CHUNK_VOCAB, CHUNK_WIDTH = 3, 10, 23, 4


def hidden_or_logits(trainable, base, tokens, output="logits"):
  """A model in two parts, so that its head can be applied to some tokens."""
  hidden = jnp.tanh((trainable["table"] + base)[tokens])
  if output == "hidden":
    return hidden
  return soft_capped_head(trainable, base)(hidden)


def soft_capped_head(trainable, base):
  del base
  return lambda hidden: 2 * jnp.tanh(hidden @ trainable["head"] / 2)


def chunk_example(dtype):
  rng = np.random.default_rng(5)
  trainable = {
    "table": rng.normal(size=(CHUNK_VOCAB, CHUNK_WIDTH)),
    "head": rng.normal(size=(CHUNK_WIDTH, CHUNK_VOCAB)),
  }
  trainable = jax.tree.map(lambda x: jnp.asarray(x, dtype), trainable)
  shape = (CHUNK_BATCH, CHUNK_SEQ)
  batch = {
    "tokens": rng.integers(0, CHUNK_VOCAB, shape),
    "loss_mask": rng.integers(0, 2, shape).astype(dtype),
    "mask": np.array([1, 0, 1], dtype),
  }
  return trainable, jnp.asarray(0.1, dtype), batch, None


def value_and_gradient(chunk):
  loss_fn = losses.language_model(
    hidden_or_logits, unembed=soft_capped_head, chunk=chunk
  )
  return jax.value_and_grad(loss_fn, has_aux=True)


@pytest.mark.slow
# One position a row; and four, which do not divide the length.
@pytest.mark.parametrize("chunk", [1, 12])
@pytest.mark.parametrize(
  ("dtype", "limit"), [("float32", 2e-6), ("float64", 0)]
)
def test_chunks_change_nothing(chunk, dtype, limit):
  with jax.enable_x64(dtype == "float64"):
    example = chunk_example(dtype)
    expected = value_and_gradient(0)(*example)
    assert float(expected[0][1]["tokens"]) > 5
    got = value_and_gradient(chunk)(*example)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
      assert a.dtype == b.dtype == dtype
      np.testing.assert_allclose(a, b, rtol=limit or 1e-13, atol=limit or 1e-15)


def sizes_in(jaxpr):
  """Sizes of all values in a jaxpr and in those inside it."""
  for equation in jaxpr.eqns:
    yield from (v.aval.size for v in equation.outvars)
    for inner in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield from sizes_in(inner)


def largest(chunk):
  run = value_and_gradient(chunk)
  example = chunk_example("float32")
  return max(sizes_in(jax.make_jaxpr(run)(*example).jaxpr))


def test_all_logits_never_exist_at_once():
  rows = CHUNK_BATCH * CHUNK_VOCAB
  assert largest(0) >= rows * (CHUNK_SEQ - 1)
  # Of a chunk of 2 positions a row there are logits, and nothing is larger.
  assert largest(2 * CHUNK_BATCH) == rows * 2


def test_a_bad_chunk_is_named():
  with pytest.raises(errors.ConfigError, match="loss_chunk: got -1"):
    losses.language_model(hidden_or_logits, unembed=soft_capped_head, chunk=-1)
  with pytest.raises(errors.ConfigError, match="loss_chunk: got 8, .* unembed"):
    losses.language_model(hidden_or_logits, chunk=8)
