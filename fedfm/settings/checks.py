"""Ranges and choices of the fields: the one place that says what is allowed."""

import dataclasses
import math
from typing import Any

from fedfm import errors

_CHOICES = {
  "sampler": ("uniform", "poisson", "weighted", "round_robin", "elastic"),
  "model.init": ("pretrained", "random"),
  "model.dtype": ("float32", "bfloat16"),
  "model.remat": ("none", "full", "mlp", "dots"),
  "model.quantize": ("", "int8", "nf4"),
  "adapter.kind": (
    "bitfit",
    "dora",
    "full",
    "head",
    "houlsby",
    "ia3",
    "last_layers",
    "lora",
    "maple",
    "pfeiffer",
    "prefix_tuning",
    "prompt_tuning",
    "subset",
  ),
  "data.task": ("language_model", "classification", "contrastive"),
  "data.partition": ("natural", "merged", "iid", "dirichlet", "shards"),
  "data.schedule": ("static", "arrivals", "phases"),
  "client.optimizer": ("sgd", "momentum", "adam", "adamw"),
  "client.schedule": ("constant", "linear", "cosine"),
  "client.weighting": ("auto", "examples", "tokens", "uniform"),
  "client.store": ("auto", "device", "host"),
  "server.optimizer": ("sgd", "momentum", "adam", "adagrad", "yogi"),
  "server.schedule": ("constant", "linear", "cosine"),
  "privacy.kind": ("none", "gaussian"),
  "privacy.accountant": ("pld", "rdp"),
  "checkpoint.best_is": ("lowest", "highest"),
  "safety.on_bad_loss": ("continue", "stop", "roll_back"),
}
_AT_LEAST = {
  "rounds": 1,
  "rounds_per_dispatch": 1,
  "clients_per_round": 1,
  "adapter.rank": 1,
  "model.num_classes": 0,
  "data.sequence_length": 2,
  "data.num_clients": 0,
  "data.shards": 1,
  "client.batch_size": 1,
  "client.accumulate": 1,
  "client.epochs": 1,
  "client.local_steps": 0,
  "client.max_examples": 0,
  "eval.every": 1,
  "eval.batch_size": 1,
  "eval.max_examples": 0,
  "eval.max_clients": 0,
  "eval.finetune_steps": 0,
  "checkpoint.every": 1,
  "checkpoint.keep_last": 1,
  "checkpoint.keep_every": 0,
  "safety.window": 3,
  "safety.max_rollbacks": 0,
}
_MOST = 2**31 - 1  # Counters on the device are of 32 bits.
_RATES = (
  "client.learning_rate",
  "client.weight_decay",
  "client.clip_norm",
  "server.learning_rate",
  "server.tau",
  "adapter.alpha",
  "safety.max_jump",
)

_SHARES = (
  "client.momentum",
  "server.momentum",
  "server.average",
  "data.unseen_fraction",
  "data.heldout_fraction",
  "data.dealt_heldout_fraction",
)


def get(settings: Any, path: str) -> Any:
  """Returns a field by its dotted name."""
  value: Any = settings
  for name in path.split("."):
    value = getattr(value, name)
  return value


def expect(settings: Any, path: str, expected: Any, what: str) -> None:
  """Refuses a value that does not go with something else.

  Args:
    settings: The settings.
    path: The field's dotted name.
    expected: The only value that does.
    what: What it has to go with, for the message.

  Raises:
    ConfigError: It is another.
  """
  got = get(settings, path)
  if got != expected:
    raise errors.ConfigError(
      f"{path}: got {got!r}, but {what} expects {expected!r}"
    )


def expect_default(settings: Any, path: str, what: str) -> None:
  """As `expect`, of a field that would not be read: its default."""
  expect(settings, path, get(type(settings)(), path), what)


def check(settings: Any) -> None:
  """Raises ConfigError for the first value that is out of range."""
  if not 0 <= settings.seed < 2**32:
    raise errors.ConfigError(
      f"seed: got {settings.seed}, expected 0 <= seed < 2**32"
    )
  for path, choices in _CHOICES.items():
    value = get(settings, path)
    if value not in choices:
      raise errors.ConfigError(
        f"{path}: got {value!r}{errors.nearest(value, choices)}"
      )
  for path, least in _AT_LEAST.items():
    value = get(settings, path)
    if value < least:
      raise errors.ConfigError(
        f"{path}: got {value}, expected at least {least}"
      )
    if value > _MOST:
      raise errors.ConfigError(f"{path}: got {value}, expected below 2**31")
  _check_finite(settings)
  for path in _RATES:
    value = get(settings, path)
    if value is not None and value < 0:
      raise errors.ConfigError(
        f"{path}: got {value}, expected a finite number of at least 0"
      )
  for path in _SHARES:
    value = get(settings, path)
    if not 0 <= value < 1:
      raise errors.ConfigError(f"{path}: got {value}, expected 0 <= x < 1")
  _check_data(settings.data)
  _check_privacy(settings.privacy)
  _check_index(settings)
  for path, least in (("lanes", 1), ("model.loss_chunk", 0)):
    value = get(settings, path)
    if value != "auto" and (
      not isinstance(value, int) or not least <= value <= _MOST
    ):
      raise errors.ConfigError(
        f"{path}: got {value!r}, expected 'auto' or an integer of at least "
        f"{least} and below 2**31"
      )
  if 0 < settings.safety.max_jump <= 1:
    raise errors.ConfigError(
      f"safety.max_jump: got {settings.safety.max_jump}, expected more than 1, "
      "or 0 for no limit"
    )
  if settings.deterministic and settings.lanes == "auto":
    raise errors.ConfigError(
      "lanes: got 'auto', but deterministic = True expects a number that every "
      "mesh.clients of the run divides"
    )
  _check_dispatch(settings)
  if settings.data.task == "contrastive":
    _check_batches_of_pairs(settings)
  rows, parts = settings.client.batch_size, settings.client.accumulate
  if rows % parts:
    raise errors.ConfigError(
      f"client.accumulate: {parts} microbatches do not divide "
      f"client.batch_size {rows}"
    )


def _check_finite(group: Any, prefix: str = "") -> None:
  """Refuses NaN and infinity, in whatever field."""
  for field in dataclasses.fields(group):
    value, path = getattr(group, field.name), f"{prefix}{field.name}"
    if dataclasses.is_dataclass(value):
      _check_finite(value, f"{path}.")
    elif isinstance(value, float) and not math.isfinite(value):
      raise errors.ConfigError(f"{path}: got {value}, expected a finite number")


def _check_privacy(privacy: Any) -> None:
  """Refuses fields that contradict each other, or that nothing would read."""
  if privacy.clip_norm <= 0:
    raise errors.ConfigError(
      f"privacy.clip_norm: got {privacy.clip_norm}, expected a finite number "
      "above 0"
    )
  if not 0 < privacy.delta < 1:
    raise errors.ConfigError(
      f"privacy.delta: got {privacy.delta}, expected in (0, 1)"
    )
  names = ("noise_multiplier", "epsilon")
  given = {n: getattr(privacy, n) for n in names}
  given = {name: value for name, value in given.items() if value is not None}
  for name, value in given.items():
    if value <= 0:
      raise errors.ConfigError(
        f"privacy.{name}: got {value}, expected a finite number above 0"
      )
    if privacy.kind == "none":
      raise errors.ConfigError(
        f"privacy.{name}: got {value}, but privacy.kind is 'none', expected "
        "'gaussian'"
      )
  if len(given) == 2:
    raise errors.ConfigError(
      f"privacy.epsilon: got {privacy.epsilon}, and privacy.noise_multiplier "
      f"{privacy.noise_multiplier}; expected one of them"
    )
  if privacy.kind != "none" and not given:
    raise errors.ConfigError(
      f"privacy.noise_multiplier: missing, but privacy.kind {privacy.kind!r} "
      "expects it, or privacy.epsilon"
    )


def _check_dispatch(settings: Any) -> None:
  """Refuses several rounds a dispatch where something comes between them."""
  each = settings.rounds_per_dispatch
  for path in (
    "rounds",
    "eval.every",
    "checkpoint.every",
    "checkpoint.keep_every",
  ):
    value = get(settings, path)
    if value % each:
      raise errors.ConfigError(
        f"{path}: got {value}, expected a multiple of rounds_per_dispatch = "
        f"{each}"
      )
  for path, value in (
    ("safety.on_bad_loss", "roll_back"),
    ("deterministic", True),
  ):
    if each > 1 and get(settings, path) == value:
      raise errors.ConfigError(
        f"rounds_per_dispatch: got {each}, but {path} = {value!r} expects 1"
      )


def _check_batches_of_pairs(settings: Any) -> None:
  """Refuses batches in which a pair has no other to be told from."""
  for path in ("client.batch_size", "eval.batch_size"):
    if get(settings, path) < 2:
      raise errors.ConfigError(
        f"{path}: got {get(settings, path)}, but data.task 'contrastive' tells "
        "the pairs of a batch apart; expected at least 2"
      )
  if settings.client.accumulate != 1:
    raise errors.ConfigError(
      f"client.accumulate: got {settings.client.accumulate}, but data.task "
      "'contrastive' compares all pairs of a step; expected 1"
    )


def _check_pairs(data: Any) -> None:
  """Refuses what holds no pairs of an image and a text."""
  if data.name in ("python_stdlib", "jsonl", "files"):
    raise errors.ConfigError(
      f"data.name: got {data.name!r}, but data.task 'contrastive' expects "
      "images and texts: 'npz' or a TFDS data set"
    )
  if data.prompt_key:
    raise errors.ConfigError(
      f"data.prompt_key: got {data.prompt_key!r}, but data.task 'contrastive' "
      "expects ''"
    )


def _check_index(settings: Any) -> None:
  """Refuses what would read, or name, every client of an index."""
  if not settings.data.index:
    return
  expected: dict[str, Any] = {
    "data.name": "jsonl",
    "data.task": "language_model",
    "data.partition": "natural",
    "data.schedule": "static",
    "data.resident": False,
    "realism.availability": 1.0,
    "eval.finetune_steps": 0,
  }
  for path, value in expected.items():
    got = get(settings, path)
    if got != value:
      raise errors.ConfigError(
        f"{path}: got {got!r}, but data.index expects {value!r}"
      )
  if settings.sampler not in ("uniform", "poisson"):
    raise errors.ConfigError(
      f"sampler: got {settings.sampler!r}, but data.index expects 'uniform' or "
      "'poisson'"
    )
  if settings.data.path.endswith(".gz") or not settings.data.client_key:
    raise errors.ConfigError(
      f"data.index: got {settings.data.index!r}, but data.path "
      f"{settings.data.path!r} with data.client_key "
      f"{settings.data.client_key!r} is compressed or of one client"
    )
  if not settings.eval.max_clients:
    raise errors.ConfigError(
      "eval.max_clients: got 0, but data.index expects at least 1"
    )


def _check_data(data: Any) -> None:
  """Refuses fields that the source needs, or that exclude each other."""
  # Files without clients, and what they are for.
  pooled = {
    "npz": ("classification", "contrastive"),
    "sentence_polarity": ("classification",),
  }
  kinds = {"files": "a folder"} | dict.fromkeys(("jsonl", *pooled), "a file")
  for name, what in kinds.items():
    if data.name == name and not data.path:
      raise errors.ConfigError(
        f"data.path: got '', but data.name {name!r} expects {what}"
      )
  if data.name in pooled and data.task not in pooled[data.name]:
    raise errors.ConfigError(
      f"data.task: got {data.task!r}, but data.name {data.name!r} expects "
      f"{' or '.join(map(repr, pooled[data.name]))}"
    )
  if data.name in pooled and (
    data.partition == "natural" or not data.num_clients
  ):
    raise errors.ConfigError(
      f"data.num_clients: got {data.num_clients} with data.partition "
      f"{data.partition!r}, but data.name {data.name!r} has no natural clients;"
      " expected at least 1, dealt out as iid, dirichlet or shards"
    )
  if data.task == "contrastive":
    _check_pairs(data)
  if data.task == "classification" and (data.prompt_key or data.token_key):
    raise errors.ConfigError(
      "data.task: got 'classification', but data.prompt_key and data.token_key "
      "expect 'language_model'"
    )
  if data.prompt_key and data.token_key:
    raise errors.ConfigError(
      f"data.token_key: got {data.token_key!r}, but data.prompt_key is "
      f"{data.prompt_key!r}; expected one of them to be ''"
    )
  for field in ("prompt_key", "token_key"):
    if data.name == "python_stdlib" and getattr(data, field):
      raise errors.ConfigError(
        f"data.{field}: got {getattr(data, field)!r}, but data.name "
        "'python_stdlib' holds text"
      )
  if data.prompt_key and not data.response_key:
    raise errors.ConfigError(
      "data.response_key: got '', but data.prompt_key expects responses"
    )
  if data.prompt_key and data.sequence_length < 4:
    raise errors.ConfigError(
      f"data.sequence_length: got {data.sequence_length}, expected at least 4 "
      "for a prompt and its response"
    )
  if data.test_files and data.name != "files":
    raise errors.ConfigError(
      f"data.test_files: got {data.test_files!r}, but data.name is "
      f"{data.name!r}, expected 'files'"
    )
