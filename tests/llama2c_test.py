"""llama2.c files: against a Hugging Face folder, and a published story."""

import os
import pathlib
import struct

import jax
import numpy as np
import pytest

from fedfm import completion, data, errors, model_folders
from fedfm.models import generation, huggingface, llama2c
from fedfm.models.decoder import DecoderConfig, decoder

ROOT = pathlib.Path(__file__).parent.parent
SHARED = pathlib.Path(
  os.environ.get("FEDFM_SHARED_DATA", ROOT.parent / "shared" / "data")
)
STORIES = SHARED / "stories260K"
SIZES = {
  "vocab_size": 300,
  "width": 16,
  "num_layers": 2,
  "num_heads": 4,
  "num_kv_heads": 2,
  "mlp_width": 12,
  "max_length": 32,
}


def interleaved(kernel, head_dim):
  """[in, out] of halves -> llama2.c's [out, in] of pairs."""
  halves = kernel.T.reshape(-1, 2, head_dim // 2, kernel.shape[0])
  return halves.swapaxes(1, 2).reshape(kernel.shape[::-1])


def write(path, tied=True):
  """Writes a random model; returns its parameters as `huggingface` has them."""
  model = decoder(DecoderConfig(**SIZES, tie_embeddings=tied))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), model.shapes
  )
  layers, c = params["layers"], model.config
  parts = [params["embed"], layers["attention_norm"]]
  for name in ("q_proj", "k_proj"):
    parts += [interleaved(x, c.head_dim) for x in layers[name]]
  parts += [x.T for name in ("v_proj", "o_proj") for x in layers[name]]
  parts.append(layers["mlp_norm"])
  for name in ("gate_proj", "down_proj", "up_proj"):
    parts += [x.T for x in layers[name]]
  angles = np.zeros((2, c.max_length, c.head_dim // 2))  # Not read.
  parts += [params["final_norm"], angles] + (
    [] if tied else [params["lm_head"].T]
  )
  sizes = (c.width, c.mlp_width, c.num_layers, c.num_heads, c.num_kv_heads)
  vocab = c.vocab_size if tied else -c.vocab_size
  header = struct.pack("<7i", *sizes, vocab, c.max_length)
  path.write_bytes(header + b"".join(x.astype("<f4").tobytes() for x in parts))
  return params


def write_vocabulary(path, merges=(b" t", b"he", b" the", b"th")):
  pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
  pieces += [f"<0x{i:02X}>".encode() for i in range(256)]
  pieces += [*merges, *(bytes([c]) for c in b" abcdehit")]
  pieces += [b"?"] * (SIZES["vocab_size"] - len(pieces))
  entries = [
    struct.pack("<fi", -float(i), len(piece)) + piece
    for i, piece in enumerate(pieces)
  ]
  path.write_bytes(struct.pack("<i", 8) + b"".join(entries))


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_queries_and_keys_change_places(tmp_path, tied):
  want = write(tmp_path / "model.bin", tied)
  write_vocabulary(tmp_path / "tok300.bin")
  model, got = llama2c.load(tmp_path)
  assert model.config.tie_embeddings == tied
  jax.tree.map(np.testing.assert_array_equal, got, want)
  huggingface.save(tmp_path / "folder", model, got)
  _, again = huggingface.load(tmp_path / "folder")
  jax.tree.map(np.testing.assert_array_equal, again, want)


def test_pairs_and_halves_give_the_same_scores():
  """What llama2.c computes: neighbours turned, before the product."""
  rng = np.random.default_rng(1)
  q, k, x = rng.normal(size=(6, 8)), rng.normal(size=(6, 8)), np.eye(6)

  def turned(rows, position):  # [pairs] as complex numbers
    pairs = rows[..., ::2] + 1j * rows[..., 1::2]
    return pairs * np.exp(1j * position * 100.0 ** -(np.arange(4) / 4))

  scores = (turned(x @ q, 3) @ turned(x @ k, 5).conj().T).real
  halves = [
    m.reshape(6, 4, 2).swapaxes(1, 2).reshape(6, 8) for m in (q, k)
  ]  # The inverse of `interleaved`, as `llama2c` reads it.
  for pairs, half in zip((q, k), halves):
    np.testing.assert_array_equal(interleaved(half, 8).T, pairs)
  first, second = (m[:, :4] + 1j * m[:, 4:] for m in halves)
  angle = 100.0 ** -(np.arange(4) / 4)
  got = (first * np.exp(3j * angle)) @ (second * np.exp(5j * angle)).conj().T
  np.testing.assert_allclose(got.real, scores, atol=1e-12)


@pytest.mark.parametrize(
  "damage,words",
  [
    (lambda raw: raw[:-4], "not what its header says"),
    (lambda raw: raw + b"\0\0\0\0", "not what its header says"),
    (lambda raw: raw[:20], "truncated"),
    (lambda raw: b"\x80\x02" + raw[2:], "header says|version 0"),
    (lambda raw: struct.pack("<7i", *[-1] * 7) + raw[28:], "version 0"),
    (lambda raw: struct.pack("<7i", *[0] * 7) + raw[28:], "version 0"),
  ],
)
def test_damaged_files_are_refused(tmp_path, damage, words):
  path = tmp_path / "model.bin"
  write(path)
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(errors.CheckpointError, match=words) as e:
    llama2c.load(path)
  assert "\n" not in str(e.value)
  with pytest.raises(errors.CheckpointError, match="found no model") as e:
    model_folders.load(tmp_path)
  assert "\n" not in str(e.value)


def test_a_nan_is_refused(tmp_path):
  path = tmp_path / "model.bin"
  write(path)
  raw = bytearray(path.read_bytes())
  raw[28:32] = struct.pack("<f", float("nan"))
  path.write_bytes(raw)
  with pytest.raises(errors.CheckpointError, match="token_embedding holds NaN"):
    llama2c.load(path)


def test_vocabulary_joins_the_best_first_and_is_lossless(tmp_path):
  path = tmp_path / "tok300.bin"
  write_vocabulary(path)
  tokenizer = data.load_tokenizer(tmp_path)
  assert tokenizer.vocab_size == 300
  # " t" is better than "th", then "he" than none; and " the" joins both.
  assert tokenizer.encode("the").tolist() == [261]
  assert tokenizer.encode("").tolist() == []
  for text in ("the cat", "a  b", "h\u00e9 \u2603\n", " the"):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = [tokenizer.bos, *tokenizer.encode(text.encode()), tokenizer.eos]
    assert tokenizer.decode(ids) == text
  for content in (b"", path.read_bytes()[:-1], path.read_bytes() + b"x"):
    path.write_bytes(content)
    with pytest.raises(errors.DataError, match="no vocabulary"):
      data.load_tokenizer(tmp_path)


def test_other_tokenizers_are_refused_in_one_line(tmp_path):
  assert data.load_tokenizer(tmp_path).name == "bytes"
  (tmp_path / "tokenizer.model").write_bytes(b"")
  with pytest.raises(
    errors.DataError, match="tokenizer.model: (needs|no model)"
  ) as e:
    data.load_tokenizer(tmp_path)
  assert "\n" not in str(e.value)
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(errors.DataError, match="tokenizer.json") as e:
    data.load_tokenizer(tmp_path)
  assert "\n" not in str(e.value)
  for name in ("tok1.bin", "tok2.bin"):
    (tmp_path / name).write_bytes(b"")
  (tmp_path / "tokenizer.json").unlink()
  (tmp_path / "tokenizer.model").unlink()
  with pytest.raises(errors.DataError, match="2 vocabularies"):
    data.load_tokenizer(tmp_path)


def test_the_story_is_reproduced_token_for_token():
  if not STORIES.exists():
    pytest.skip(f"no {STORIES}; FEDFM_SHARED_DATA says where data lies")
  page = (STORIES / "stories260K.md").read_text()
  story = page.split("-t 0.0\n")[1].split("\n```")[0]
  model, params = llama2c.load(STORIES)
  tokenizer = data.load_tokenizer(STORIES)
  got = generation.generate(
    model.apply,
    model.init_cache,
    (params,),
    np.array([[tokenizer.bos]]),
    max_new_tokens=256,  # What `run` makes unless it is told otherwise.
  )
  tokens = np.asarray(got.tokens[0])
  assert tokenizer.decode(tokens) == story
  assert tokens.tolist() == tokenizer.encode(story).tolist()
  # And as `generate.py` has it, from the first words.
  prompt = story[:16]
  added = completion.generate_text(
    model, (params,), tokenizer, prompt, max_new_tokens=50
  )
  assert added and story.startswith(prompt + added)
