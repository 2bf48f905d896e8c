r"""Pre-trains the small byte language model that fedfm ships.

Centralized, with the model and loss that the federated runs use, on the public
sources of the installed dependencies. The standard library, which the
quickstart federates, is never read for training, and files that share lines
with it are left out. In two stages, half Python and half other code and prose
first, then Python at a lower rate:

  python scripts/pretrain.py --output=DIR
  python scripts/pretrain.py --init=DIR --output=fedfm/models/byte_llama \
    --python_fraction=1 --steps=600 --learning_rate=0.006 \
    --adam_rate=0.0018 --long_fraction=1 --seed=1

The learning rate is constant after its warm-up: the weights are those of the
stable phase of a warmup-stable-decay schedule (arXiv 2404.06395), from which
training goes on best; runs that start here bring their own decay. Give
`--decay_fraction=0.2` for weights to use as they are.

Two virtual devices, one a core, are faster on two cores than one:

  XLA_FLAGS=--xla_force_host_platform_device_count=2 \
    python scripts/pretrain.py --output=DIR
"""

import math
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

import command_line
from fedfm import errors, experiment, sharding, trees
from fedfm.data import dependencies, tokenizers
from fedfm.models import DecoderConfig, decoder, huggingface, losses
import output_folder

_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
_INIT = flags.DEFINE_string("init", "", "Folder to start from, if any.")
_PYTHON = flags.DEFINE_float("python_fraction", 0.5, "Python, of all bytes.")
_STEPS = flags.DEFINE_integer("steps", 2000, "Optimizer steps.")
_LONG = flags.DEFINE_float(
  "long_fraction", 0.25, "Share of steps, at the end, at the full length."
)
_DECAY = flags.DEFINE_float(
  "decay_fraction", 0.0, "Share of steps, at the end, over which rates fall."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of weights and data order.")
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 8192, "Tokens a step.")
_LENGTH = flags.DEFINE_integer("length", 512, "Longest sequence, in tokens.")
_MUON_RATE = flags.DEFINE_float("learning_rate", 0.01, "Peak rate of Muon.")
_ADAM_RATE = flags.DEFINE_float("adam_rate", 0.003, "Peak rate of Adam.")
_MAX_BYTES = flags.DEFINE_integer(
  "max_bytes", 2_000_000, "Most bytes of one distribution and kind of text."
)
_VALIDATION_BYTES = 100_000
_PRINT_EVERY = 20  # Steps.
_SAVE_EVERY = 200  # Steps.

CONFIG = DecoderConfig(
  vocab_size=272,
  width=192,
  num_layers=4,
  num_heads=3,
  num_kv_heads=1,
  mlp_width=576,
  max_length=512,
  scan_layers=False,
)


def corpus(num_bytes: int, seed: int) -> tuple[list[bytes], list[bytes]]:
  """Reads the documents, `--python_fraction` of them Python, in seeded order.

  Args:
    num_bytes: Bytes that training reads; more are not needed.
    seed: Seed of the order, and so of the choice.

  Returns:
    Training documents, and validation documents (1% of the bytes or more).
  """
  protected = dependencies.standard_library_texts()
  rng = np.random.default_rng(seed)
  chosen = []
  for kind, suffixes, share in (
    ("Python", dependencies.PYTHON, _PYTHON.value),
    ("other text", dependencies.OTHER_TEXT, 1 - _PYTHON.value),
  ):
    if not share:
      continue
    found = dependencies.source_files(suffixes=suffixes)
    files, left_out = dependencies.without_copies(found, protected)
    files = [files[i] for i in rng.permutation(len(files))]
    files = dependencies.without_near_duplicates(files)
    sizes, documents = {}, []
    for name, _, text in files:
      raw = text.encode()
      room = sizes.get(name, 0) + len(raw) <= _MAX_BYTES.value
      if room and sum(sizes.values()) < 1.02 * share * num_bytes:
        sizes[name] = sizes.get(name, 0) + len(raw)
        documents.append(raw)
    command_line.show(
      f"{kind}: {sum(sizes.values()):,} bytes, {len(documents):,} of "
      f"{len(found):,} files, {len(sizes)} distributions; left out "
      f"{len(left_out)} that share lines with the standard library"
    )
    chosen += documents
  chosen = [chosen[i] for i in rng.permutation(len(chosen))]
  bytes_before = np.cumsum([len(document) for document in chosen])
  enough = max(_VALIDATION_BYTES, num_bytes // 100)
  num_validation = int(np.searchsorted(bytes_before, enough)) + 1
  return chosen[num_validation:], chosen[:num_validation]


def rows(documents: list[bytes], length: int) -> np.ndarray:
  """Cuts documents, each after a `bos`, into rows that predict a byte once.

  Args:
    documents: Texts, in the order to read them.
    length: Tokens in a row; rows overlap by one token.

  Returns:
    [rows, length] int32; the tail that fills no row is dropped.
  """
  tokenizer = tokenizers.byte_tokenizer()
  stream = np.concatenate(
    [np.concatenate([[tokenizer.bos], tokenizer.encode(d)]) for d in documents]
  )
  count = (len(stream) - 1) // (length - 1)
  starts = np.arange(count)[:, None] * (length - 1)
  return stream[starts + np.arange(length)].astype(np.int32)


def optimizer(steps: int, decay_steps: int) -> optax.GradientTransformation:
  """Muon on the kernels, Adam on the rest; warm-up, stable, linear decay."""

  def rate(peak):
    warmup = optax.schedules.linear_schedule(0.0, peak, steps // 20)
    decay = optax.schedules.linear_schedule(
      1.0, 0.0, decay_steps, steps - decay_steps
    )
    return lambda count: warmup(count) * decay(count)

  matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.contrib.muon(
      rate(_MUON_RATE.value),
      adam_learning_rate=rate(_ADAM_RATE.value),
      adam_b2=0.99,
      weight_decay=0.01,
      consistent_rms=0.2,
      muon_weight_dimension_numbers=lambda params: jax.tree.map(
        lambda x: matrix if x.ndim == 3 else None, params
      ),
    ),
  )


def batches(documents: list[bytes], steps: int, long_steps: int, seed: int):
  """Yields [batch, length] tokens a step: short rows first, then long ones."""
  position = 0
  for length, count in (
    (_LENGTH.value // 2, steps - long_steps),
    (_LENGTH.value, long_steps),
  ):
    # Skipping ahead lets the phases share fewer rows.
    data = rows(documents, length)
    data = data[position * _BATCH_TOKENS.value // length :]
    data = np.random.default_rng(seed + 1).permutation(data)
    size = _BATCH_TOKENS.value // length
    for i in range(count):
      yield data[np.arange(i * size, (i + 1) * size) % len(data)]
    position = count


def check_flags():
  for name, flag in (
    ("long_fraction", _LONG),
    ("decay_fraction", _DECAY),
    ("python_fraction", _PYTHON),
  ):
    if not 0 <= flag.value <= 1:
      raise errors.ConfigError(f"--{name}: got {flag.value}, expected 0 to 1")
  for name, flag in (("steps", _STEPS), ("length", _LENGTH)):
    if flag.value < 2:
      raise errors.ConfigError(f"--{name}: got {flag.value}, expected above 1")
  if _BATCH_TOKENS.value < _LENGTH.value:
    raise errors.ConfigError(
      f"--batch_tokens: got {_BATCH_TOKENS.value}, expected at least the "
      f"length, {_LENGTH.value}"
    )


def main():
  check_flags()
  output_folder.check("--output", _OUTPUT.value)
  steps = _STEPS.value
  train, validation = corpus(steps * _BATCH_TOKENS.value, _SEED.value)
  model = decoder(CONFIG)
  params = model.init(jax.random.key(_SEED.value))
  if _INIT.value:
    loaded, params = huggingface.load(_INIT.value, dtype="float32")
    if loaded.shapes != model.shapes:
      raise errors.ConfigError(f"--init: {_INIT.value} has other sizes")
  command_line.show(f"{trees.num_elements(params):,} parameters")
  tx = optimizer(steps, int(steps * _DECAY.value))
  loss_fn = losses.language_model(lambda t, _, tokens: model.apply(t, tokens))
  tokenizer = tokenizers.byte_tokenizer()
  mesh = sharding.make_mesh({"clients": 1, "fsdp": -1})
  jax.set_mesh(mesh)
  params, opt_state = jax.device_put(
    (params, tx.init(params)), jax.NamedSharding(mesh, jax.P())
  )

  def batch_of(tokens):
    return jax.device_put(
      {
        "tokens": tokens,
        "loss_mask": (tokens != tokenizer.bos).astype(np.float32),
        "mask": np.ones(len(tokens), np.float32),
      },
      jax.NamedSharding(mesh, jax.P("fsdp")),
    )

  @jax.jit(donate_argnums=(0, 1))
  def step(params, opt_state, batch):
    grads, aux = jax.grad(loss_fn, has_aux=True)(params, None, batch, None)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, aux

  evaluate = jax.jit(lambda p, b: loss_fn(p, None, b, None)[1])

  def bits_per_byte(params, tokens):
    total, count = 0.0, 0.0
    for i in range(0, len(tokens) - 15, 16):
      aux = evaluate(params, batch_of(tokens[i : i + 16]))
      total += float(aux["loss_sum"])
      count += float(aux["tokens"])
    return total / count / math.log(2)

  held_out = rows(validation, _LENGTH.value)
  held_out = held_out[:: max(1, len(held_out) // 128)]
  start, mean = time.time(), None
  long_steps = int(steps * _LONG.value)
  for done, tokens in enumerate(
    batches(train, steps, long_steps, _SEED.value), start=1
  ):
    params, opt_state, aux = step(params, opt_state, batch_of(tokens))
    bits = float(aux["loss_sum"] / aux["tokens"]) / math.log(2)
    mean = bits if mean is None else 0.95 * mean + 0.05 * bits
    if done % _PRINT_EVERY == 0:
      spent = time.time() - start
      command_line.show(
        f"step {done}/{steps}  bits/byte {mean:.3f}  "
        f"{done * _BATCH_TOKENS.value / spent:,.0f} tokens/s  "
        f"{spent / done * (steps - done) / 60:.0f} min left",
      )
    if done % _SAVE_EVERY == 0 or done == steps:
      command_line.show(
        f"  held out: {bits_per_byte(params, held_out):.4f} bits/byte"
      )
      huggingface.save(
        _OUTPUT.value, model, trees.cast(jax.device_get(params), jnp.bfloat16)
      )
  report_unseen()


def report_unseen():
  """Evaluates what was written on clients of the standard library."""
  built = experiment.build(
    {
      "model": {"path": _OUTPUT.value},
      "data": {"sequence_length": _LENGTH.value},
      "eval": {"max_examples": 0},
    }
  )
  metrics = built.evaluate(built.trainable)  # LoRA starts as the base itself.
  for population in ("unseen", "seen"):
    bits = metrics[f"eval/{population}/bits_per_byte"]
    command_line.show(
      f"{population} clients: {bits:.4f} bits/byte, mean over clients"
    )


if __name__ == "__main__":
  command_line.run(main)
