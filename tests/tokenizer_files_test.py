"""Tokenizers in a model's folder: of which files, and what they count."""

import json
import os
import pathlib

import numpy as np
import pytest
from tiny import write_model

from fedfm import completion, data, errors
from fedfm.data import sentence_pieces, tokenizers
from fedfm.data import text as text_lib
from fedfm.models import huggingface

SHARED = pathlib.Path(
  os.environ.get("FEDFM_SHARED_DATA")
  or pathlib.Path(__file__).parents[2] / "shared" / "data"
)
# With characters of one to four bytes, and spaces in odd places.
ODD = ["", " a  b ", "h\u00e9llo \u2603\u2603\n\tx", "\u65e5\U0001f600 end"]
TEXTS = ["the cat sat on the mat", "a dog ran to the hill in rain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A model's folder with a small trained tokenizer."""
  tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")
  folder = tmp_path_factory.mktemp("model")
  write_model(folder)
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=270,
    special_tokens=["<s>", "</s>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )
  tokenizer.train_from_iterator(TEXTS, trainer)
  tokenizer.save(str(folder / "tokenizer.json"))
  return folder


def with_ids(folder, tmp_path, **ids):
  """Copies the folder's tokenizer beside a config with these ids."""
  config = json.loads((folder / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(config | ids))
  text = (folder / "tokenizer.json").read_text()
  (tmp_path / "tokenizer.json").write_text(text)
  return tmp_path


def test_text_goes_both_ways(folder, tmp_path):
  tokenizer = data.load_tokenizer(
    with_ids(folder, tmp_path, bos_token_id=0, eos_token_id=[1, 0])
  )
  assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 1)
  assert tokenizer.vocab_size == 270
  for text in (*TEXTS, "h\u00e9 \u2603\n"):
    ids = tokenizer.encode(text)
    assert len(ids) < len(text.encode()) + 2 and ids.min() >= 2
    # This tokenizer, as GPT-2's, marks words by the space before them.
    assert tokenizer.decode([0, *ids, 1]).strip() == text.strip()
  model, params = huggingface.load(folder)
  added = completion.generate_text(
    model, (params,), tokenizer, "the cat", max_new_tokens=5
  )
  assert isinstance(added, str)


def test_a_tokenizer_without_ids_is_refused(folder, tmp_path):
  with pytest.raises(errors.DataError, match="neither bos_token_id") as e:
    data.load_tokenizer(with_ids(folder, tmp_path))
  assert "\n" not in str(e.value)


def test_saving_brings_the_tokenizer_along(folder, tmp_path):
  like = tmp_path / "like"
  like.mkdir()
  with_ids(folder, like, bos_token_id=0, eos_token_id=1)
  model, params = huggingface.load(folder)
  huggingface.save(tmp_path / "out", model, params, like=like)
  assert data.load_tokenizer(tmp_path / "out").eos == 1
  config = json.loads((tmp_path / "out" / "config.json").read_text())
  assert config["pad_token_id"] is None


def test_special_tokens_come_from_the_tokenizers_own_files(folder, tmp_path):
  with_ids(folder, tmp_path, bos_token_id=0, eos_token_id=0)
  (tmp_path / "special_tokens_map.json").write_text(
    json.dumps({"bos_token": "</s>", "eos_token": "</s>"})
  )
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({"bos_token": {"content": "<s>"}})
  )
  tokenizer = data.load_tokenizer(tmp_path)
  assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 1)
  assert dict(tokenizer.specials) == {"<s>": 0, "</s>": 1}
  marked, _ = tokenizers.encode_marked(tokenizer, "<s>the</s>")
  assert (marked[0], marked[-1]) == (0, 1)
  (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<start>"}')
  with pytest.raises(errors.DataError, match="bos_token '<start>' is not in"):
    data.load_tokenizer(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text("[")
  with pytest.raises(errors.DataError, match="tokenizer_config.json: cannot"):
    data.load_tokenizer(tmp_path)


def check_bytes(tokenizer):
  """Every token has its bytes, all of the text's in sum; ids as `encode`."""
  for document in (*ODD, *TEXTS):
    ids, num_bytes = tokenizer.measure(document)
    np.testing.assert_array_equal(ids, tokenizer.encode(document))
    assert num_bytes.shape == ids.shape and (num_bytes >= 0).all()
    assert num_bytes.sum() == len(document.encode())
  clients = data.from_arrays({"a": {"text": [*ODD, *TEXTS]}})
  rows = text_lib.tokenize(clients, tokenizer, sequence_length=8).read("a")
  total = sum(len(document.encode()) for document in (*ODD, *TEXTS))
  assert rows["num_bytes"].sum() == total
  with pytest.raises(errors.DataError, match="surrogate"):
    tokenizer.encode("\ud800")


def test_bytes_are_counted_for_any_tokenizer(folder, tmp_path):
  check_bytes(data.byte_tokenizer())
  check_bytes(
    data.load_tokenizer(with_ids(folder, tmp_path, eos_token_id=[1, 0]))
  )


def shared(name):
  if not (SHARED / name).exists():
    pytest.skip(f"no {SHARED / name}")
  return SHARED / name


def test_gpt2s_own_files_are_read(tmp_path):
  pytest.importorskip("tokenizers", reason="needs the extra hf")
  folder = shared("gpt2_bpe")
  tokenizer = data.load_tokenizer(folder)
  # https://github.com/openai/gpt-2 encodes so.
  assert tokenizer.encode("Hello world").tolist() == [15496, 995]
  assert (tokenizer.bos, tokenizer.eos) == (50256, 50256)
  assert tokenizer.vocab_size == 50257
  for document in ODD:
    assert tokenizer.decode(tokenizer.encode(document)) == document
  check_bytes(tokenizer)
  (tmp_path / "vocab.json").write_text("{}")
  with pytest.raises(errors.DataError, match="expected merges.txt beside it"):
    data.load_tokenizer(tmp_path)
  (tmp_path / "merges.txt").write_text("")
  kind = {"tokenizer_class": "Qwen2Tokenizer"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind))
  with pytest.raises(errors.DataError, match="Qwen2Tokenizer, expected token"):
    data.load_tokenizer(tmp_path)


def test_sentencepiece_agrees_with_llama2cs_vocabulary(tmp_path):
  pytest.importorskip("sentencepiece", reason="needs the extra hf")
  folder = shared("stories260K")
  ours = data.load_tokenizer(folder)  # tok512.bin.
  (tmp_path / "tokenizer.model").write_bytes(
    (folder / "tok512.model").read_bytes()
  )
  tokenizer = data.load_tokenizer(tmp_path)
  assert tokenizer.name == "sentencepiece:tokenizer.model:512"
  assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1, 2, 2)
  for document in TEXTS:
    ids = tokenizer.encode(document)
    np.testing.assert_array_equal(ids, ours.encode(document))
    assert tokenizer.decode([1, *ids, 2]) == document
  check_bytes(tokenizer)
  check_bytes(ours)
  added = {"512": {"content": "<|im_end|>", "special": True}}
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({"added_tokens_decoder": added, "eos_token": "<|im_end|>"})
  )
  more = sentence_pieces.sentencepiece_tokenizer(tmp_path / "tokenizer.model")
  assert (more.vocab_size, more.bos, more.eos) == (513, 1, 512)
  assert more.decode([512, *more.encode("the")]) == "the"
  (tmp_path / "tokenizer.model").write_bytes(b"no")
  with pytest.raises(errors.DataError, match="no model of SentencePiece") as e:
    data.load_tokenizer(tmp_path)
  assert "\n" not in str(e.value)


def test_a_large_vocabulary_without_a_tokenizer_is_refused(tmp_path):
  (tmp_path / "config.json").write_text('{"vocab_size": 32000}')
  with pytest.raises(errors.DataError, match="vocabulary of 32000 is not of"):
    data.load_tokenizer(tmp_path)
  (tmp_path / "config.json").write_text('{"vocab_size": 384}')
  assert data.load_tokenizer(tmp_path).name == "bytes"
