"""Prompts of encoders, vision transformers and CLIP, after the first token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedfm import adapters, errors, models
from fedfm.models import losses

SIZES = {"width": 8, "num_layers": 2, "num_heads": 2, "mlp_width": 16}
TOWER = models.StackConfig(**SIZES)
PIXELS = {"image_size": 8, "patch_size": 4, "num_channels": 1}
PAD = 1
# These programs run once: what LLVM could save is less than what it costs.
fast_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": "0"}
)
rng = np.random.default_rng(0)
IMAGES = rng.normal(size=(4, 8, 8, 1)).astype(np.float32)
# A start, words, an end, padding.
TEXTS = np.array(
  [[2, 5, 6, 3, 1], [2, 7, 3, 1, 1], [2, 8, 9, 10, 3], [2, 4, 3, 1, 1]]
)
MASK = TEXTS != PAD
WORDS = np.array([11, 4, 12])
WITH_WORDS = np.concatenate(
  [TEXTS[:, :1], np.tile(WORDS, (4, 1)), TEXTS[:, 1:]], axis=1
)
# A token type of its own to some words, the first type to the prompt.
TYPES = np.array([[0, 0, 1, 1, 1]] * 4)
TYPES_WITH_WORDS = np.array([[0, 0, 0, 0, 0, 1, 1, 1]] * 4)


def encoder(head="dense", **changes):
  options = {"num_classes": 3} if head in ("dense", "pooled") else {}
  config = models.EncoderConfig(
    vocab_size=13, max_length=9, pad_id=PAD, position_offset=PAD + 1,
    head=head, **options, **SIZES, **changes,
  )  # fmt: skip
  return drawn(models.encoder(config))


def clip(**changes):
  config = models.CLIPConfig(
    text=TOWER, image=TOWER, projection_width=4, vocab_size=13, eos_id=3,
    max_length=9, **PIXELS, **changes,
  )  # fmt: skip
  return drawn(models.clip(config))


def vit():
  return drawn(
    models.vit(models.VisionConfig(num_classes=3, **SIZES, **PIXELS))
  )


def drawn(model):
  params = model.init(jax.random.key(0))
  draws = np.random.default_rng(1)
  return model, jax.tree.map(
    lambda x: x + 0.3 * draws.normal(size=x.shape).astype(x.dtype), params
  )


def prompt_of(table):
  return {"prompt": jnp.asarray(table[WORDS], jnp.float32)}


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("head", "outputs"),
  [
    ("dense", ("logits", "cls", "mean", "pooled", "hidden")),
    ("masked_lm", ("logits",)),
  ],
)
def test_a_prompt_of_real_words_is_those_words(head, outputs):
  model, params = encoder(head)
  adapter = adapters.prompt_tuning(model, num_tokens=3)
  places = [0, 4, 5, 6, 7]  # All but the words.

  @fast_jit
  def run(params, trainable):
    prompted = functools.partial(adapter.apply, params, trainable, TEXTS)
    plain = functools.partial(model.apply, params, WITH_WORDS)
    return {
      output: (
        prompted(mask=MASK, token_types=TYPES, output=output),
        plain(
          mask=WITH_WORDS != PAD, token_types=TYPES_WITH_WORDS, output=output
        ),
      )
      for output in outputs
    }

  for output, (got, want) in run(params, prompt_of(params["embed"])).items():
    a_token = head == "masked_lm" or output == "hidden"
    close(got, want[:, places] if a_token else want)


@pytest.mark.slow
def test_a_context_of_real_words_is_those_words_in_clip():
  model, params = clip()
  adapter = adapters.prompt_tuning(model, num_tokens=3)

  @fast_jit
  def run(params, trainable):
    # The end is given where texts are embeddings.
    embedded = params["text"]["embed"][TEXTS]
    ends = np.argmax(TEXTS == 3, axis=1)
    prompted = functools.partial(adapter.apply, params, trainable, mask=MASK)
    return (
      prompted(TEXTS, IMAGES),
      prompted(embedded, IMAGES, ends=ends),
      model.apply(params, WITH_WORDS, IMAGES, mask=WITH_WORDS != PAD),
    )

  *got, want = run(params, prompt_of(params["text"]["embed"]))
  for logits in got:
    close(logits, want)


@pytest.mark.slow
def test_prompts_of_images_have_no_positions():
  model, params = vit()
  adapter = adapters.prompt_tuning(model, num_tokens=2)
  trainable = adapter.init(jax.random.key(1), params)
  # Their order is not seen, but they are.
  turned = {"prompt": trainable["prompt"][::-1]}
  got = adapter.apply(params, trainable, IMAGES)
  close(adapter.apply(params, turned, IMAGES), got)
  assert np.abs(got - model.apply(params, IMAGES)).max() > 1e-4
  hidden = adapter.apply(params, trainable, IMAGES, output="hidden")
  assert hidden.shape == (4, 5, 8)


def test_maple_couples_the_images_prompt_to_the_texts():
  model, params = clip()
  adapter = adapters.maple(model, num_tokens=3)
  trainable = adapter.init(jax.random.key(1), params)
  text = adapters.prompt_tuning(model, num_tokens=3)

  @fast_jit
  def run(params, trainable):
    of_images = trainable["prompt"] @ trainable["coupling"]
    by_hand = {**params, "image": {**params["image"], "prompt": of_images}}
    mine = {"prompt": trainable["prompt"]}
    return (
      adapter.apply(params, trainable, TEXTS, IMAGES, mask=MASK),
      text.apply(by_hand, mine, TEXTS, IMAGES, mask=MASK),
      text.apply(params, mine, TEXTS, IMAGES, mask=MASK),
    )

  got, want, without = run(params, trainable)
  close(got, want)
  assert np.abs(got - without).max() > 1e-4


BATCH = {
  "tokens": TEXTS,
  "token_mask": MASK.astype(np.float32),
  "mask": np.ones(4, np.float32),
}


def classify(model, params):
  adapter = adapters.prompt_tuning(model, num_tokens=3)
  adapter = adapters.with_parameters(model, adapter, ("classifier",))
  batch = BATCH | {"label": np.array([0, 1, 2, 0])}
  return adapter, losses.classification(adapters.loss_apply(adapter)), batch


def retrieve(kind):
  def make(model, params):
    adapter = getattr(adapters, kind)(model, num_tokens=3)
    batch = BATCH | {"x": IMAGES}
    return adapter, losses.contrastive(adapters.loss_apply(adapter)), batch

  return make


@pytest.mark.parametrize(
  ("build", "make"),
  [
    (encoder, classify),
    (clip, retrieve("prompt_tuning")),
    (clip, retrieve("maple")),
  ],
)
def test_prompts_train_and_the_base_does_not(build, make):
  model, params = build()
  adapter, loss, batch = make(model, params)
  trainable = adapter.init(jax.random.key(1), params)
  before = jax.tree.map(np.array, params)
  tx = optax.adam(0.05)

  @fast_jit
  def step(trainable, opt, params):
    grad_fn = jax.value_and_grad(loss, has_aux=True)
    (value, _), grads = grad_fn(trainable, params, batch, None)
    updates, opt = tx.update(grads, opt)
    return optax.apply_updates(trainable, updates), opt, value, grads

  opt, values = tx.init(trainable), []
  for i in range(30):
    trainable, opt, value, grads = step(trainable, opt, params)
    values.append(float(value))
    if i == 0:  # Every weight of the trainable is reached, and no other.
      shapes = jax.tree.map(jnp.shape, adapter.init(jax.random.key(1), params))
      assert jax.tree.map(jnp.shape, grads) == shapes
      assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
  assert values[-1] < 0.8 * values[0]
  jax.tree.map(np.testing.assert_array_equal, params, before)


def test_prompts_out_of_range_are_refused():
  for (model, _), allowed in (
    (encoder(), "1 to 8"),
    (clip(), "1 to 8"),
    (vit(), "at least 1"),
  ):
    for count in (0, -1, 9):
      if count == 9 and allowed == "at least 1":
        continue
      with pytest.raises(
        errors.ConfigError,
        match=f"num_tokens: got {count}, expected {allowed}",
      ):
        adapters.prompt_tuning(model, num_tokens=count)
  model, params = encoder()
  adapter = adapters.prompt_tuning(model, num_tokens=5)
  trainable = adapter.init(jax.random.key(0), params)
  with pytest.raises(errors.ConfigError, match="a sequence of 10, but the"):
    adapter.apply(params, trainable, TEXTS)
  with pytest.raises(errors.ConfigError, match="'maple' needs CLIP"):
    adapters.maple(model)
  with pytest.raises(errors.ConfigError, match="num_tokens: got 0"):
    adapters.maple(clip()[0], num_tokens=0)


def test_prompts_after_the_first_token_are_not_pefts(tmp_path):
  model, params = encoder()
  adapter = adapters.prompt_tuning(model, num_tokens=3)
  with pytest.raises(errors.CheckpointError, match="before the first token"):
    adapters.peft.save(
      tmp_path, model, adapter, adapter.init(jax.random.key(0), params)
    )
