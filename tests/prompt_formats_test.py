"""Prompt formats: as data, and as the chat templates of models' folders."""

import json
import sys

import pytest

from fedfm import completion, errors
from fedfm.data import prompt_formats, special_tokens, tokenizers

CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content']"
  " + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}"
  "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Llama 2's: a start token, no generation prompt, an end token.
LLAMA2 = (
  "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
  "{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}"
  "{{ ' ' + m.content | trim + ' ' + eos_token }}{% else %}"
  "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}"
)


def load(folder, template, **fields):
  fields |= {"chat_template": template}
  (folder / "tokenizer_config.json").write_text(json.dumps(fields))
  return prompt_formats.load("auto", folder)


@pytest.mark.parametrize("name", prompt_formats.FORMATS)
def test_builtin_formats_hold_what_they_are_given(name):
  form = prompt_formats.builtin(name)
  for context in ("", "of {prompt}"):
    before, after = form.render("the {context}", context, "say {prompt}")
    assert before.count("the {context}") == 1 and after.startswith("say {p")
    assert context in before and "{turn}" not in before + after
    assert after == "say {prompt}" + form.end


def test_names_are_checked(tmp_path):
  with pytest.raises(errors.ConfigError, match="'alpacca'.*'alpaca'"):
    prompt_formats.load("alpacca", tmp_path)
  with pytest.raises(errors.ConfigError, match="'a.jinja' is not a file"):
    prompt_formats.load("a.jinja", tmp_path)
  assert prompt_formats.load("auto", tmp_path).name == "alpaca_short"


def test_a_chat_template_is_rendered_as_its_format(tmp_path):
  pytest.importorskip("jinja2", reason="needs the extra hf")
  built_in = prompt_formats.builtin("chatml")
  named = [{"name": "other", "template": ""}, {"name": "default"}]
  named[1]["template"] = CHATML
  (tmp_path / "own.jinja").write_text(CHATML)
  for form in (
    load(tmp_path, CHATML),
    load(tmp_path, named),
    prompt_formats.load(str(tmp_path / "own.jinja"), tmp_path),
  ):
    assert form.render("a", "b", "c") == built_in.render("a", "b", "c")
    assert (form.end, form.starts) == ("<|im_end|>\n", False)
  llama = load(tmp_path, LLAMA2, bos_token="<s>", eos_token={"content": "</s>"})
  assert (llama.end, llama.starts) == (" </s>", True)
  assert llama.render("a", "", "c") == ("<s>[INST] a [/INST]", " c </s>")
  (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
  with pytest.raises(errors.DataError, match="chat_template.jinja: "):
    prompt_formats.load("auto", tmp_path)


@pytest.mark.parametrize(
  "template, message",
  [
    ("{% for %}", "chat_template: malformed: "),
    ("{{ raise_exception('no\nway') }}", "chat_template: no way"),
    ("{{ messages[0].content.nothing() }}", "chat_template: "),
    ("{{ ''.__class__.__mro__ }}", "chat_template: .*unsafe"),
    ("hello", "leaves the response out"),
    ("{{ messages | length }}", "does not begin with its prompt"),
    (3, "chat_template is int, expected text"),
  ],
)
def test_bad_templates_are_one_line(tmp_path, template, message):
  pytest.importorskip("jinja2", reason="needs the extra hf")
  with pytest.raises(errors.DataError, match=message) as e:
    load(tmp_path, template)
  assert "\n" not in str(e.value)


def test_without_jinja_a_template_is_refused(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "jinja2", None)
  with pytest.raises(errors.DataError, match="needs the package jinja2"):
    load(tmp_path, CHATML)


def test_several_tokens_end_a_text(tmp_path):
  texts = {"<s>": 1, "</s>": 2}
  (tmp_path / "config.json").write_text('{"eos_token_id": [2, 5, true, "x"]}')
  found = special_tokens.read(tmp_path, texts.get, (1, None))
  assert (found.bos, found.eos, found.stops) == (1, 2, (5,))
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
  (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
  found = special_tokens.read(tmp_path, texts.get)
  assert (found.eos, found.stops) == (1, (7, 2, 5))
  tokenizer = tokenizers.byte_tokenizer()._replace(stops=found.stops)
  assert completion.ending(tokenizer).ids == (257, 7, 2, 5)


def test_special_tokens_in_a_template_are_tokens():
  tokenizer = tokenizers.byte_tokenizer()._replace(
    specials={"<|a|>": 260, "<|a|>b": 261}
  )
  ids, num_bytes = tokenizers.encode_marked(tokenizer, "x<|a|>b<|a|>c")
  assert ids.tolist() == [120, 261, 260, 99]
  assert num_bytes.tolist() == [1, 0, 0, 1]
