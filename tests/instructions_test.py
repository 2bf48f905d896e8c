"""Prompts and responses as rows: what is predicted, cut, packed and counted."""

import jax
import numpy as np
import pytest

from fedfm import errors
from fedfm.data import instructions, prompt_formats, source, tokenizers
from fedfm.models import DecoderConfig, decoder, losses

BYTES = tokenizers.byte_tokenizer()
FIELDS = instructions.Fields("ask", "say", "about")
EXAMPLES = [
  ("add", "1 2", "3"),
  ("who?", "", "me and you"),
  ("name a colour", "", "h\u00e9"),
  ("go", "on", "ok"),
  ("what is it that is long", "it is", "this one is rather long"),
]


def clients(examples=EXAMPLES):
  ask, about, say = zip(*examples)
  return source.from_arrays({"ann": {"ask": ask, "about": about, "say": say}})


def rows(examples=EXAMPLES, length=32, name="plain", **kwargs):
  return instructions.instruct(
    clients(examples),
    BYTES,
    length,
    FIELDS,
    prompt_formats.builtin(name),
    **kwargs,
  ).read("ann")


def segments(packed):
  """Yields (tokens, marks) of every example of packed rows."""
  for tokens, marks, ids in zip(
    packed["tokens"], packed["loss_mask"], packed["segment_ids"]
  ):
    for segment in range(1, ids.max() + 1):
      yield tokens[ids == segment].tolist(), marks[ids == segment].tolist()


def test_an_example_is_a_prompt_and_a_response_that_ends():
  examples = list(segments(rows(length=64)))
  assert len(examples) == len(EXAMPLES)
  found = {bytes(t for t in tokens if t < 256) for tokens, _ in examples}
  assert found == {
    f"{ask}\n{about}\n{say}".encode() if about else f"{ask}\n{say}".encode()
    for ask, about, say in EXAMPLES
  }
  for tokens, marks in examples:
    assert (tokens[0], tokens[-1]) == (BYTES.bos, BYTES.eos)
    said = bytes(t for t, m in zip(tokens, marks) if m and t < 256).decode()
    assert said in {say for _, _, say in EXAMPLES}
    assert marks == sorted(marks)  # All of the prompt comes before.


def test_packing_moves_examples_and_loses_none():
  packed, apart = rows(length=40), rows(length=40, packed=False)
  assert len(packed["tokens"]) < len(apart["tokens"]) == len(EXAMPLES)
  assert sorted(segments(packed)) == sorted(segments(apart))
  for part in (packed, apart):
    padding = part["segment_ids"] == 0
    assert (part["tokens"][padding] == BYTES.pad).all()
    assert not part["loss_mask"][padding].any()
  # Positions count from the start of each segment.
  for ids, positions in zip(packed["segment_ids"], packed["positions"]):
    for segment in range(1, ids.max() + 1):
      own = positions[ids == segment]
      np.testing.assert_array_equal(own, np.arange(len(own)))


def test_bytes_are_those_of_the_responses():
  total = sum(len(say.encode()) for _, _, say in EXAMPLES)
  assert rows(length=64)["num_bytes"].sum() == total
  # What a format adds to a response is no text of its own.
  chat = rows(length=128, name="chatml")
  assert chat["num_bytes"].sum() == total < chat["loss_mask"].sum()


@pytest.mark.parametrize("ask, say", [(4, 40), (40, 4), (40, 40), (30, 20)])
def test_what_is_too_long_keeps_its_middle(ask, say):
  question, answer = ("q" * ask)[:-1] + "!", "." + ("a" * say)[1:]
  cut = rows([(question, "", answer)], length=32)
  tokens, marks = cut["tokens"][0], cut["loss_mask"][0]
  assert tokens[0] == BYTES.bos and (cut["segment_ids"] == 1).all()
  predicted = int(marks.sum())
  assert predicted == min(say + 1, max(16, 32 - (ask + 2)))
  # The end of the prompt and the beginning of the response stay side by side.
  middle = 32 - predicted
  assert bytes(tokens[middle - 2 : middle + 1].tolist()) == b"!\n."
  assert cut["num_bytes"][0] == min(predicted, say)


@pytest.fixture(scope="module")
def model():
  """A decoder whose attention and positions both matter."""
  model = decoder(
    DecoderConfig(
      vocab_size=272, width=16, num_layers=1, num_heads=2, mlp_width=16
    )
  )
  return model, model.init(jax.random.key(0))


def test_a_packed_example_has_the_loss_of_a_row_of_its_own(model):
  model, params = model
  packed, apart = rows(length=64), rows(length=64, packed=False)
  apply = jax.jit(model.apply)

  def nats(part, places=("positions", "segment_ids")):
    """{tokens of an example: loss of each of its tokens but the first}."""
    logits = apply(
      params, part["tokens"], **{name: part[name] for name in places}
    )
    labels = np.roll(part["tokens"], -1, axis=1)
    loss = np.asarray(losses.cross_entropy(logits, labels))
    return {
      tuple(part["tokens"][r][ids == s].tolist()): loss[r][ids == s][:-1]
      for r, ids in enumerate(part["segment_ids"])
      for s in range(1, ids.max() + 1)
    }

  together, alone = nats(packed), nats(apart)
  assert together.keys() == alone.keys() and len(alone) == len(EXAMPLES)
  for example, expected in alone.items():
    np.testing.assert_allclose(together[example], expected, atol=2e-5)
  # Rows of their own need no segments, and those of several do.
  for example, got in nats(apart, ()).items():
    np.testing.assert_allclose(got, alone[example], atol=2e-5)
  naive = nats(packed, ())
  assert max(np.abs(naive[e] - alone[e]).max() for e in alone) > 1e-2


@pytest.mark.parametrize("chunk", [0, 48])
def test_the_loss_reads_segments_and_counts_bytes(model, chunk):
  model, params = model
  loss = jax.jit(
    losses.language_model(
      lambda trainable, base, *args, **kw: model.apply(base, *args, **kw),
      unembed=lambda trainable, base: lambda x: model.unembed(base, x),
      chunk=chunk,
    )
  )
  sums = []
  for packed in (True, False):
    part = rows(length=64, packed=packed)
    batch = part | {"mask": np.ones(len(part["tokens"]), np.float32)}
    sums.append(loss((), params, batch, jax.random.key(0))[1])
  for name in ("tokens", "loss_sum", "correct", "bytes"):
    np.testing.assert_allclose(sums[0][name], sums[1][name], rtol=1e-5)
  assert sums[0]["bytes"] == sum(len(say.encode()) for _, _, say in EXAMPLES)


@pytest.mark.parametrize(
  "example, message",
  [
    (("a", "", " "), "'ann': field 'say' of example 0 is empty"),
    (("", "b", "c"), "'ann': field 'ask' of example 0 is empty"),
  ],
)
def test_empty_prompts_and_responses_are_named(example, message):
  with pytest.raises(errors.DataError, match=message):
    rows([example])


def test_bad_arguments_are_named():
  with pytest.raises(errors.ConfigError, match="sequence_length: got 3"):
    rows(length=3)
  other = FIELDS._replace(response="sya")
  with pytest.raises(errors.DataError, match="'ann': no field 'sya'.*'say'"):
    instructions.instruct(
      clients(), BYTES, 32, other, prompt_formats.builtin("plain")
    ).read("ann")
