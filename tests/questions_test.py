"""Questions to a model: scores against its logits, answers against its own."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from fedfm import completion, data, errors, questions
from fedfm.data import prompt_formats, tokenizers
from fedfm.models import DecoderConfig, decoder, losses

BYTES = data.byte_tokenizer()


@pytest.fixture(scope="module")
def model():
  model = decoder(
    DecoderConfig(
      vocab_size=272,
      width=16,
      num_layers=1,
      num_heads=2,
      mlp_width=32,
      max_length=32,
    )
  )
  return model, model.init(jax.random.key(0))


def write(path, *rows):
  path.write_text("\n".join(map(json.dumps, rows)))
  return path


CHOICES = [
  {"question": "one", "choices": ["a", "bcd", "hello"], "answer": 1},
  {"question": "and two", "choices": ["x", "yy"], "answer": "A", "client": "u"},
  {"question": "q" * 40, "choices": ["no", "yes"], "answer": "b"},
]


def test_the_likeliest_choice_is_chosen(model, tmp_path):
  model, params = model
  asked = questions.read(write(tmp_path / "q.jsonl", *CHOICES), choices=True)
  assert [q.answer for q in asked] == [1, 0, 1]
  loss = losses.language_model(
    lambda trainable, base, *args, **kw: model.apply(base, *args, **kw)
  )
  results = questions.multiple_choice(
    loss, ((), params), BYTES, 32, asked, batch_size=3
  )
  apply = jax.jit(model.apply)
  for row, question in enumerate(asked):
    nats, per_byte = [], []
    for choice in question.choices:
      before = [BYTES.bos, *question.question.encode()]
      after = [*b" ", *choice.encode()]
      # A long question loses its beginning, not the start token.
      kept = min(len(before), 32 - len(after))
      before = [before[0], *before[len(before) - kept + 1 :]]
      tokens = np.full((1, 32), 0)
      tokens[0, : len(before) + len(after)] = before + after
      logits = np.asarray(apply(params, tokens), np.float64)[0]
      chosen = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
      at = np.arange(len(before), len(before) + len(after))
      nats.append(-chosen[at - 1, after].sum())
      per_byte.append(nats[-1] / len(choice.encode()))
    assert results["accuracy"][row] == (np.argmin(nats) == question.answer)
    normalised = np.argmin(per_byte) == question.answer
    assert results["accuracy_normalised"][row] == normalised
  np.testing.assert_allclose(results["chance"], [1 / 3, 1 / 2, 1 / 2])
  ids, metrics = questions.by_client(asked, results)
  assert ids == ["all", "u"]
  expected = np.mean(results["accuracy"][[0, 2]])
  assert metrics["accuracy"].tolist() == [expected, results["accuracy"][1]]


def test_a_choice_may_not_be_cut(model):
  model, params = model
  long = questions.Question("q.jsonl:1", "all", "q", ("a", "b" * 20), 0)
  with pytest.raises(errors.DataError, match="q.jsonl:1: a choice of 21 tok"):
    questions.multiple_choice(None, ((), params), BYTES, 32, [long])


def test_an_answer_is_what_the_model_goes_on_with(model, tmp_path):
  model, params = model
  form = prompt_formats.builtin("llama2")
  asked = ["what", "is it"]
  answers = [
    completion.generate_text(
      model, (params,), BYTES, text, max_new_tokens=6, prompt_format=form
    )
    for text in asked
  ]
  path = write(
    tmp_path / "q.jsonl",
    {"question": asked[0], "answer": answers[0] + " "},
    {"question": asked[1], "answer": answers[1] + "?"},
  )
  found = questions.exact_match(
    model,
    model.apply,
    (params,),
    BYTES,
    questions.read(path, choices=False),
    max_new_tokens=6,
    prompt_format=form,
    batch_size=4,
  )
  assert found["exact_match"].tolist() == [1, 0]
  with pytest.raises(errors.DataError, match=":1: a question of .* is 32"):
    questions.exact_match(
      model,
      model.apply,
      (params,),
      BYTES,
      questions.read(path, choices=False),
      max_new_tokens=30,
    )


@pytest.mark.parametrize("specials", [{}, {"<|im_end|>": 260}])
def test_an_answer_ends_where_its_format_ends_it(model, specials):
  """The model says what the training of the format teaches, and goes on."""
  model, _ = model
  tokenizer = BYTES._replace(specials=specials)
  form = prompt_formats.builtin("chatml")
  model = model._replace(
    config=dataclasses.replace(model.config, max_length=99)
  )
  start = len(completion.prompt_tokens(tokenizer, "a?", form))
  _, after = form.render("a?", "", "yes")
  said, _ = tokenizers.encode_marked(tokenizer, after + "junk" * 9)
  steps = []

  def apply(params, tokens, *, positions, cache):
    jax.debug.callback(lambda p: steps.append(int(p)), positions[0, -1])
    new = params[positions - (start - 1)]
    cache = cache | {"index": cache["index"] + tokens.shape[1]}
    return jax.nn.one_hot(new, 272), cache

  arguments = (jax.numpy.asarray(said),)
  text = completion.generate_text(
    model,
    arguments,
    tokenizer,
    "a?",
    apply=apply,
    prompt_format=form,
    max_new_tokens=30,
  )
  jax.effects_barrier()
  assert text == "yes"
  # Where one token is the end, nothing is generated after it.
  assert max(steps) - start + 2 == (4 if specials else 30)
  asked = [questions.Question("q:1", "all", "a?", (), "yes")]
  found = questions.exact_match(
    model, apply, arguments, tokenizer, asked, max_new_tokens=30,
    prompt_format=form, batch_size=1,
  )  # fmt: skip
  assert found["exact_match"].tolist() == [1]


@pytest.mark.parametrize(
  "change, message",
  [
    ({"question": ""}, ":1: 'question' is empty"),
    ({"question": 3}, ":1: 'question' is int"),
    ({"choices": ["a"]}, ":1: 'choices' is .* at least 2"),
    ({"choices": ["a", ""]}, ":1: 'choices'"),
    ({"answer": 3}, ":1: 'answer' is 3, expected 0 to 2"),
    ({"answer": "D"}, ":1: 'answer' is 'D'"),
    ({"answer": True}, ":1: 'answer' is True"),
    ({"client": 4}, ":1: 'client' is 4"),
  ],
)
def test_bad_questions_are_one_line(tmp_path, change, message):
  path = write(tmp_path / "q.jsonl", CHOICES[0] | change)
  with pytest.raises(errors.DataError, match=message):
    questions.read(path, choices=True)


def test_files_without_questions_are_refused(tmp_path):
  with pytest.raises(errors.DataError, match="no.jsonl: cannot be read"):
    questions.read(tmp_path / "no.jsonl", choices=True)
  (tmp_path / "q.jsonl").write_text("\n")
  with pytest.raises(errors.DataError, match="q.jsonl: got no rows"):
    questions.read(tmp_path / "q.jsonl", choices=True)
