"""BERT, RoBERTa, ViT and CLIP against the Hugging Face implementations.

The fixtures are made by `make_encoder_fixtures.py`; one test here makes them
again where transformers is installed.
"""

import functools

import jax
import jax.numpy as jnp
import make_encoder_fixtures
from make_encoder_fixtures import CASES, EOS, FIXTURES, IMAGES, LENGTH, SIZE
import numpy as np
import pytest
import round_trip

from fedfm import adapters, errors, models, sharding
from fedfm.models import families, huggingface, losses
from fedfm.models.clip import embed_tokens as embed_for_clip
from fedfm.models.encoder import embed_tokens

TOLERANCE = {"rtol": 0, "atol": 1e-4}
TEXT_CASES = [n for n, c in CASES.items() if c.config in ("Bert", "Roberta")]
# CLIP's image tower is nearly ViT.
KINDS = (
  "roberta_classifier",
  pytest.param("vit_classifier", marks=pytest.mark.slow),
  "clip",
)


@functools.cache
def expected(name):
  with np.load(FIXTURES / name / "expected.npz") as values:
    return dict(values)


@functools.cache
def loaded(name):
  return huggingface.load(FIXTURES / name, dtype="float32")


def inputs(name):
  """Arguments of a model's `apply`."""
  case = CASES[name]
  pictures = make_encoder_fixtures.images(case.fields.get("num_channels", 3))
  if case.config == "ViT":
    return (pictures,), {}
  rows = make_encoder_fixtures.texts(case.config)
  if case.config == "CLIP":
    return (rows["tokens"], pictures), {"mask": rows["mask"]}
  extra = {"mask": rows["mask"]}
  if case.fields.get("type_vocab_size", 2) > 1:
    extra["token_types"] = rows["types"]
  return (rows["tokens"],), extra


def loss_of(name):
  """A loss and a batch for it."""
  case, (args, _) = CASES[name], inputs(name)
  batch = {"mask": np.array([1.0, 1.0]), "label": np.array([2, 0])}
  if case.config == "ViT":
    return losses.classification, batch | {"x": args[0]}
  rows = make_encoder_fixtures.texts(case.config)
  batch |= {"tokens": rows["tokens"][-2:], "token_mask": rows["mask"][-2:]}
  if case.config == "CLIP":
    return losses.contrastive, batch | {"x": args[1]}
  return losses.classification, batch


def apply(name, *args, **kw):
  model, params = loaded(name)
  return model.apply(params, *args, **kw)


def outputs(model, *names):
  """Jits `apply` for several outputs: what they share is computed once."""

  @jax.jit
  def run(params, args, kw):
    return {n: model.apply(params, *args, **kw, output=n) for n in names}

  return run


@pytest.mark.parametrize("name", TEXT_CASES)
def test_encoders_match(name):
  model, params = loaded(name)
  want, mask = expected(name), make_encoder_fixtures.texts("Bert")["mask"]
  names = ["hidden", "mean", "cls"]
  names += ["logits"] if "logits" in want else []
  names += ["pooled"] if model.config.pooler else []
  got = outputs(model, *names)(params, *inputs(name))
  if "logits" in want:
    np.testing.assert_allclose(got["logits"], want["logits"], **TOLERANCE)
    return
  hidden = want["last_hidden_state"]
  np.testing.assert_allclose(got["hidden"], hidden, **TOLERANCE)
  np.testing.assert_allclose(got["pooled"], want["pooler_output"], **TOLERANCE)
  np.testing.assert_allclose(got["cls"], hidden[:, 0], **TOLERANCE)
  mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
  np.testing.assert_allclose(got["mean"], mean, **TOLERANCE)


def test_padding_changes_nothing_but_its_own_place():
  """What stands at padding, and how much of it there is, is not seen."""
  model, params = loaded("roberta")
  rows = make_encoder_fixtures.texts("Roberta")
  row, mask = rows["tokens"][-1:], rows["mask"][-1:]
  other = np.where(mask, row, 7)
  run = outputs(model, "mean", "pooled")
  args = {"mask": mask}
  want = run(params, (row,), args)
  real = int(mask.sum())
  short = run(params, (row[:, :real],), {"mask": mask[:, :real]})
  for name in want:
    np.testing.assert_allclose(short[name], want[name], **TOLERANCE)
  model, params = loaded("bert")
  run = outputs(model, "mean", "pooled")
  one, two = (run(params, (x,), args) for x in (row, other))
  for name in one:
    np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.parametrize("name", ["vit", "vit_classifier"])
def test_vit_matches(name):
  model, params = loaded(name)
  theirs = {"hidden": "last_hidden_state", "pooled": "pooler_output"}
  theirs = theirs if name == "vit" else {"logits": "logits"}
  got = outputs(model, *theirs)(params, *inputs(name))
  for key, value in got.items():
    want = expected(name)[theirs[key]]
    np.testing.assert_allclose(value, want, **TOLERANCE)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", ["clip", "clip_legacy"])
def test_clip_matches(name):
  model, params = loaded(name)
  want = expected(name)
  got = outputs(model, "logits", "text", "image")(params, *inputs(name))
  np.testing.assert_allclose(
    got["logits"], want["logits_per_text"], **TOLERANCE
  )
  for tower in ("text", "image"):
    np.testing.assert_allclose(
      unit(got[tower]), want[f"{tower}_embeds"], **TOLERANCE
    )


def test_the_two_rules_for_the_end_of_a_text_differ():
  """Else neither would be tested."""
  one, two = expected("clip"), expected("clip_legacy")
  assert loaded("clip")[0].config.eos_id == EOS - 1
  assert loaded("clip_legacy")[0].config.eos_id is None
  assert np.abs(one["text_embeds"] - two["text_embeds"])[0].max() > 1e-2


def test_contrastive_loss_is_clips_and_padding_is_no_answer():
  logits = expected("clip")["logits_per_text"][:IMAGES]
  loss = losses.contrastive(lambda t, b, tokens, x, mask: t)
  batch = dict.fromkeys(("tokens", "x", "token_mask"))
  there = np.ones(IMAGES, np.float32)
  got, aux = loss(jnp.asarray(logits), None, batch | {"mask": there}, None)
  np.testing.assert_allclose(got, expected("clip")["loss"], rtol=1e-5)
  assert aux["tokens"] == IMAGES
  assert aux["correct"] == (logits.argmax(1) == np.arange(IMAGES)).sum()
  # One more row, of padding, whose scores are the highest.
  padded = np.pad(logits, (0, 1), constant_values=99.0)
  mask = np.pad(there, (0, 1))
  loss_and_grad = jax.jit(
    jax.value_and_grad(
      lambda x, m: loss(x, None, batch | {"mask": m}, None), has_aux=True
    )
  )
  (again, _), gradient = loss_and_grad(jnp.asarray(padded), mask)
  np.testing.assert_allclose(again, got, rtol=1e-6)
  assert np.isfinite(gradient).all()
  np.testing.assert_array_equal(gradient[-1], 0)
  (nothing, _), gradient = loss_and_grad(jnp.asarray(padded), 0 * mask)
  assert nothing == 0 and not gradient.any()


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bitwise_and_sharded_load_equals_unsharded(
  name, tmp_path
):
  round_trip.check_bitwise(FIXTURES / name, tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_unrolled_layers_and_sharded_ones(name):
  mesh = sharding.make_mesh({"clients": 2, "fsdp": 1, "tensor": 4})
  model, params = huggingface.load(
    FIXTURES / name, mesh=mesh, dtype="float32", scan_layers=False
  )
  with jax.set_mesh(mesh):
    got = outputs(model, "logits")(params, *inputs(name))["logits"]
  want = expected(name)
  want = want["logits" if "logits" in want else "logits_per_text"]
  np.testing.assert_allclose(got, want, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_lora_and_of_all_weights(name):
  """LoRA starts at the base's loss; merged it is what it is applied."""
  model, params = loaded(name)
  make_loss, batch = loss_of(name)
  adapter = adapters.lora(model, rank=2, targets=["q_proj", "down_proj"])
  trainable = adapter.init(jax.random.key(0), params)
  loss = make_loss(adapters.loss_apply(adapter))

  @jax.jit
  def run(trainable, params, batch):
    grad = jax.grad(lambda t, p: loss(t, p, batch, None)[0], (0, 1))
    return loss(trainable, params, batch, None)[0], *grad(trainable, params)

  start, of_lora, of_all = run(trainable, params, batch)
  for leaf in jax.tree.leaves((of_lora, of_all)):
    assert np.isfinite(leaf).all()
  for path, pair in of_lora.items():
    assert np.abs(pair["b"]).max() > 0, path
    assert not pair["a"].any()  # B is still zero.
  for path, leaf in adapters.adapter.parameters(of_all).items():
    is_bias_of_keys = path.endswith("k_proj_bias")  # Softmax cancels it.
    assert is_bias_of_keys or np.abs(leaf).max() > 0, path
  moved = jax.tree.map(lambda x: x + 0.1, trainable)
  after = run(moved, params, batch)[0]
  assert abs(after - start) > 1e-3
  merged = adapter.merge(params, moved)
  zero = jax.tree.map(jnp.zeros_like, moved)
  np.testing.assert_allclose(run(zero, merged, batch)[0], after, rtol=2e-5)


def test_embeddings_are_tokens_too():
  """The seam of soft prompts: a text's own embeddings give its own outputs."""
  model, params = loaded("bert")
  rows = make_encoder_fixtures.texts("Bert")
  embedded = embed_tokens(model.config, params, rows["tokens"])
  run = outputs(model, "mean")
  kw = {"mask": rows["mask"]}
  got, want = (run(params, (x,), kw) for x in (embedded, rows["tokens"]))
  np.testing.assert_allclose(got["mean"], want["mean"], **TOLERANCE)
  model, params = loaded("clip")
  rows = make_encoder_fixtures.texts("CLIP")
  embedded = embed_for_clip(model.config, params, rows["tokens"])
  ends = np.argmax(rows["tokens"] == EOS - 1, axis=1)

  @jax.jit
  def run_text(params, x, ends):
    return model.apply(params, x, ends=ends, output="text")

  got = run_text(params, embedded, ends)
  want = expected("clip")["text_embeds"]
  np.testing.assert_allclose(unit(got), want, **TOLERANCE)
  gradient = jax.grad(lambda x: run_text(params, x, ends)[0, 0])(embedded)
  assert np.abs(gradient[0, : LENGTH // 2]).max() > 0
  assert not gradient[1:].any()
  with pytest.raises(errors.ConfigError, match="^ends: texts given as"):
    model.apply(params, embedded, output="text")


@pytest.mark.parametrize(
  ("name", "changed"),
  [
    ("bert", ("classifier", "classifier_bias")),
    ("bert_masked_lm", ("pooler", "classifier")),
    ("roberta_masked_lm", ("classifier_dense", "classifier")),
    ("vit_classifier", ("classifier",)),
  ],
)
def test_a_new_classifier_goes_on_a_folder_with_another_head(
  name, changed, tmp_path
):
  model, params = huggingface.load(
    FIXTURES / name, dtype="float32", num_classes=5
  )
  _, before = loaded(name)
  for path in changed:
    assert path in params
    drawn = params[path]
    assert path.endswith("bias") or 0 < np.abs(drawn).max() < 0.2
  shared = params.keys() & before.keys() - set(changed) - {"classifier_bias"}
  assert "layers" in shared
  for path in shared:
    jax.tree.map(np.testing.assert_array_equal, params[path], before[path])
  args, kw = inputs(name)
  kw.pop("token_types", None)
  shape = jax.eval_shape(lambda p: model.apply(p, *args, **kw), params).shape
  assert shape == (len(args[0]), 5)
  huggingface.save(tmp_path, model, params, like=FIXTURES / name)
  again, same = huggingface.load(tmp_path)
  assert again.config == model.config
  jax.tree.map(np.testing.assert_array_equal, params, same)


def test_kernels_are_quantised_but_not_the_classifier():
  model, params = huggingface.load(
    FIXTURES / "bert_classifier", dtype="float32", quantize="int8"
  )
  assert not hasattr(params["classifier"], "dense")
  assert hasattr(params["layers"]["q_proj"], "dense")
  args, kw = inputs("bert_classifier")
  got = outputs(model, "logits")(params, args, kw)["logits"]
  want = expected("bert_classifier")["logits"]
  assert 0 < np.abs(got - want).max() < 0.1 * np.abs(want).max()


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: apply("bert", np.zeros((1, 99))),
      "^tokens: a sequence of 99, but the model's longest is 13$",
    ),
    (
      lambda: apply(
        "bert", make_encoder_fixtures.texts("Bert")["tokens"], output="logits"
      ),
      "^output: got 'logits', but a model with head 'none'",
    ),
    (
      lambda: apply("vit", make_encoder_fixtures.images(1)),
      rf"^images: got \[{SIZE}, {SIZE}, 1\] each, but the model's are",
    ),
    (
      lambda: apply("clip", images=make_encoder_fixtures.images(3)),
      "^output: got 'logits', expected 'logits' of tokens and images",
    ),
    (
      lambda: huggingface.load(FIXTURES / "clip", num_classes=2),
      "^model.num_classes: unknown override",
    ),
    (
      lambda: models.EncoderConfig(
        vocab_size=9, width=8, num_layers=1, num_heads=3, mlp_width=4
      ),
      "^model.num_heads: 3 does not divide width 8$",
    ),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(errors.ConfigError, match=message):
    call()


def test_fixtures_are_what_transformers_computes(tmp_path):
  pytest.importorskip("transformers", reason="needs the extra hf")
  pytest.importorskip("torch", reason="needs the extra hf")
  make_encoder_fixtures.make_all(tmp_path)
  for name in CASES:
    made, kept = tmp_path / name, FIXTURES / name
    weights = "model.safetensors"
    assert (made / weights).read_bytes() == (kept / weights).read_bytes()
    assert families.read_config(made / "config.json") == families.read_config(
      kept / "config.json"
    )
    with np.load(made / "expected.npz") as values:
      assert values.keys() == expected(name).keys()
      for key, want in expected(name).items():
        np.testing.assert_allclose(values[key], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_what_is_saved(name, tmp_path):
  pytest.importorskip("transformers", reason="needs the extra hf")
  pytest.importorskip("torch", reason="needs the extra hf")
  model, params = huggingface.load(FIXTURES / name)
  huggingface.save(tmp_path, model, params)
  got = make_encoder_fixtures.expected(CASES[name], tmp_path)
  for key, want in expected(name).items():
    np.testing.assert_allclose(got[key], want, atol=1e-5)
