"""Cached generation against recomputing everything for every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import errors, sharding
from fedfm.models import generation
from fedfm.models.decoder import DecoderConfig, decoder

VOCAB = 13
PROMPTS = np.random.default_rng(0).integers(0, VOCAB, (3, 6))
NEW = 5


@functools.cache
def make():
  model = decoder(
    DecoderConfig(
      vocab_size=VOCAB,
      width=16,
      num_layers=2,
      num_heads=4,
      num_kv_heads=2,
      mlp_width=24,
      scan_layers=False,
      tie_embeddings=False,
    )
  )
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.7, x.shape), x.dtype), model.shapes
  )
  return model, params


def run(prompts=PROMPTS, max_new_tokens=NEW, **options):
  model, params = make()
  return generation.generate(
    model.apply, model.init_cache, (params,), prompts,
    max_new_tokens=max_new_tokens, **options
  )  # fmt: skip


@functools.cache
def logits_fn():
  return jax.jit(make()[0].apply)


def greedy_by_hand(prompt, max_new_tokens=NEW):
  """One row, no cache: the whole text again for every token."""
  text = list(prompt)
  for _ in range(max_new_tokens):
    padded = np.zeros((1, 16), int)  # Causal: what follows does not matter.
    padded[0, : len(text)] = text
    text.append(int(logits_fn()(make()[1], padded)[0, len(text) - 1].argmax()))
  return text[len(prompt) :]


def test_greedy_equals_full_recomputation():
  got = run()
  assert got.tokens.tolist() == [greedy_by_hand(p) for p in PROMPTS]
  assert got.lengths.tolist() == [NEW] * 3
  assert len(set(map(tuple, got.tokens.tolist()))) == 3


@pytest.mark.parametrize("lengths", [[2, 6, 3], [1, 1, 4], [5, 5, 5]])
def test_ragged_prompts_equal_each_alone(lengths):
  prompts = PROMPTS.copy()
  for row, n in zip(prompts, lengths):
    row[n:] = 10**6  # Padding is never looked at, not even if absurd.
  got = run(prompts, prompt_lengths=np.array(lengths))
  want = [greedy_by_hand(p[:n]) for p, n in zip(PROMPTS, lengths)]
  assert got.tokens.tolist() == want


def test_prompt_of_one_token():
  got = run(PROMPTS[:1, :1])
  assert got.tokens.tolist() == [greedy_by_hand(PROMPTS[0, :1])]


def test_eos_ends_a_row_and_fills_it():
  free = run().tokens.tolist()
  eos = free[0][2]
  got = run(eos=eos)
  for row, length, want in zip(got.tokens.tolist(), got.lengths, free):
    end = want.index(eos) + 1 if eos in want else NEW
    assert int(length) == end
    assert row == want[:end] + [eos] * (NEW - end)
  assert int(got.lengths[0]) <= 3


def test_any_of_several_tokens_ends_a_row():
  free = run().tokens.tolist()
  stops = [free[0][2], free[1][1]]
  got = run(eos=stops)
  for row, length, want in zip(got.tokens.tolist(), got.lengths, free):
    end = next((i + 1 for i, x in enumerate(want) if x in stops), NEW)
    assert int(length) == end
    assert row == want[:end] + stops[:1] * (NEW - end)
  assert got.lengths.tolist() != [NEW] * 3
  with pytest.raises(errors.ConfigError, match="eos: got 13, expected 0 to 12"):
    run(eos=[0, VOCAB])


def test_other_tokens_that_end_a_row_compile_nothing():
  model, params = make()
  traced = []

  def apply(params, tokens, *, positions=None, cache=None):
    traced.append(isinstance(cache["index"], jax.core.Tracer))
    return model.apply(params, tokens, positions=positions, cache=cache)

  counts = []
  for stops in ([1, 2], [3, 4], [5, 1]):
    traced.clear()
    generation.generate(
      apply, model.init_cache, (params,), PROMPTS, max_new_tokens=2, eos=stops
    )
    counts.append(len(traced))
  assert counts[1] == counts[2] < counts[0]


def test_eos_inside_a_prompt_does_not_end_it():
  prompts = PROMPTS.copy()
  free = run(prompts, prompt_lengths=np.array([2, 6, 6]))
  unused = set(range(VOCAB)) - set(np.asarray(free.tokens).flatten().tolist())
  eos = sorted(unused & set(PROMPTS[1].tolist()))
  assert eos
  got = run(prompts, prompt_lengths=np.array([2, 6, 6]), eos=eos[0])
  np.testing.assert_array_equal(got.tokens, free.tokens)


def test_loop_ends_with_the_last_row():
  """Early end: the number of decoding steps taken is the longest row's."""
  model, params = make()
  calls = []

  def apply(params, tokens, *, positions=None, cache=None):
    jax.debug.callback(lambda p: calls.append(int(p)), positions[0, -1])
    return model.apply(params, tokens, positions=positions, cache=cache)

  def count(**options):
    calls.clear()
    out = generation.generate(
      apply, model.init_cache, (params,), PROMPTS[:1], max_new_tokens=NEW,
      **options
    )  # fmt: skip
    jax.block_until_ready(out)
    jax.effects_barrier()
    return sorted(calls)

  assert count() == [4, 5, 6, 7, 8, 9]
  first = run(PROMPTS[:1]).tokens[0].tolist()
  assert count(eos=first[1]) == [4, 5, 6][: 2 + first.index(first[1])]


@pytest.mark.slow
def test_samples_follow_the_distribution():
  # One prompt in many rows: each row has its own key.
  prompts = np.repeat(PROMPTS[:1], 4000, axis=0)
  got = run(
    prompts, max_new_tokens=1, temperature=2.0, key=jax.random.key(0)
  ).tokens[:, 0]
  logits = logits_fn()(make()[1], PROMPTS[:1])[0, -1]
  want = np.asarray(jax.nn.softmax(logits / 2.0))
  counts = np.bincount(got, minlength=VOCAB)
  # Chi-squared with at most 12 degrees of freedom: 32.9 is its 0.1% tail.
  assert ((counts - 4000 * want) ** 2 / (4000 * want)).sum() < 32.9


@pytest.mark.slow
@pytest.mark.parametrize(
  "options", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.6}], ids=str
)
def test_truncated_sampling_keeps_exactly_the_nucleus(options):
  prompts = np.repeat(PROMPTS[:1], 2000, axis=0)
  got = run(
    prompts, max_new_tokens=1, temperature=3.0, key=jax.random.key(0), **options
  )
  logits = logits_fn()(make()[1], PROMPTS[:1])[0, -1]
  order = np.argsort(-np.asarray(logits))[: options.get("top_k", VOCAB)]
  p = np.asarray(jax.nn.softmax(logits[order] / 3.0))
  reach = int(np.searchsorted(np.cumsum(p), options.get("top_p", 2.0))) + 1
  assert set(np.asarray(got.tokens[:, 0]).tolist()) == set(
    order[:reach].tolist()
  )


def test_top_k_of_one_is_greedy():
  got = run(temperature=0.7, top_k=1, key=jax.random.key(3))
  np.testing.assert_array_equal(got.tokens, run().tokens)


def test_a_row_does_not_depend_on_the_others():
  options = {"temperature": 1.0, "key": jax.random.key(5)}
  together = run(prompt_lengths=np.array([3, 6, 5]), **options)
  alone = run(PROMPTS[:1, :3], **options)
  np.testing.assert_array_equal(together.tokens[:1], alone.tokens)
  other = run(temperature=1.0, key=jax.random.key(6))
  assert not np.array_equal(together.tokens, other.tokens)


def test_extra_parameters_reach_apply():
  """An adapter's apply takes the trainable second."""
  model, params = make()

  def adapted(base, trainable, tokens, **kwargs):
    merged = base | {"final_norm": base["final_norm"] * trainable}
    return model.apply(merged, tokens, **kwargs)

  scale = jnp.linspace(-1.0, 1.0, 16)
  got = generation.generate(
    adapted, model.init_cache, (params, scale), PROMPTS, max_new_tokens=NEW
  )
  merged = params | {"final_norm": params["final_norm"] * scale}
  want = generation.generate(
    model.apply, model.init_cache, (merged,), PROMPTS, max_new_tokens=NEW
  )
  np.testing.assert_array_equal(got.tokens, want.tokens)
  assert not np.array_equal(got.tokens, run().tokens)


def test_new_values_do_not_compile_again():
  run()
  before = generation._run._cache_size()
  run((PROMPTS + 1) % VOCAB, prompt_lengths=np.array([1, 2, 3]))
  assert generation._run._cache_size() == before


@pytest.mark.slow
def test_sharded_equals_one_device():
  model, params = make()
  mesh = sharding.make_mesh({"clients": 2, "fsdp": 2, "tensor": 2})
  config_vocab = (
    VOCAB + 1
  )  # 14 divides over `tensor`; the last is never likely.
  wide = decoder(
    DecoderConfig(**{**vars(model.config), "vocab_size": config_vocab})
  )
  wide_params = params | {
    "embed": jnp.pad(params["embed"], ((0, 1), (0, 0))),
    "lm_head": jnp.pad(params["lm_head"], ((0, 0), (0, 1))),
  }
  prompts = np.concatenate([PROMPTS, PROMPTS[:1]])

  def greedy(params):
    return generation.generate(
      wide.apply, wide.init_cache, (params,), prompts, max_new_tokens=NEW
    ).tokens

  want = greedy(wide_params)
  places = sharding.shardings(mesh, wide.axes, wide.shapes)
  placed = jax.device_put(wide_params, places)
  with jax.set_mesh(mesh):
    np.testing.assert_array_equal(greedy(placed), want)


@pytest.mark.parametrize(
  "error,options,words",
  [
    (errors.DataError, {"prompts": PROMPTS[:0]}, "not empty"),
    (errors.DataError, {"prompts": PROMPTS + VOCAB}, "vocabulary"),
    (errors.DataError, {"prompts": PROMPTS - VOCAB}, "vocabulary"),
    (errors.DataError, {"prompt_lengths": [0, 1, 2]}, "prompt_lengths"),
    (errors.DataError, {"prompt_lengths": [1, 2, 7]}, "prompt_lengths"),
    (errors.DataError, {"prompt_lengths": [1, 2]}, "prompt_lengths"),
    (errors.ConfigError, {"max_new_tokens": 0}, "max_new_tokens"),
    (errors.ConfigError, {"temperature": -1.0}, "temperature"),
    (errors.ConfigError, {"temperature": 1.0}, "key"),
    (errors.ConfigError, {"top_k": 0}, "top_k"),
    (errors.ConfigError, {"top_k": VOCAB + 1}, "top_k"),
    (errors.ConfigError, {"top_p": 0.0}, "top_p"),
    (errors.ConfigError, {"eos": VOCAB}, "eos"),
  ],
)
def test_bad_arguments_are_refused(error, options, words):
  with pytest.raises(error, match=words) as e:
    run(**options)
  assert "\n" not in str(e.value)
