"""How a prompt and its response are written, as data.

Some formats by name, and the chat template that a model's folder holds: a Jinja
text, rendered in a sandbox as transformers does (it comes with the weights, and
may loop and print, but reach nothing).
"""

from collections.abc import Callable
import datetime
import importlib
import json
import pathlib
import re
from typing import Any, NamedTuple

from fedfm import errors
from fedfm.data import special_tokens

_SUFFIX = ".jinja"
_FILE = "chat_template.jinja"
_PROBE = "qzq"  # A text to find again in what a template makes of it.


class PromptFormat(NamedTuple):
  """What stands before a response, and the response with what ends it.

  Attributes:
    name: Written to messages.
    render: `render(prompt, context, response) -> (before, response)`: texts, of
      which the second is trained on. `context` may be "".
    end: What closes the second text; where "", the tokenizer's `eos` is put
      after it.
    starts: Whether the first begins with a start token of its own.
  """

  name: str
  render: Callable[[str, str, str], tuple[str, str]]
  end: str = ""
  starts: bool = False


class _Text(NamedTuple):
  """A format as data: {prompt} and {context} are filled in."""

  without_context: str
  with_context: str
  end: str = ""
  starts: bool = False


_ALPACA = (
  "Below is an instruction that describes a task{pair}. Write a response that "
  "appropriately completes the request.\n\n### Instruction:\n{prompt}\n\n"
)
_TURN = "{prompt}\n\n{context}"
_CHATML = (
  "<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n",
  "<|im_end|>\n",
)
_LLAMA3 = (
  "<|start_header_id|>user<|end_header_id|>\n\n{turn}<|eot_id|>"
  "<|start_header_id|>assistant<|end_header_id|>\n\n",
  "<|eot_id|>",
)
_GEMMA = (
  "<start_of_turn>user\n{turn}<end_of_turn>\n<start_of_turn>model\n",
  "<end_of_turn>\n",
)


def _chat(text: str, end: str = "") -> _Text:
  """A format of turns: the context is part of the user's."""
  return _Text(
    text.replace("{turn}", "{prompt}"), text.replace("{turn}", _TURN), end
  )


FORMATS = {
  "plain": _Text("{prompt}\n", "{prompt}\n{context}\n"),
  # Stanford Alpaca's, and the short one of alpaca-lora.
  "alpaca": _Text(
    _ALPACA.replace("{pair}", "") + "### Response:\n",
    _ALPACA.replace(
      "{pair}", ", paired with an input that provides further context"
    )
    + "### Input:\n{context}\n\n### Response:\n",
  ),
  "alpaca_short": _Text(
    "### Instruction:\n{prompt}\n\n### Response:\n",
    "### Instruction:\n{prompt}\n\n### Input:\n{context}\n\n### Response:\n",
  ),
  "chatml": _chat(*_CHATML),
  "llama2": _chat("[INST] {turn} [/INST]"),
  "llama3": _chat(*_LLAMA3),
  "gemma": _chat(*_GEMMA),
}


def builtin(name: str) -> PromptFormat:
  """Returns a format by its name.

  Args:
    name: One of `FORMATS`.

  Returns:
    A `PromptFormat`.

  Raises:
    ConfigError: An unknown name.

  Examples:
    >>> builtin("alpaca_short").render("Add.", "1 + 2", "3")[0]
    '### Instruction:\\nAdd.\\n\\n### Input:\\n1 + 2\\n\\n### Response:\\n'
  """
  if name not in FORMATS:
    raise errors.ConfigError(
      f"data.template: got {name!r}{errors.nearest(name, FORMATS)}"
    )
  text = FORMATS[name]

  def render(prompt: str, context: str, response: str) -> tuple[str, str]:
    values = {"{prompt}": prompt, "{context}": context}
    before = re.sub(
      r"\{prompt\}|\{context\}",
      lambda match: values[match[0]],
      text.with_context if context else text.without_context,
    )
    return before, response + text.end

  return PromptFormat(name, render, end=text.end, starts=text.starts)


def load(name: str, directory: pathlib.Path) -> PromptFormat:
  """Finds the format that a config names.

  Args:
    name: One of `FORMATS`, a file that ends in ".jinja", or "auto": the chat
      template of the model's folder, "alpaca_short" where it has none.
    directory: The model's folder.

  Returns:
    A `PromptFormat`.

  Raises:
    ConfigError: An unknown name, or a file that is not there.
    DataError: A template that is malformed, or the package jinja2 is missing.
  """
  if name.endswith(_SUFFIX):
    path = pathlib.Path(name)
    if not path.is_file():
      raise errors.ConfigError(f"data.template: {name!r} is not a file")
    return _of_template(_read(path), name, directory)
  if name != "auto":
    return builtin(name)
  found = chat_template(directory)
  if found is None:
    return builtin("alpaca_short")
  return _of_template(*found, directory)


def chat_template(directory: pathlib.Path) -> tuple[str, str] | None:
  """Returns the folder's chat template and where it is, or None.

  Args:
    directory: The model's folder.

  Returns:
    (Jinja text, name of its source).

  Raises:
    DataError: It is not text.
  """
  if (directory / _FILE).is_file():
    return _read(directory / _FILE), str(directory / _FILE)
  path = directory / special_tokens.CONFIG
  template = special_tokens.read_json(path).get("chat_template")
  if isinstance(template, list):  # Several, by name.
    named = [t for t in template if isinstance(t, dict)]
    template = next(
      (t.get("template") for t in named if t.get("name") == "default"), None
    )
  if template is None:
    return None
  if not isinstance(template, str):
    raise errors.DataError(
      f"{path}: chat_template is {type(template).__name__}, expected text"
    )
  return template, f"{path}: chat_template"


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as e:
    raise errors.DataError(f"{path}: cannot be read: {e}") from None


def _of_template(
  source: str, where: str, directory: pathlib.Path
) -> PromptFormat:
  """Compiles a chat template, and tries it: mistakes are found at once."""
  try:
    jinja2: Any = importlib.import_module("jinja2")
    sandbox: Any = importlib.import_module("jinja2.sandbox")
  except ImportError:
    raise errors.DataError(
      f"{where}: needs the package jinja2: pip install 'fedfm[hf]', or choose "
      f"data.template of {', '.join(FORMATS)}"
    ) from None
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=["jinja2.ext.loopcontrols"],
  )

  def refuse(message):
    raise jinja2.exceptions.TemplateError(message)

  environment.filters["tojson"] = lambda value, **_: json.dumps(
    value, ensure_ascii=False
  )
  texts = special_tokens.texts_of(directory)
  fixed = {f"{name}_token": texts.get(name, "") for name in ("bos", "eos")}
  environment.globals |= {
    **fixed,
    "raise_exception": refuse,
    # A date that runs do not depend on.
    "strftime_now": datetime.datetime(2024, 7, 26).strftime,
  }
  try:
    template = environment.from_string(source)
  except jinja2.exceptions.TemplateError as e:
    raise errors.DataError(f"{where}: malformed: {_one_line(e)}") from None

  def write(*turns: tuple[str, str], answer: bool) -> str:
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
      return template.render(messages=messages, add_generation_prompt=answer)
    except Exception as e:  # A template may do anything wrong.
      raise errors.DataError(f"{where}: {_one_line(e)}") from None

  def render(prompt: str, context: str, response: str) -> tuple[str, str]:
    user = "user", f"{prompt}\n\n{context}" if context else prompt
    before = write(user, answer=True)
    whole = write(user, ("assistant", response), answer=False)
    if not before or not whole.startswith(before):
      raise errors.DataError(
        f"{where}: a conversation does not begin with its prompt, so that the "
        "response cannot be told apart"
      )
    return before, whole.removeprefix(before)

  before, after = render(_PROBE, "", _PROBE)
  if _PROBE not in after:
    raise errors.DataError(f"{where}: leaves the response out")
  end = after.rpartition(_PROBE)[2]
  bos = fixed["bos_token"]
  return PromptFormat(
    where,
    render,
    end=end if end.strip() else "",
    starts=bool(bos) and before.startswith(bos),
  )


def _one_line(error: Exception) -> str:
  return " ".join((str(error) or type(error).__name__).split())
