"""Which tokens start, end and pad a text: what a model's folder says of it."""

from collections.abc import Callable, Iterator
import json
import pathlib
from typing import Any, NamedTuple

from fedfm import errors

CONFIG = "tokenizer_config.json"
_MAP = "special_tokens_map.json"
_MODEL = "config.json"
_GENERATION = "generation_config.json"
_NAMES = ("bos", "eos", "pad")


class SpecialTokens(NamedTuple):
  """Ids of the special tokens, and all of them by their text.

  Attributes:
    bos: Starts a text.
    eos: Ends it.
    pad: Fills up.
    by_text: All by their text.
    stops: What may end a text besides: an answer in a chat, say.
  """

  bos: int
  eos: int
  pad: int
  by_text: dict[str, int]
  stops: tuple[int, ...] = ()


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; {} where there is no such file.

  Args:
    path: The file.

  Returns:
    Its fields.

  Raises:
    DataError: It cannot be read, or holds something else.
  """
  if not path.exists():
    return {}
  try:
    content = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError) as e:
    raise errors.DataError(f"{path}: cannot be read as JSON: {e}") from None
  if not isinstance(content, dict):
    raise errors.DataError(
      f"{path}: got a JSON {type(content).__name__}, expected an object"
    )
  return content


def read(
  directory: pathlib.Path,
  id_of: Callable[[str], int | None],
  defaults: tuple[int | None, int | None] = (None, None),
) -> SpecialTokens:
  """Finds the special tokens of a tokenizer.

  By their texts in tokenizer_config.json, else in special_tokens_map.json, else
  by their ids in config.json. Where only one of start and end is known it is
  both: a document starts where the last ended. What else ends a text is in
  generation_config.json, or config.json has several ends.

  Args:
    directory: The model's folder.
    id_of: Text of a token -> its id, or None.
    defaults: Start and end where the folder does not name them.

  Returns:
    The tokens; pad is the end where there is none.

  Raises:
    DataError: No start and no end, or a token that the tokenizer lacks.
  """
  texts = texts_of(directory)
  config = read_json(directory / _MODEL)
  found: dict[str, int | None] = {}
  for name in _NAMES:
    text = texts.get(name)
    found[name] = next(iter(_ids(config, name)), None)
    if text is not None:
      found[name] = id_of(text)
      if found[name] is None:
        raise errors.DataError(
          f"{directory}: the {name}_token {text!r} is not in the vocabulary"
        )
  bos, eos, pad = (found[name] for name in _NAMES)
  bos = defaults[0] if bos is None else bos
  eos = defaults[1] if eos is None else eos
  bos = eos if bos is None else bos
  eos = bos if eos is None else eos
  if bos is None or eos is None:
    raise errors.DataError(
      f"{directory / _MODEL}: has neither bos_token_id nor eos_token_id"
    )
  by_text = dict(added(directory))
  by_text |= {
    text: i for text in texts.values() if (i := id_of(text)) is not None
  }
  ends = _ids(read_json(directory / _GENERATION), "eos") + _ids(config, "eos")
  stops = tuple(dict.fromkeys(i for i in ends if i != eos))
  return SpecialTokens(bos, eos, eos if pad is None else pad, by_text, stops)


def texts_of(directory: pathlib.Path) -> dict[str, str]:
  """Returns the texts of "bos", "eos" and "pad", those that the folder has."""
  texts = {}
  for file in (_MAP, CONFIG):  # The second wins.
    content = read_json(directory / file)
    for name in _NAMES:
      value = content.get(f"{name}_token")
      if isinstance(value, dict):  # Of an AddedToken.
        value = value.get("content")
      if isinstance(value, str):
        texts[name] = value
  return texts


def added(directory: pathlib.Path) -> Iterator[tuple[str, int]]:
  """Yields (text, id) of the special tokens that tokenizer_config.json adds."""
  tokens = read_json(directory / CONFIG).get("added_tokens_decoder")
  for index, token in (tokens if isinstance(tokens, dict) else {}).items():
    is_token = isinstance(token, dict) and isinstance(token.get("content"), str)
    if is_token and str(index).isdigit() and token.get("special", True):
      yield token["content"], int(index)


def _ids(config: dict[str, Any], name: str) -> list[int]:
  """Reads the ids of a token in config.json: a number, or several."""
  value = config.get(f"{name}_token_id")
  values = value if isinstance(value, list) else [value]
  return [i for i in values if type(i) is int and i >= 0]
