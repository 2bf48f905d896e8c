"""Tokens and rows: nothing lost, nothing doubled, nothing out of range."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from fedfm import errors
from fedfm.data import source, text, tokenizers

BYTES = tokenizers.byte_tokenizer()
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def _rows(documents, sequence_length, **kwargs):
  clients = source.from_arrays({"a": {"text": documents}})
  return text.tokenize(clients, BYTES, sequence_length, **kwargs)


@given(st.binary(max_size=300))
@settings(max_examples=50, deadline=None)
def test_byte_tokenizer_is_lossless_on_any_bytes(data):
  ids = BYTES.encode(data)
  assert ids.dtype == np.int32
  assert bytes(ids.tolist()) == data
  assert BYTES.decode(ids) == data.decode(errors="replace")


@given(TEXTS)
@settings(max_examples=50, deadline=None)
def test_byte_tokenizer_decodes_what_it_encodes(document):
  assert BYTES.decode(BYTES.encode(document)) == document


def test_byte_tokenizer_specials_are_distinct_and_dropped():
  specials = [BYTES.bos, BYTES.eos, BYTES.pad]
  assert len({*specials}) == 3
  assert all(256 <= s < BYTES.vocab_size for s in specials)
  assert BYTES.vocab_size % 16 == 0
  assert BYTES.decode([*specials, 72, 271, 105]) == "Hi"
  with pytest.raises(errors.DataError, match="surrogate at character 1"):
    BYTES.encode("a\ud800")


@given(
  documents=st.lists(TEXTS, min_size=1, max_size=5),
  sequence_length=st.integers(2, 40),
)
@settings(max_examples=150, deadline=None)
def test_rows_hold_every_token_as_a_target_exactly_once(
  documents, sequence_length
):
  rows = _rows(documents, sequence_length)
  tokens, mask = (rows.read("a")[k] for k in ("tokens", "loss_mask"))
  assert tokens.dtype == np.int32 and mask.dtype == np.float32
  assert tokens.shape == mask.shape == (rows.size("a"), sequence_length)
  # A row starts with the token the one before it ended with.
  np.testing.assert_array_equal(tokens[1:, 0], tokens[:-1, -1])
  assert not mask[:, 0].any() and set(np.unique(mask)) <= {0.0, 1.0}
  # Without the overlaps the rows are the stream, then only padding.
  stream = np.concatenate([tokens[0], tokens[1:, 1:].reshape(-1)]).tolist()
  targets = np.concatenate([mask[0], mask[1:, 1:].reshape(-1)])
  expected, predicted = [], []
  for document in documents:
    data = list(document.encode())
    expected += [BYTES.bos, *data]
    predicted += [0, *[1] * len(data)]
  length = len(expected)
  assert stream[:length] == expected
  assert set(stream[length:]) <= {BYTES.pad}
  assert len(stream) - length < sequence_length
  assert targets[:length].tolist() == predicted
  assert not targets[length:].any()
  # The loss counts bytes only, and the text can be put together again.
  assert mask.sum() == sum(len(d.encode()) for d in documents)
  assert BYTES.decode(stream) == "".join(documents)


def test_bytes_and_strings_give_the_same_rows():
  a = _rows(["héllo", "x"], 4).read("a")
  b = _rows(["héllo".encode(), b"x"], 4).read("a")
  np.testing.assert_array_equal(a["tokens"], b["tokens"])


def _counting(num_clients, num_bytes):
  """Returns a source of text and the list of the clients it was asked for."""
  calls = []

  def read(client_id):
    calls.append(client_id)
    return {"text": np.array(["x" * num_bytes], object)}

  ids = [f"c{i}" for i in range(num_clients)]
  return source.ClientSource(ids, lambda c: 1, read), calls


def test_rows_are_made_once_and_only_when_asked_for():
  clients, calls = _counting(3, 10)
  rows = text.tokenize(clients, BYTES, 4)
  assert not calls
  assert rows.size("c1") == 4 and rows.size("c1") == 4
  rows.read("c1")["tokens"] = None  # A reader's own dictionary.
  assert rows.read("c1")["tokens"].shape == (4, 4)
  assert calls == ["c1"]
  with pytest.raises(ValueError, match="read-only"):
    rows.read("c1")["tokens"][0, 0] = 0


def test_the_cache_is_bounded_and_drops_the_oldest(monkeypatch):
  clients, calls = _counting(4, 1000)
  monkeypatch.setattr(text, "_CACHE_BYTES", 2 * 8 * 1200)
  rows = text.tokenize(clients, BYTES, 11)
  for client_id in ("c0", "c1", "c0", "c2"):
    rows.read(client_id)
  assert calls == ["c0", "c1", "c2"]
  rows.read("c0")
  assert calls == ["c0", "c1", "c2"]
  rows.read("c1")
  assert calls == ["c0", "c1", "c2", "c1"]
  assert rows.size("c2") == 100 and len(calls) == 4  # Sizes are kept.


@pytest.mark.parametrize(
  "kwargs, parts",
  [
    ({"sequence_length": 1}, ["sequence_length", "1", "2"]),
    ({"sequence_length": 8.0}, ["sequence_length", "8.0"]),
  ],
)
def test_bad_arguments_are_named(kwargs, parts):
  with pytest.raises(errors.ConfigError) as error:
    _rows(["a"], **kwargs)
  assert all(part in str(error.value) for part in parts)


def test_fields_that_are_not_text_are_named():
  clients = source.from_arrays({"a": {"txt": [1, 2]}})
  with pytest.raises(errors.DataError, match="'a'.*did you mean 'txt'"):
    text.tokenize(clients, BYTES, 4).read("a")
  with pytest.raises(errors.DataError, match="'a'.*'txt' is int32"):
    text.tokenize(clients, BYTES, 4, text_key="txt").size("a")
  surrogate = source.from_arrays({"a": {"text": ["\ud800"]}})
  with pytest.raises(errors.DataError, match="'a'.*surrogate"):
    text.tokenize(surrogate, BYTES, 4).read("a")


def _from_tokens(tokens, vocab_size=10, sequence_length=4, **fields):
  clients = source.from_arrays({"b": {"ids": tokens} | fields})
  return text.from_tokens(clients, sequence_length, "ids", 9, vocab_size)


def test_rows_of_tokens_are_padded_and_all_but_the_first_predicted():
  rows = _from_tokens([[1, 2, 3], [4, 5, 6]]).read("b")
  assert rows["tokens"].tolist() == [[1, 2, 3, 9], [4, 5, 6, 9]]
  assert rows["loss_mask"].tolist() == [[0, 1, 1, 0]] * 2


@pytest.mark.parametrize(
  "tokens, message",
  [
    ([[1, -3]], "'b': field 'ids' holds token -3, expected 0 to 9"),
    ([[1, 10]], "'b': field 'ids' holds token 10, expected 0 to 9"),
    ([[1.0]], "'b': field 'ids' is float64, expected integers"),
    ([[1] * 5], r"'b': field 'ids': example 0 has shape \[5\], .* = 4 tokens"),
    ([1], r"'b': field 'ids': example 0 has shape \[\]"),
  ],
)
def test_tokens_that_do_not_fit_are_named(tokens, message):
  with pytest.raises(errors.DataError, match=message):
    _from_tokens(tokens).read("b")
