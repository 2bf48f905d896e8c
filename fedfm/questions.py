"""Questions to a model: multiple choice by likelihood, answers by generation.

A file of questions has one JSON object a line: `question`, and `choices` with
the index of the right one, or its letter, as `answer`; or `answer` alone, a
text. `client` may say whose question it is.
"""

from collections.abc import Callable, Sequence
import functools
import json
import os
import pathlib
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from fedfm import completion, errors, sharding
from fedfm.data import instructions, json_rows, layout
from fedfm.data.prompt_formats import PromptFormat
from fedfm.data.tokenizers import Tokenizer
from fedfm.models import generation
from fedfm.models.model import Model
from fedfm.types import LossFn

PyTree = Any


class Question(NamedTuple):
  """A question, and what is right.

  Attributes:
    where: File and line, for messages.
    client: Whose it is; "all" where the file does not say.
    question: The text.
    choices: Texts to choose among; () to answer freely.
    answer: Index of the right choice, or the right text.
  """

  where: str
  client: str
  question: str
  choices: tuple[str, ...]
  answer: int | str


def read(path: str | os.PathLike, choices: bool) -> list[Question]:
  """Reads a file of questions.

  Args:
    path: A file with one JSON object a line.
    choices: Whether the questions have choices.

  Returns:
    The questions, in the file's order.

  Raises:
    DataError: A file that cannot be read or has no rows, or a line that is no
      such question (says which line).
  """
  path = pathlib.Path(path)
  try:
    lines = path.read_bytes().splitlines()
  except OSError as e:
    raise errors.DataError(f"{path}: cannot be read: {e.strerror}") from None
  questions = [
    _question(line, f"{path}:{number}", choices)
    for number, line in enumerate(lines, start=1)
    if line.strip()
  ]
  if not questions:
    raise errors.DataError(f"{path}: got no rows, expected at least 1")
  return questions


def _question(line: bytes, where: str, has_choices: bool) -> Question:
  row = json_rows.loads(line, where)
  texts = ("question",) if has_choices else ("question", "answer")
  row_format = json_rows.RowFormat(client_key="", texts=texts, required=texts)
  _, values = row_format.check(row, where)
  client = row.get("client", json_rows.ALL)
  if not isinstance(client, str) or not client:
    raise errors.DataError(
      f"{where}: 'client' is {client!r}, expected a string"
    )
  if not has_choices:
    return Question(where, client, values[0], (), values[1])
  choices = row.get("choices")
  if (
    not isinstance(choices, list)
    or len(choices) < 2
    or not all(isinstance(x, str) and x.strip() for x in choices)
  ):
    raise errors.DataError(
      f"{where}: 'choices' is {json.dumps(choices)[:80]}, expected at least 2 "
      "texts"
    )
  answer = row.get("answer")
  if isinstance(answer, str) and len(answer) == 1:
    answer = ord(answer.upper()) - ord("A")
  is_index = isinstance(answer, int) and not isinstance(answer, bool)
  if not is_index or not 0 <= answer < len(choices):
    raise errors.DataError(
      f"{where}: 'answer' is {row.get('answer')!r}, expected 0 to "
      f"{len(choices) - 1}, or a letter from A"
    )
  return Question(where, client, values[0], tuple(choices), answer)


def multiple_choice(
  loss: LossFn,
  params: tuple[PyTree, PyTree],
  tokenizer: Tokenizer,
  max_length: int,
  questions: Sequence[Question],
  *,
  prompt_format: PromptFormat | None = None,
  batch_size: int = 16,
) -> dict[str, np.ndarray]:
  """Chooses for every question the choice that is likeliest after it.

  Args:
    loss: As in `evaluation.client_evaluation`.
    params: (trainable, base).
    tokenizer: The model's.
    max_length: Tokens of the model's longest sequence; a longer question loses
      its beginning.
    questions: With choices.
    prompt_format: How a question is written; default as it is, and a space
      before each choice.
    batch_size: Choices that are scored at once.

  Returns:
    {"accuracy": right by log-likelihood, "accuracy_normalised": right by
    log-likelihood a byte of the choice, "chance"}, each float64 [questions].

  Raises:
    DataError: A choice that takes more than half of `max_length`.
  """
  examples, sizes = [], []
  for question in questions:
    prompt = completion.prompt_tokens(
      tokenizer, question.question, prompt_format
    )
    for choice in question.choices:
      response, num_bytes = tokenizer.measure(
        choice if prompt_format else " " + choice
      )
      if len(response) > max_length // 2:
        raise errors.DataError(
          f"{question.where}: a choice of {len(response)} tokens, but the "
          f"model's longest sequence is {max_length}, of which it may take half"
        )
      example = instructions.Example(prompt, response, num_bytes)
      examples.append(instructions.cut(example, max_length))
      sizes.append(len(choice.encode()))
  longest = max(len(x.prompt) + len(x.response) for x in examples)
  length = min(layout.bucket(longest), max_length)
  nats = _score(
    loss,
    params,
    instructions.rows_of(examples, length, tokenizer.pad),
    batch_size,
  )
  per_byte = nats / np.array(sizes)
  right: dict[str, list[float]] = {
    name: [] for name in ("accuracy", "accuracy_normalised", "chance")
  }
  begin = 0
  for question in questions:
    own = slice(begin, begin + len(question.choices))
    begin = own.stop
    right["accuracy"].append(np.argmin(nats[own]) == question.answer)
    normalised = np.argmin(per_byte[own]) == question.answer
    right["accuracy_normalised"].append(normalised)
    right["chance"].append(1 / len(question.choices))
  return {name: np.array(x, np.float64) for name, x in right.items()}


def _score(
  loss: LossFn,
  params: tuple[PyTree, PyTree],
  rows: dict[str, np.ndarray],
  batch_size: int,
) -> np.ndarray:
  """Returns the nats of every row, float64 [rows]."""
  count = len(rows["tokens"])
  run, nats = _run_row_nats(loss), []
  for begin in range(0, count, batch_size):
    index = np.arange(begin, begin + batch_size)
    batch = {k: x[np.minimum(index, count - 1)] for k, x in rows.items()}
    nats.append(jax.device_get(run(*params, batch)))
  return np.concatenate(nats)[:count].astype(np.float64)


@functools.lru_cache(maxsize=4)  # So that one loss compiles once.
def _run_row_nats(loss: LossFn) -> Any:
  """Jitted `(trainable, base, batch) -> nats [batch]`."""
  return jax.jit(functools.partial(_row_nats, loss))


def _row_nats(loss, trainable, base, batch):
  """The summed loss of each row of a batch [rows].

  Any loss gives the sum over rows times their masks, so that its derivative by
  the mask is each row's own: exact, and the batch stays one batch.
  """

  def loss_sum(mask):
    masked = {**batch, "mask": mask}
    return loss(trainable, base, masked, jax.random.key(0))[1]["loss_sum"]

  nats = jax.grad(loss_sum)(jnp.ones(len(batch["tokens"])))
  return sharding.replicated(nats)  # Each process fetches all of them.


def exact_match(
  model: Model,
  apply: Callable[..., Any],
  params: tuple[PyTree, ...],
  tokenizer: Tokenizer,
  questions: Sequence[Question],
  *,
  max_new_tokens: int,
  prompt_format: PromptFormat | None = None,
  batch_size: int = 16,
) -> dict[str, np.ndarray]:
  """Answers every question with the likeliest tokens, and compares.

  Args:
    model: The model, with a key/value cache.
    apply: `model.apply` or `adapter.apply`.
    params: Its leading arguments.
    tokenizer: The model's.
    questions: Whose answers are texts.
    max_new_tokens: Most tokens of an answer; what ends a text (see
      `completion.ending`) ends it earlier.
    prompt_format: How a question is written; default as it is.
    batch_size: Questions that are answered at once.

  Returns:
    {"exact_match": float64 [questions]}: whether the texts are the same but for
    spaces around them.

  Raises:
    ConfigError: Fewer than 1 new token.
    DataError: A question that leaves no room for them.
  """
  longest = model.config.max_length - max_new_tokens
  prompts = []
  for question in questions:
    tokens = completion.prompt_tokens(
      tokenizer, question.question, prompt_format
    )
    if len(tokens) > longest:
      raise errors.DataError(
        f"{question.where}: a question of {len(tokens)} tokens and "
        f"{max_new_tokens} new ones, but the model's longest sequence is "
        f"{model.config.max_length}"
      )
    prompts.append(tokens)
  length = min(layout.bucket(max(map(len, prompts))), longest)
  lengths = np.array([len(x) for x in prompts])
  padded = np.stack([np.pad(x, (0, length - len(x))) for x in prompts])
  # Of like length together: a batch starts from its shortest prompt.
  order = np.argsort(lengths, kind="stable")
  right = np.zeros(len(questions))
  end = completion.ending(tokenizer, prompt_format)
  for begin in range(0, len(order), batch_size):
    own = np.arange(begin, begin + batch_size)
    own = order[np.minimum(own, len(order) - 1)]
    generated = generation.generate(
      apply,
      cast("Callable[..., PyTree]", model.init_cache),
      params,
      padded[own],
      prompt_lengths=lengths[own],
      max_new_tokens=max_new_tokens,
      eos=end.ids,
    )
    for row, tokens, count in zip(own, *jax.device_get(generated)):
      text = end.cut(tokenizer.decode(end.without(tokens[:count]))).strip()
      right[row] = text == str(questions[row].answer).strip()
  return {"exact_match": right}


def own(
  ask: Callable[[PyTree, Sequence[Question]], dict[str, np.ndarray]],
  questions: Sequence[Question],
  model_of: Callable[[str], PyTree],
) -> dict[str, np.ndarray]:
  """Asks every client's questions to its own model.

  Args:
    ask: `ask(trainable, questions) -> {metric: [questions]}`.
    questions: The questions of all.
    model_of: Client id -> trainable.

  Returns:
    {metric: [questions]}, in the order of all.

  Examples:
    >>> ask = lambda own, asked: {"right": np.array([own == q.answer
    ...                                              for q in asked])}
    >>> asked = [Question("", c, "?", (), a) for c, a in ("ux", "vy", "ux")]
    >>> own(ask, asked, {"u": "x", "v": "x"}.get)["right"].tolist()
    [1.0, 0.0, 1.0]
  """
  rows: dict[str, list[int]] = {}
  for row, question in enumerate(questions):
    rows.setdefault(question.client, []).append(row)
  results: dict[str, np.ndarray] = {}
  for client_id, mine in rows.items():
    found = ask(model_of(client_id), [questions[row] for row in mine])
    for name, values in found.items():
      results.setdefault(name, np.zeros(len(questions)))[mine] = values
  return results


def by_client(
  questions: Sequence[Question], results: dict[str, np.ndarray]
) -> tuple[list[str], dict[str, np.ndarray]]:
  """Averages over each client's questions.

  Args:
    questions: The questions.
    results: {metric: [questions]}.

  Returns:
    The clients, in order of first appearance, and {metric: [clients]}.
  """
  ids = list(dict.fromkeys(q.client for q in questions))
  rows = np.array([ids.index(q.client) for q in questions])
  count = np.bincount(rows)
  return ids, {
    name: np.bincount(rows, weights=x) / count for name, x in results.items()
  }
