r"""Pre-trains the small byte language model that fedfm ships.

Centralized, with the model and loss that the federated runs use, on the public
Python sources of the installed dependencies; the standard library, which the
quickstart federates, is never read for training, and files that share lines
with it are left out.

  python scripts/pretrain.py --output=fedfm/models/byte_llama

Took 93 minutes on two CPU cores that did other work besides. Two virtual
devices, one a core, are faster there than one:

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
from fedfm import experiment, sharding, trees
from fedfm.data import dependencies, tokenizers
from fedfm.models import DecoderConfig, decoder, huggingface, losses

_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.", required=True)
_STEPS = flags.DEFINE_integer("steps", 2000, "Optimizer steps.")
_LONG = flags.DEFINE_float(
  "long_fraction", 0.25, "Share of steps, at the end, at the full length."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of weights and data order.")
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 8192, "Tokens a step.")
_LENGTH = flags.DEFINE_integer("length", 512, "Longest sequence, in tokens.")
_MUON_RATE = flags.DEFINE_float("learning_rate", 0.01, "Peak rate of Muon.")
_ADAM_RATE = flags.DEFINE_float("adam_rate", 0.003, "Peak rate of Adam.")
_MAX_BYTES = flags.DEFINE_integer(
  "max_bytes", 4_000_000, "Most bytes of any one distribution."
)

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


def corpus(seed: int) -> tuple[list[bytes], list[bytes], dict[str, int]]:
  """Reads the training and validation documents, in seeded order.

  Args:
    seed: Seed of the order.

  Returns:
    Training documents, validation documents (1% of files), bytes by
    distribution.
  """
  files, left_out = dependencies.without_copies(
    dependencies.source_files(), dependencies.standard_library_texts()
  )
  print(f"left out {len(left_out)} files that share lines with the stdlib")
  order = np.random.default_rng(seed).permutation(len(files))
  documents, sizes = [], {}
  for index in order:
    name, _, text = files[index]
    raw = text.encode()
    if sizes.get(name, 0) + len(raw) <= _MAX_BYTES.value:
      sizes[name] = sizes.get(name, 0) + len(raw)
      documents.append(raw)
  num_validation = max(1, len(documents) // 100)
  return documents[num_validation:], documents[:num_validation], sizes


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


def optimizer(steps: int) -> optax.GradientTransformation:
  """Muon on the kernels, Adam on the rest; warm-up, then linear decay to 0."""

  def rate(peak):
    warmup = optax.schedules.linear_schedule(0.0, peak, steps // 20)
    decay = optax.schedules.linear_schedule(1.0, 0.0, steps)
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


def main():
  train, validation, sizes = corpus(_SEED.value)
  print(f"{sum(map(len, train)):,} bytes of {len(sizes)} distributions")
  model = decoder(CONFIG)
  params = model.init(jax.random.key(_SEED.value))
  print(f"{trees.num_elements(params):,} parameters")
  tx = optimizer(_STEPS.value)
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

  long_steps = int(_STEPS.value * _LONG.value)
  phases = [
    (_LENGTH.value // 2, _STEPS.value - long_steps),
    (_LENGTH.value, long_steps),
  ]
  held_out = rows(validation, _LENGTH.value)[:128]
  done, start, mean, position = 0, time.time(), None, 0
  for length, steps in phases:
    # Skipping ahead lets the phases share fewer rows.
    data = rows(train, length)
    data = data[position * _BATCH_TOKENS.value // length :]
    data = np.random.default_rng(_SEED.value + 1).permutation(data)
    batch_size = _BATCH_TOKENS.value // length
    for i in range(steps):
      index = np.arange(i * batch_size, (i + 1) * batch_size) % len(data)
      params, opt_state, aux = step(params, opt_state, batch_of(data[index]))
      bits = float(aux["loss_sum"] / aux["tokens"]) / math.log(2)
      mean = bits if mean is None else 0.9 * mean + 0.1 * bits
      done += 1
      if done % 20 == 0:
        spent = time.time() - start
        left = spent / done * (_STEPS.value - done)
        print(
          f"step {done}/{_STEPS.value}  bits/byte {mean:.3f}  "
          f"{done * _BATCH_TOKENS.value / spent:,.0f} tokens/s  "
          f"{left / 60:.0f} min left",
          flush=True,
        )
      if done % 200 == 0 or done == _STEPS.value:
        print(f"  held out: {bits_per_byte(params, held_out):.4f} bits/byte")
        huggingface.save(
          _OUTPUT.value, model, trees.cast(jax.device_get(params), jnp.bfloat16)
        )
    position = steps
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
    print(f"{population} clients: {bits:.4f} bits/byte, mean over clients")


if __name__ == "__main__":
  command_line.run(main)
