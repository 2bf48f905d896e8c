"""A federation that trains in a second: a tiny model and population on disk."""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import pytest

from fedfm import assembly, checkpoint, experiment, metrics, sharding
from fedfm.models import DecoderConfig, decoder, huggingface

WORDS = "the cat sat on a mat and the dog ran to the hill in rain"


def write_model(folder: pathlib.Path, **sizes: int) -> str:
  """Writes a random byte decoder of one layer as a Hugging Face folder."""
  config = {
    "vocab_size": 272,
    "width": 16,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_width": 32,
    "max_length": 64,
  }
  model = decoder(DecoderConfig(**(config | sizes)))
  huggingface.save(folder, model, model.init(jax.random.key(7)))
  return str(folder)


def write_data(path: pathlib.Path, num_clients: int = 10) -> str:
  """Writes clients of 2 to 5 documents, each with words of its own."""
  words = WORDS.split()
  with open(path, "w", encoding="utf-8") as file:
    for client in range(num_clients):
      for document in range(2 + client % 4):
        text = [
          words[(client * step + document) % len(words)]
          for step in range(10 + 3 * client)
        ]
        row = {"client": f"client {client}", "text": " ".join(text)}
        file.write(json.dumps(row) + "\n")
  return str(path)


@contextlib.contextmanager
def one_device() -> Iterator[None]:
  """Builds experiments on one of the devices, which compiles much faster."""
  one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "make_mesh", one)
    yield


def config(folder: pathlib.Path, **changes: Any) -> dict[str, Any]:
  """A config of the tiny federation, its files written where missing.

  Args:
    folder: Where the model and the data are, or go.
    **changes: Fields to change; a group of fields is merged.

  Returns:
    A nested dict for `experiment.train`.
  """
  model, data = folder / "model", folder / "data.jsonl"
  if not model.exists():
    write_model(model)
  if not data.exists():
    write_data(data)
  values: dict[str, Any] = {
    "rounds": 2,
    "clients_per_round": 3,
    "model": {"path": str(model)},
    "adapter": {"rank": 2},
    "data": {
      "name": "jsonl",
      "path": str(data),
      "sequence_length": 16,
      "unseen_fraction": 0.2,
    },
    "client": {"batch_size": 2, "local_steps": 3, "learning_rate": 0.5},
    "eval": {"every": 2, "batch_size": 2, "max_examples": 3},
    "checkpoint": {"every": 1},
  }
  for name, value in changes.items():
    merge = isinstance(value, dict) and name in values
    values[name] = values[name] | value if merge else value
  return values


def config_in_parts(folder: pathlib.Path, **changes: Any) -> dict[str, Any]:
  """As `config`, with microbatches, chunks of logits, tiles of attention."""
  if not (folder / "model").exists():
    write_model(folder / "model", max_length=1100)
  values = config(folder, **changes)
  values["model"] |= {"loss_chunk": 100}
  values["data"] |= {"sequence_length": 1100}
  values["client"] |= {"accumulate": 2}
  return values


def build(folder: pathlib.Path, **changes: Any) -> assembly.Experiment:
  """Builds a small variant of the tiny federation, on one device."""
  small = {"lanes": 1, "adapter": {"rank": 2, "targets": ("q_proj",)}}
  with one_device():
    return experiment.build(config(folder, **(small | changes)))


def variant(built: assembly.Experiment, **changes: Any) -> assembly.Experiment:
  """The same experiment with other settings, and the programs of the first.

  Args:
    built: The first.
    **changes: Fields of its settings that change no program; a dict changes
      some fields of a group.

  Returns:
    Another experiment.
  """
  settings = built.settings
  for name, value in changes.items():
    if isinstance(value, dict):
      value = dataclasses.replace(getattr(settings, name), **value)
    settings = dataclasses.replace(settings, **{name: value})
  other = dataclasses.replace(built, settings=settings)
  for name in (
    "run_naming_round",
    "run_rounds",
    "run_evaluation",
    "_init_state",
  ):
    other.__dict__[name] = getattr(built, name)
  return other


def content(workdir: pathlib.Path) -> dict[str, Any]:
  """What must not depend on when and where a run ran."""

  def timeless(row):
    return {
      k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))
    }

  with checkpoint.Checkpointer(
    workdir / "checkpoints", read_only=True
  ) as reader:
    manifest = reader.manifest(reader.latest())
  return {
    "arrays": {leaf["path"]: leaf["digest"] for leaf in manifest["leaves"]},
    "extra": manifest["extra"],
    "metrics": [timeless(row) for row in metrics.read(workdir)],
    "summary": timeless(json.loads((workdir / "summary.json").read_text())),
  }
