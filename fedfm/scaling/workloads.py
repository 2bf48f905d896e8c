"""The work that benchmarks time: models, data and FLOPs, by name.

The first two are those that other federated frameworks are timed on; the others
are for accelerators. Data is random; what is counted is the same as for real.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import numpy as np
import optax

from fedfm import adapters, data, errors, model_flops, models, types

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
  """A model, a loss and clients to train it on.

  Attributes:
    name: Its name in tables.
    model: The model.
    adapter: What clients train; None where `model`'s own parameters are.
    loss: `loss(trainable, base, batch, key) -> (scalar, aux)`.
    client_optimizer: Of every local step.
    unit: What is counted: "tokens" or "examples".
    units_per_example: Units in a row of a batch.
    flops_per_unit: Model FLOPs of a training step, a unit: no recomputation,
      causal attention counted over the past only.
    batch_size: Rows a local step.
    local_steps: Steps a client takes.
    num_clients: Clients of a round.
    make_example: `make_example(rng, n) -> {field: array [n, ...]}`.
    dtype: Compute dtype.
  """

  name: str
  model: models.Model
  adapter: adapters.Adapter | None
  loss: types.LossFn
  client_optimizer: optax.GradientTransformation
  unit: str
  units_per_example: int
  flops_per_unit: float
  batch_size: int
  local_steps: int
  num_clients: int
  make_example: Callable[[np.random.Generator, int], dict[str, np.ndarray]]
  dtype: str

  def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
    """Draws (trainable, base); traceable."""
    params = self.model.init(key)
    if self.adapter is None:
      return params, None
    return self.adapter.init(jax.random.fold_in(key, 1), params), params

  def source(self, num_clients: int, seed: int = 0) -> data.ClientSource:
    """Draws clients of `local_steps` full batches each."""
    rng = np.random.default_rng(seed)
    rows = self.batch_size * self.local_steps
    return data.from_arrays(
      {f"client{i}": self.make_example(rng, rows) for i in range(num_clients)}
    )


def decoder_workload(
  name: str,
  config: models.DecoderConfig,
  *,
  batch_size: int,
  length: int,
  local_steps: int,
  num_clients: int,
  client_optimizer: optax.GradientTransformation,
  rank: int | None = 8,
) -> Workload:
  """Federates a decoder: LoRA on q and v, or all weights.

  Args:
    name: Its name in tables.
    config: The decoder's sizes.
    batch_size: Rows a local step.
    length: Tokens a row.
    local_steps: Steps a client.
    num_clients: Clients a round.
    client_optimizer: Of every local step.
    rank: Of LoRA; None trains all weights.

  Returns:
    A `Workload` that counts tokens.
  """
  model = models.decoder(config)
  full = adapters.full(model)
  adapter = full if rank is None else adapters.lora(model, rank=rank)
  flops = model_flops.flops_per_token(
    model,
    adapter.kind,
    jax.eval_shape(adapter.init, jax.random.key(0), model.shapes),
    length,
  )

  def make_example(rng, n):
    tokens = rng.integers(0, config.vocab_size, (n, length), dtype=np.int32)
    return {"tokens": tokens, "loss_mask": np.ones((n, length), np.float32)}

  return Workload(
    name=name,
    model=model,
    adapter=None if rank is None else adapter,
    loss=models.losses.language_model(adapters.loss_apply(adapter)),
    client_optimizer=client_optimizer,
    unit="tokens",
    units_per_example=length,
    flops_per_unit=flops.causal,
    batch_size=batch_size,
    local_steps=local_steps,
    num_clients=num_clients,
    make_example=make_example,
    dtype=config.dtype,
  )


def lora_llama(**changes: Any) -> Workload:
  """4-layer, 256-wide Llama; rank 8 on q, v; 8 clients x 4 steps x 4 x 128."""
  config = models.DecoderConfig(
    vocab_size=512,
    width=256,
    num_layers=4,
    num_heads=4,
    mlp_width=672,
    max_length=128,
    scan_layers=False,
  )
  options: dict[str, Any] = {
    "config": config,
    "batch_size": 4,
    "length": 128,
    "local_steps": 4,
    "num_clients": 8,
    "client_optimizer": optax.sgd(0.01),
  }
  return decoder_workload("lora_llama", **options | changes)


def lora_1b(**changes: Any) -> Workload:
  """Llama-3.2-1B's sizes in bfloat16; rank 16 on q, v; batch 4 x 512 tokens."""
  config = models.DecoderConfig(
    vocab_size=128_256,
    width=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    mlp_width=8192,
    rope_theta=500_000.0,
    dtype="bfloat16",
    param_dtype="bfloat16",
    scan_layers=True,
    remat="full",
  )
  options: dict[str, Any] = {
    "config": config,
    "batch_size": 4,
    "length": 512,
    "local_steps": 4,
    "num_clients": 64,
    "client_optimizer": optax.adamw(1e-4),
    "rank": 16,
  }
  return decoder_workload("lora_1b", **options | changes)


def full_100m(**changes: Any) -> Workload:
  """A 124-million-parameter decoder, all weights trained, AdamW."""
  config = models.DecoderConfig(
    vocab_size=32_000,
    width=768,
    num_layers=12,
    num_heads=12,
    mlp_width=2560,
    dtype="bfloat16",
    scan_layers=True,
    remat="full",
  )
  options: dict[str, Any] = {
    "config": config,
    "batch_size": 8,
    "length": 512,
    "local_steps": 4,
    "num_clients": 8,
    "client_optimizer": optax.adamw(1e-4),
    "rank": None,
  }
  return decoder_workload("full_100m", **options | changes)


def emnist_cnn(**changes: Any) -> Workload:
  """The EMNIST CNN; 10 clients x 5 steps x batch 20, SGD."""
  options: dict[str, Any] = {
    "batch_size": 20,
    "local_steps": 5,
    "num_clients": 10,
  } | changes
  model = models.cnn()
  c = model.config
  flops = model_flops.flops_per_row(model, "full", model.shapes, 0).total
  # The first layer's input needs no gradient.
  first = 2 * (c.image_size - 2) ** 2 * model.shapes["conv1"].size

  def make_example(rng, n):
    return {
      "x": rng.random((n, c.image_size, c.image_size), dtype=np.float32),
      "label": rng.integers(0, c.num_classes, n, dtype=np.int32),
    }

  return Workload(
    name="emnist_cnn",
    model=model,
    adapter=None,
    loss=models.losses.classification(lambda t, base, x: model.apply(t, x)),
    client_optimizer=optax.sgd(0.01),
    unit="examples",
    units_per_example=1,
    flops_per_unit=flops - first,
    make_example=make_example,
    dtype="float32",
    **options,
  )


WORKLOADS: dict[str, Callable[..., Workload]] = {
  "lora_llama": lora_llama,
  "emnist_cnn": emnist_cnn,
  "lora_1b": lora_1b,
  "full_100m": full_100m,
}


def check_name(name: str) -> None:
  """Raises ConfigError for a name that is none of `WORKLOADS`."""
  if name not in WORKLOADS:
    raise errors.ConfigError(
      f"--workloads: got {name!r}{errors.nearest(name, WORKLOADS)}"
    )


def workload(name: str, **changes: Any) -> Workload:
  """Builds a workload by name.

  Args:
    name: One of `WORKLOADS`.
    **changes: Sizes that differ: `num_clients`, `batch_size`, `local_steps`,
      and for decoders `length`, `config`, `rank`.

  Returns:
    A `Workload`.

  Raises:
    ConfigError: Unknown name.
  """
  check_name(name)
  return WORKLOADS[name](**changes)
