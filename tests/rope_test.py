"""Rotary scalings beyond what the fixtures of `model_families_test` hold."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedfm import errors
from fedfm.models import rope
from fedfm.models.decoder import DecoderConfig, decoder

LONG = {
  "short_factor": (1.0, 1.5),
  "long_factor": (2.0, 6.0),
  "original_max_position_embeddings": 100,
}


def yarn(**fields):
  fields = {"factor": 4.0, "original_max_position_embeddings": 32} | fields
  return rope.Yarn(**fields)


def llama3(**fields):
  fields = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | fields
  fields = {"factor": 8.0, "original_max_position_embeddings": 32} | fields
  return rope.Llama3(**fields)


def long(**fields):
  return rope.LongRope(**(LONG | fields))


def test_dynamic_and_long_scalings_take_a_length_a_row():
  lengths = [40, 100, 101, 400]
  for scaling in (rope.Dynamic(factor=4.0), rope.LongRope(**LONG)):
    rows, _ = scaling.frequencies(1e4, 4, jnp.asarray(lengths), 100)
    alone = [scaling.frequencies(1e4, 4, n, 100)[0] for n in lengths]
    np.testing.assert_allclose(rows, alone, rtol=1e-5)
    np.testing.assert_array_equal(alone[0], alone[1])
    assert (alone[2] <= alone[1]).all() and (alone[2] < alone[1]).any()


def test_yarn_keeps_fast_dimensions_and_divides_slow_ones():
  scaling = rope.Yarn(factor=4.0, original_max_position_embeddings=4096)
  got, attention_factor = scaling.frequencies(1e4, 64, 0, 0)
  plain = rope.plain_frequencies(1e4, 64)
  turns = 4096 * plain / (2 * math.pi)
  np.testing.assert_array_equal(got[turns > 40], plain[turns > 40])
  np.testing.assert_allclose(got[turns < 0.7], plain[turns < 0.7] / 4)
  assert attention_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_attention_factors_follow_the_config():
  yarn = {"factor": 4.0, "original_max_position_embeddings": 4096}
  assert (
    rope.Yarn(**yarn, attention_factor=1.5).frequencies(1e4, 4, 0, 0)[1] == 1.5
  )
  both = rope.Yarn(**yarn, mscale=0.7, mscale_all_dim=1.0)
  want = (0.07 * math.log(4) + 1) / (0.1 * math.log(4) + 1)
  assert both.frequencies(1e4, 4, 0, 0)[1] == pytest.approx(want)
  long = rope.LongRope(**LONG).frequencies(1e4, 4, 1, 400)[1]
  assert long == pytest.approx(math.sqrt(1 + math.log(4) / math.log(100)))
  assert rope.LongRope(**LONG).frequencies(1e4, 4, 1, 100)[1] == 1
  assert rope.LongRope(**LONG, factor=1.0).frequencies(1e4, 4, 1, 400)[1] == 1


def test_part_of_a_head_is_rotated():
  x = np.random.default_rng(0).normal(size=(1, 5, 2, 8)).astype(np.float32)
  cos, sin = rope.angles(np.arange(5)[None], 4, 100.0)
  got = rope.rotate(jnp.asarray(x), cos, sin)
  np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
  for position in range(5):
    for i, angle in enumerate((position, position * 0.1)):
      turned = complex(math.cos(angle), math.sin(angle))
      want = (x[0, position, :, i] + 1j * x[0, position, :, i + 2]) * turned
      np.testing.assert_allclose(
        got[0, position, :, i] + 1j * got[0, position, :, i + 2],
        want,
        rtol=1e-5,
      )


SIZES = {
  "vocab_size": 16,
  "width": 16,
  "num_layers": 2,
  "num_heads": 2,
  "mlp_width": 8,
}


@pytest.mark.parametrize(
  "changes,words",
  [
    ({"rope_scaling": rope.LongRope(**LONG)}, "short_factor: got 2 .* 4"),
    ({"rope_scaling": rope.Dynamic(factor=2.0), "head_dim": 2}, "at least 4"),
    ({"rope_scaling": rope.Linear(factor=2.0), "positions": "learned"}, "rope"),
    ({"rotary_fraction": 0.4}, "rotary_fraction: got 0.4"),
    ({"rotary_fraction": 0.1}, "rotary_fraction: got 0.1"),
    ({"rotary_fraction": 1.5}, "rotary_fraction"),
    ({"positions": "sin"}, "positions: got 'sin' .*learned, rope"),
    ({"norm": "layr"}, "did you mean 'layer'"),
    ({"activation": "tanh"}, "activation: got 'tanh'"),
    ({"attention_kernel": "flash"}, "attention_kernel: got 'flash'"),
    ({"sliding_window": 0}, "sliding_window: got 0"),
    ({"dtype": "foo"}, "dtype: got 'foo', expected one of"),
    ({"width": 8.0}, "width: got 8.0, expected a whole number"),
    ({"num_layers": True}, "num_layers: got True"),
    ({"scan_layers": "no"}, "scan_layers: got 'no', expected True or False"),
    ({"sliding_layers": (True, False)}, "needs model.sliding_window"),
    ({"sliding_layers": (True,), "sliding_window": 4}, "got 1 layers"),
    ({"attention_softcap": 0.0}, "attention_softcap: got 0.0"),
  ],
  ids=str,
)
def test_bad_options_are_refused(changes, words):
  with pytest.raises(errors.ConfigError, match=words) as e:
    DecoderConfig(**(SIZES | changes))
  assert "\n" not in str(e.value)


def test_learned_positions_need_no_even_head():
  options = SIZES | {"width": 6, "num_heads": 2, "head_dim": None}
  with pytest.raises(errors.ConfigError, match="head_dim: got 3"):
    DecoderConfig(**options)
  learned = DecoderConfig(**options, positions="learned")
  assert learned.head_dim == 3
  model = decoder(learned)
  tokens = np.zeros((1, 3), np.int32)
  assert jax.eval_shape(model.apply, model.shapes, tokens).shape[:2] == (1, 3)


@pytest.mark.parametrize(
  "make,words",
  [
    (lambda: rope.Linear(factor=0.5), "factor: got 0.5"),
    (lambda: rope.Dynamic(factor=float("nan")), "factor: got nan"),
    (
      lambda: rope.Llama3(
        factor=8.0,
        low_freq_factor=4.0,
        high_freq_factor=1.0,
        original_max_position_embeddings=8,
      ),
      "high_freq_factor: got 1.0",
    ),
    (lambda: rope.Linear(factor=math.inf), "factor: got inf"),
    (lambda: yarn(factor=math.inf), "factor: got inf"),
    (lambda: yarn(beta_fast=0.0), "beta_fast: got 0.0"),
    (lambda: yarn(beta_slow=-1.0), "beta_slow: got -1.0"),
    (lambda: yarn(attention_factor=0.0), "attention_factor: got 0.0"),
    (lambda: yarn(mscale_all_dim=-7.0), "mscale_all_dim: got -7.0"),
    (
      lambda: yarn().frequencies(1.0, 4, 0, 0),
      "rope_theta: got 1.0, expected above 1",
    ),
    (lambda: llama3(original_max_position_embeddings=0), "_embeddings: got 0"),
    (lambda: llama3(low_freq_factor=0.0), "low_freq_factor: got 0.0"),
    (lambda: long(original_max_position_embeddings=1), "_embeddings: got 1"),
    (lambda: long(short_factor=(1.0, 0.0)), "short_factor: got 0.0"),
    (lambda: long(long_factor=(math.nan, 1.0)), "long_factor: got nan"),
    (lambda: long(factor=-3.0), "factor: got -3.0"),
  ],
)
def test_bad_scalings_are_refused(make, words):
  with pytest.raises(errors.ConfigError, match=words):
    make()
