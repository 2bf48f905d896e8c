"""Rounds of the LoRA methods in NumPy float64, as their papers write them.

Clients of a smaller rank hold smaller arrays here; an SVD is of the dense mean.
A state is a dict; a method is `method(state, ids, round_index) -> state`.
"""

import functools

import jax
import jax.numpy as jnp
import lora_problem as problem
from lora_problem import ALPHA, PATHS, RANK, SCALE, mean, products, train
import numpy as np
import reference

RANKS = (2, 1)  # In turn, by row.
STRENGTH, DECAY = 0.7, 0.5


def initial():
  """The state before the first round."""
  zero = {
    p: np.zeros_like(w) for p, w in problem.kernels(problem.base()).items()
  }
  trainable = problem.start()
  return {"trainable": trainable, "start": trainable, "change": zero,
          "clients": {}, "rounds": 0}  # fmt: skip


def changed_base(state):
  """The base with what a method added to it."""
  base, change = problem.base(), state["change"]
  return {
    "layers": {"w": base["layers"]["w"] + change["layers/w"]},
    "out": base["out"] + change["out"],
  }


def cut(trainable, rank):
  """The first columns of A and rows of B."""
  small = {
    p: {
      "a": trainable[p]["a"][..., :rank],
      "b": trainable[p]["b"][..., :rank, :],
    }
    for p in PATHS
  }
  return trainable | small


def pad(trainable):
  """Zeros up to the highest rank."""
  padded = {}
  for p in PATHS:
    a, b = trainable[p]["a"], trainable[p]["b"]
    none, more = [(0, 0)] * (a.ndim - 2), (0, RANK - a.shape[-1])
    padded[p] = {
      "a": np.pad(a, [*none, (0, 0), more]),
      "b": np.pad(b, [*none, more, (0, 0)]),
    }
  return trainable | padded


def rank_of(client_id):
  return RANKS[problem.rows([client_id])[0] % len(RANKS)]


def best_of_rank(matrix, rank):
  """U, S V of a dense SVD, cut; each column's largest entry is positive."""
  u, s, v = np.linalg.svd(matrix, full_matrices=False)
  u, b = u[..., :rank], (s[..., None] * v)[..., :rank, :]
  rows = np.argmax(np.abs(u), axis=-2)[..., None, :]
  sign = np.sign(np.take_along_axis(u, rows, axis=-2))
  return {"a": u * sign, "b": b * np.swapaxes(sign, -1, -2)}


def sum_products(trained, weights, scales):
  """sum_i w_i s_i A_i B_i, dense."""
  each = [products(t, w * s) for t, w, s in zip(trained, weights, scales)]
  return {p: sum(e[p] for e in each) for p in PATHS}


def _averaged(state, ids, factors):
  trained = [
    train(state["trainable"], problem.base(), i, train=factors) for i in ids
  ]
  averaged = mean(trained, problem.shares(ids))
  weights = [SCALE] * len(ids)
  ideal = sum_products(trained, problem.shares(ids), weights)
  error = problem.relative_error(products(averaged, SCALE), ideal)
  return state | {"trainable": averaged, "error": error}


def fedit(state, ids, round_index):
  return _averaged(state, ids, "ab")


def ffa_lora(state, ids, round_index):
  return _averaged(state, ids, "b")


def rolora(state, ids, round_index):
  return _averaged(state, ids, "ba"[round_index % 2])


def fedsvd(state, ids, round_index):
  new = _averaged(state, ids, "b")
  for p in PATHS:
    new["trainable"][p] = best_of_rank(products(new["trainable"])[p], RANK)
  return new


def fresh(client_id, round_index, rank):
  """The A that a client of FLoRA draws."""
  key = reference.client_key(client_id, round_index)
  key = jax.random.fold_in(key, 0x80000000)
  drawn = {}
  for index, (p, pair) in enumerate((p, problem.start()[p]) for p in PATHS):
    a = jax.random.uniform(
        jax.random.fold_in(key, index), pair["a"].shape, jnp.float64,
        -pair["a"].shape[-2]**-0.5, pair["a"].shape[-2]**-0.5,
    )  # fmt: skip
    drawn[p] = {"a": np.asarray(a), "b": np.zeros_like(pair["b"])}
  return cut(drawn, rank)


def flora(state, ids, round_index, both_weighted=False):
  base, p = changed_base(state), problem.shares(ids)
  trained = [
    train(
      state["trainable"] | fresh(i, round_index, rank_of(i)),
      base,
      i,
      scale=ALPHA / rank_of(i),
    )
    for i in ids
  ]
  scales = [ALPHA / rank_of(i) for i in ids]
  weights = p**2 if both_weighted else p
  added = sum_products(trained, weights, scales)
  heads = mean([t["head"] for t in trained], p)
  change = {q: state["change"][q] + added[q] for q in PATHS}
  new = state["trainable"] | {"head": heads}
  return state | {"trainable": new, "change": change, "error": 0.0}


def fedex_lora(state, ids, round_index):
  base, p = changed_base(state), problem.shares(ids)
  trained = [train(state["trainable"], base, i) for i in ids]
  averaged = mean(trained, p)
  ideal = sum_products(trained, p, [SCALE] * len(ids))
  got = products(averaged, SCALE)
  change = {q: state["change"][q] + ideal[q] - got[q] for q in PATHS}
  return state | {"trainable": averaged, "change": change, "error": 0.0}


def flexlora(state, ids, round_index):
  trained, scales, p = [], [], problem.shares(ids)
  for i in ids:
    scale = ALPHA / rank_of(i)
    begin = cut(state["trainable"], rank_of(i))
    for q in PATHS:
      begin[q] = {"a": begin[q]["a"], "b": begin[q]["b"] * SCALE / scale}
    trained.append(train(begin, problem.base(), i, scale=scale))
    scales.append(scale)
  ideal = sum_products(trained, p, scales)
  new = {"head": mean([t["head"] for t in trained], p)}
  for q in PATHS:
    new[q] = best_of_rank(ideal[q] / SCALE, RANK)
  error = problem.relative_error(products(new, SCALE), ideal)
  return state | {"trainable": state["trainable"] | new, "error": error}


def zero_padding(state, ids, round_index):
  p = problem.shares(ids)
  trained = [
    train(cut(state["trainable"], rank_of(i)), problem.base(), i) for i in ids
  ]
  averaged = mean([pad(t) for t in trained], p)
  ideal = sum_products(trained, p, [SCALE] * len(ids))
  error = problem.relative_error(products(averaged, SCALE), ideal)
  return state | {"trainable": averaged, "error": error}


def _tails(trainable, kept):
  """Norms of the columns of A and rows of B beyond `kept`, kernel by kernel."""
  for q in PATHS:
    a, b = trainable[q]["a"][..., kept:], trainable[q]["b"][..., kept:, :]
    yield (
      q,
      a,
      b,
      *(np.sqrt((x**2).sum(axis=(-2, -1), keepdims=True)) for x in (a, b)),
    )


def _tail_gradient(trainable, kept):
  grads = {}
  for q, a, b, norm_a, norm_b in _tails(trainable, kept):
    zero = {f: np.zeros_like(trainable[q][f]) for f in "ab"}
    with np.errstate(invalid="ignore"):
      unit = [np.nan_to_num(x / n) for x, n in ((a, norm_a), (b, norm_b))]
    zero["a"][..., kept:] = STRENGTH * norm_b * unit[0]
    zero["b"][..., kept:, :] = STRENGTH * norm_a * unit[1]
    grads[q] = zero
  return grads


def _tail(trainable, kept):
  return sum(np.sum(n * m) for *_, n, m in _tails(trainable, kept))


def hetlora(state, ids, round_index):
  trained, ranks = [], dict(state["clients"])
  for i in ids:
    rank = ranks.get(i, rank_of(i))
    kept = max(1, int(DECAY * rank))
    begin = cut(state["trainable"], rank)
    penalty = functools.partial(_tail_gradient, kept=kept)
    end = train(begin, problem.base(), i, extra=penalty)
    ranks[i] = kept if _tail(end, kept) < _tail(begin, kept) else rank
    trained.append(cut(end, ranks[i]))
  sizes = np.array([
      np.sqrt(sum(np.sum(m**2) for m in products(t).values())) for t in trained
  ])  # fmt: skip
  averaged = mean([pad(t) for t in trained], sizes / sizes.sum())
  ideal = sum_products(trained, problem.shares(ids), [SCALE] * len(ids))
  error = problem.relative_error(products(averaged, SCALE), ideal)
  return state | {"trainable": averaged, "clients": ranks, "error": error}


def fedsa_lora(state, ids, round_index):
  clients, p = dict(state["clients"]), problem.shares(ids)
  trained = []
  for i in ids:
    own, begin = clients.get(i, state["start"]), {}
    for q in PATHS:
      begin[q] = {"a": state["trainable"][q]["a"], "b": own[q]["b"]}
    trained.append(train(begin | {"head": own["head"]}, problem.base(), i))
    clients[i] = trained[-1]
  averaged = mean(trained, p)
  new = {q: state["trainable"][q] | {"a": averaged[q]["a"]} for q in PATHS}
  ideal = sum_products(trained, p, [SCALE] * len(ids))
  error = problem.relative_error(products(averaged, SCALE), ideal)
  return state | {"trainable": state["trainable"] | new, "clients": clients,
                  "error": error}  # fmt: skip


def _train_local(state, ids, weight=0.5):
  clients, sent = dict(state["clients"]), state["trainable"]
  for i in ids:
    own = clients.get(i, state["start"]) | {"head": sent["head"]}
    clients[i] = train(
        own, problem.base(), i, scale=weight * SCALE, head=False,
        beside=products(sent, (1 - weight) * SCALE),
    )  # fmt: skip
  return clients


def feddpa_t(state, ids, round_index):
  return fedit(state, ids, round_index) | {"clients": _train_local(state, ids)}


def feddpa_f(state, ids, round_index, global_rounds=1):
  if round_index < global_rounds:
    return fedit(state, ids, round_index)
  return state | {"clients": _train_local(state, ids), "error": 0.0}
