"""A tiny model with LoRA on stacked kernels, and its clients in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from fedfm import adapters, data
from fedfm.models import Model, layers

WIDTH, OUT, RANK, ALPHA = 4, 3, 2, 3.0
SCALE = ALPHA / RANK
BATCH, RATE = 2, 0.02
SIZES = (7, 4, 3, 2, 1)
PATHS = ("layers/w", "out")
# Rounds of unequal clients, of whom not all take part.
ROUNDS = (
  ("client 0", "client 3", "client 2"),
  ("client 4", "client 0", "client 1"),
  ("client 1", "client 2", "client 4"),
)


def _client(index, size):
  rng = np.random.default_rng([5, index])
  return {
    "x": rng.normal(size=(size, WIDTH)),
    "y": rng.normal(size=(size, OUT)) + 0.5 * index,
  }


SOURCE = data.from_arrays(
  {f"client {i}": _client(i, size) for i, size in enumerate(SIZES)}
)


def _apply(params, x):
  kernels = params["layers"]["w"]
  for layer in range(2):
    x = layers.dense(x, jax.tree.map(lambda k, i=layer: k[i], kernels))
  return layers.dense(x, params["out"])


MODEL = Model(
  init=lambda key: base(),
  apply=_apply,
  axes=None,
  shapes={
    "layers": {"w": jax.ShapeDtypeStruct((2, WIDTH, WIDTH), jnp.float32)},
    "out": jax.ShapeDtypeStruct((WIDTH, OUT), jnp.float32),
  },
)


@functools.cache
def adapter(rank=RANK, alpha=ALPHA):
  return adapters.lora(MODEL, rank=rank, alpha=alpha, targets=["w", "out"])


def base(dtype=np.float64):
  rng = np.random.default_rng(2)
  return {
    "layers": {"w": 0.5 * rng.normal(size=(2, WIDTH, WIDTH)).astype(dtype)},
    "out": 0.5 * rng.normal(size=(WIDTH, OUT)).astype(dtype),
  }


def start(rank=RANK, dtype=np.float64):
  """A trainable that is drawn as the adapter's, with a head beside it."""
  rng, trainable = np.random.default_rng(3), {}
  for path, lead, out in (("layers/w", (2,), WIDTH), ("out", (), OUT)):
    bound = WIDTH**-0.5
    a = rng.uniform(-bound, bound, (*lead, WIDTH, rank)).astype(dtype)
    trainable[path] = {"a": a, "b": np.zeros((*lead, rank, out), dtype)}
  return trainable | {"head": np.full(OUT, 0.1, dtype)}


def loss(trainable, params, batch, key):
  """Mean squared error of the adapted model plus the head."""
  del key
  pairs = {path: trainable[path] for path in PATHS}
  y = adapter().apply(params, pairs, batch["x"]) + trainable["head"]
  squares = jnp.sum(jnp.square(y - batch["y"]), axis=-1) * batch["mask"]
  return jnp.sum(squares) / jnp.maximum(jnp.sum(batch["mask"]), 1), {}


def pack(ids, lanes=2, **options):
  return data.pack(
      SOURCE, ids, lanes=lanes, batch_size=BATCH, epochs=2,
      step_buckets=[20], slot_buckets=[4], **options,
  )  # fmt: skip


def rows(ids):
  """Rows of clients in the population."""
  return [SOURCE.ids.index(i) for i in ids]


def shares(ids):
  """p_i, of those who take part."""
  sizes = np.array([SOURCE.size(i) for i in ids], np.float64)
  return sizes / sizes.sum()


def kernels(params):
  """The base as {path: kernel}."""
  return {"layers/w": params["layers"]["w"], "out": params["out"]}


def products(trainable, scale=1.0):
  """s A B of every path."""
  return {p: scale * trainable[p]["a"] @ trainable[p]["b"] for p in PATHS}


def _gradient(weights, trainable, scale, x, y):
  """Gradient of the mean squared error by hand, for effective kernels."""
  first, second = weights["layers/w"]
  h1 = x @ first
  h2 = h1 @ second
  error = 2 * (h2 @ weights["out"] + trainable["head"] - y) / len(x)
  g_h2 = error @ weights["out"].T
  g_h1 = g_h2 @ second.T
  by_path = {
    "layers/w": np.stack([x.T @ g_h1, h1.T @ g_h2]),
    "out": h2.T @ error,
  }
  grads = {"head": error.sum(axis=0)}
  for path, g in by_path.items():
    a, b = trainable[path]["a"], trainable[path]["b"]
    grads[path] = {
      "a": scale * g @ np.swapaxes(b, -1, -2),
      "b": scale * np.swapaxes(a, -1, -2) @ g,
    }
  return grads


def batches(client_id):
  """A client's batches of two epochs, in stored order."""
  examples = SOURCE.read(client_id)
  for _ in range(2):
    for at in range(0, len(examples["x"]), BATCH):
      yield [examples[name][at : at + BATCH] for name in ("x", "y")]


def train(trainable, params, client_id, *, scale=SCALE, train="ab", head=True,
          extra=None, beside=None):  # fmt: skip
  """A client's local SGD, float64.

  Args:
    trainable: What it starts from.
    params: The base.
    client_id: Whose data.
    scale: Of the client's adapter.
    train: Factors that move.
    head: Whether the head moves.
    extra: `extra(trainable) -> gradients` to add, or None.
    beside: {path: matrix} added to the kernels, or None.

  Returns:
    The trained trainable.
  """
  t = jax.tree.map(np.array, trainable)
  for x, y in batches(client_id):
    own = products(t, scale)
    weights = {
      p: w + own[p] + (0 if beside is None else beside[p])
      for p, w in kernels(params).items()
    }
    grads = _gradient(weights, t, scale, x, y)
    if extra is not None:
      added = extra(t)
      for path in PATHS:
        grads[path] = {f: grads[path][f] + added[path][f] for f in "ab"}
    for path in PATHS:
      for factor in train:
        t[path][factor] = t[path][factor] - RATE * grads[path][factor]
    if head:
      t["head"] = t["head"] - RATE * grads["head"]
  return t


def mean(trees, weights):
  """The weighted mean of trees."""
  return jax.tree.map(
    lambda *xs: sum(w * x for w, x in zip(weights, xs)), *trees
  )


def relative_error(got, ideal):
  """|ideal - got| / |ideal| over the matrices of all paths."""
  missed = sum(np.sum((ideal[p] - got[p]) ** 2) for p in PATHS)
  return np.sqrt(missed / sum(np.sum(ideal[p] ** 2) for p in PATHS))


def assert_close(got, expected, rtol=1e-10):
  """Asserts that two trees agree, to a part of each leaf's largest entry."""
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
    y = np.asarray(y)
    largest = np.abs(y).max(initial=1e-3)
    np.testing.assert_allclose(x, y, rtol=0, atol=rtol * largest)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halved:
  """A kernel kept in another form, as a quantised one is."""

  half: jax.Array

  def dense(self, x, bias=None):
    y = 2 * (x @ self.half)
    return y if bias is None else y + bias
