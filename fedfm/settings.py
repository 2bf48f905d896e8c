"""A run's settings: typed, checked, with a unit and a meaning each.

A loose config (nested dicts, from a file and flags) becomes `Settings` here and
nowhere else; below `experiment.py` nothing sees all of it.
"""

import dataclasses
import math
import types
import typing
from typing import Any

from fedfm import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings:
  """Devices along each mesh axis; -1 takes the rest."""

  clients: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
  """The foundation model."""

  path: str = ""  # Hugging Face folder; "" is the byte Llama that fedfm ships.
  init: str = "pretrained"  # Or "random": same architecture, fresh weights.
  dtype: str = "float32"  # Compute dtype: float32 or bfloat16.
  scan_layers: bool = False  # One scan over layers; compiles faster.
  remat: str = "none"  # none, full or dots.


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSettings:
  """What clients train."""

  kind: str = "lora"  # lora, head or full.
  rank: int = 8  # Of LoRA.
  alpha: float = 16.0  # LoRA's update is scaled by alpha / rank.
  targets: tuple[str, ...] = ("q_proj", "v_proj")  # Kernels' names.


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
  """The population."""

  name: str = "python_stdlib"  # python_stdlib, jsonl, or a TFDS data set.
  path: str = ""  # The file of jsonl; the data_dir of TFDS.
  split: str = "train"  # Split of a TFDS data set.
  client_key: str = "client"  # Field that tells clients apart.
  text_key: str = "text"  # Field that holds the text.
  sequence_length: int = 256  # Tokens in a row.
  unseen_fraction: float = 0.1  # Clients never trained on; jsonl and TFDS.
  heldout_fraction: float = 0.2  # Documents held out in each client; likewise.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientSettings:
  """A client's local work in a round."""

  optimizer: str = "sgd"  # sgd, momentum, adam or adamw.
  learning_rate: float = 0.1
  schedule: str = "constant"  # Over rounds: constant, linear or cosine, to 0.
  momentum: float = 0.9  # Of optimizer momentum.
  weight_decay: float = 0.0  # Of optimizer adamw.
  clip_norm: float = 0.0  # Largest gradient norm; 0 for no clipping.
  batch_size: int = 4  # Rows a local step.
  epochs: int = 1  # Passes over the client's rows.
  local_steps: int = 0  # Most steps; 0 for no limit.
  max_examples: int = 0  # Most rows used in an epoch; 0 for all.
  weighting: str = "examples"  # examples, tokens or uniform.
  proximal: float = 0.0  # mu of FedProx.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
  """The server optimizer of `fedopt`, and the rate of all."""

  optimizer: str = "sgd"  # Of fedopt: sgd, momentum, adam, adagrad or yogi.
  learning_rate: float = 1.0
  schedule: str = "constant"  # Over rounds: constant, linear or cosine, to 0.
  momentum: float = 0.9  # Of fedavgm and optimizer momentum.
  tau: float = 1e-3  # Adaptivity of fedadam, fedyogi and fedadagrad.


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
  """Evaluation, per client, on every population held out."""

  every: int = 10  # Rounds between evaluations; the last round always is.
  batch_size: int = 8  # Rows a step.
  max_examples: int = 8  # Rows a client; 0 for all.


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
  """What is kept on disk."""

  every: int = 10  # Rounds between checkpoints; the last round always is.
  keep_last: int = 3  # Checkpoints kept.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Everything that a run is a function of."""

  seed: int = 0  # Of every random number, in [0, 2**32).
  rounds: int = 40
  clients_per_round: int = 16
  lanes: int | str = "auto"  # Parallel tracks that clients run on.
  sampler: str = "uniform"  # uniform, poisson, weighted or round_robin.
  algorithm: str = "fedavg"
  mesh: MeshSettings = MeshSettings()
  model: ModelSettings = ModelSettings()
  adapter: AdapterSettings = AdapterSettings()
  data: DataSettings = DataSettings()
  client: ClientSettings = ClientSettings()
  server: ServerSettings = ServerSettings()
  eval: EvalSettings = EvalSettings()
  checkpoint: CheckpointSettings = CheckpointSettings()

  def __post_init__(self):
    check(self)


def from_dict(values: typing.Mapping[str, Any]) -> Settings:
  """Checks a nested dict and fills in defaults.

  Args:
    values: Field -> value, nested like `Settings`; `ConfigDict.to_dict()`.

  Returns:
    The settings.

  Raises:
    ConfigError: Unknown field (with the nearest real one), wrong type, or a
      value out of range.

  Examples:
    >>> from_dict({"rounds": 3}).rounds
    3
  """
  return _build(Settings, values, "")


def to_dict(settings: Settings) -> dict[str, Any]:
  """Returns a nested dict of JSON values; the inverse of `from_dict`."""
  values = dataclasses.asdict(settings)
  values["adapter"]["targets"] = list(values["adapter"]["targets"])
  return values


def _build(cls: type, values: Any, prefix: str) -> Any:
  if not isinstance(values, typing.Mapping):
    raise errors.ConfigError(
      f"{prefix.rstrip('.') or 'config'}: got {values!r}, expected fields"
    )
  fields = {f.name: f for f in dataclasses.fields(cls)}
  hints = typing.get_type_hints(cls)
  built = {}
  for name, value in values.items():
    if name not in fields:
      raise errors.ConfigError(
        f"{prefix}{name}: unknown field{errors.nearest(str(name), fields)}"
      )
    kind = hints[name]
    if dataclasses.is_dataclass(kind):
      built[name] = _build(kind, value, f"{prefix}{name}.")
    else:
      built[name] = convert(value, kind, f"{prefix}{name}")
  return cls(**built)


def convert(value: Any, kind: Any, field: str) -> Any:
  """Checks a value against a field's type; lossless conversions only.

  Args:
    value: What was given; strings of a command line are parsed.
    kind: int, float, bool, str, `tuple[str, ...]` or `int | str`.
    field: The field's dotted name, for messages.

  Returns:
    The value in the field's type.

  Raises:
    ConfigError: It does not fit.
  """
  if kind == int | str:
    text = str(value)
    is_number = text.lstrip("-").isdigit() and not isinstance(value, bool)
    kind, value = (int, text) if is_number else (str, value)
  try:
    if kind is bool:
      if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}[
          value.lower()
        ]
      if isinstance(value, bool):
        return value
    elif kind is int:
      if isinstance(value, str):
        return int(value)
      if isinstance(value, int) and not isinstance(value, bool):
        return value
    elif kind is float:
      if isinstance(value, str | int | float) and not isinstance(value, bool):
        return float(value)
    elif kind is str:
      if isinstance(value, str):
        return value
    elif typing.get_origin(kind) is tuple:
      if isinstance(value, str):
        value = [v.strip(" '\"") for v in value.strip("()[] ").split(",")]
        value = [v for v in value if v]
      if all(isinstance(v, str) for v in value):
        return tuple(value)
  except (KeyError, ValueError, TypeError):
    pass
  raise errors.ConfigError(
    f"{field}: got {value!r}, expected {_type_name(kind)}"
  )


def _type_name(kind: Any) -> str:
  if isinstance(kind, types.UnionType):
    return " or ".join(k.__name__ for k in typing.get_args(kind))
  if typing.get_origin(kind) is tuple:
    return "a list of names"
  return kind.__name__


def field_type(path: str) -> Any:
  """Returns the type of a dotted field such as "model.path".

  Args:
    path: Dotted field.

  Returns:
    A type that `convert` takes, or a dataclass for a group of fields.

  Raises:
    ConfigError: Unknown field.
  """
  cls: Any = Settings
  done = ""
  for name in path.split("."):
    hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
    if name not in hints:
      raise errors.ConfigError(
        f"{path}: unknown field"
        + errors.nearest(done + name, [done + h for h in hints])
      )
    cls, done = hints[name], f"{done}{name}."
  return cls


_CHOICES = {
  "sampler": ("uniform", "poisson", "weighted", "round_robin"),
  "model.init": ("pretrained", "random"),
  "model.dtype": ("float32", "bfloat16"),
  "model.remat": ("none", "full", "dots"),
  "adapter.kind": ("lora", "head", "full"),
  "client.optimizer": ("sgd", "momentum", "adam", "adamw"),
  "client.schedule": ("constant", "linear", "cosine"),
  "client.weighting": ("examples", "tokens", "uniform"),
  "server.optimizer": ("sgd", "momentum", "adam", "adagrad", "yogi"),
  "server.schedule": ("constant", "linear", "cosine"),
}
_AT_LEAST = {
  "rounds": 1,
  "clients_per_round": 1,
  "adapter.rank": 1,
  "data.sequence_length": 2,
  "client.batch_size": 1,
  "client.epochs": 1,
  "client.local_steps": 0,
  "client.max_examples": 0,
  "eval.every": 1,
  "eval.batch_size": 1,
  "eval.max_examples": 0,
  "checkpoint.every": 1,
  "checkpoint.keep_last": 1,
}
_RATES = (
  "client.learning_rate",
  "client.weight_decay",
  "client.clip_norm",
  "client.proximal",
  "server.learning_rate",
  "server.tau",
  "adapter.alpha",
)

_SHARES = (
  "client.momentum",
  "server.momentum",
  "data.unseen_fraction",
  "data.heldout_fraction",
)


def get(settings: Settings, path: str) -> Any:
  """Returns a field by its dotted name."""
  value: Any = settings
  for name in path.split("."):
    value = getattr(value, name)
  return value


def check(settings: Settings) -> None:
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
  for path in _RATES:
    value = get(settings, path)
    if not math.isfinite(value) or value < 0:
      raise errors.ConfigError(
        f"{path}: got {value}, expected a finite number of at least 0"
      )
  for path in _SHARES:
    value = get(settings, path)
    if not 0 <= value < 1:
      raise errors.ConfigError(f"{path}: got {value}, expected 0 <= x < 1")
  if settings.data.name == "jsonl" and not settings.data.path:
    raise errors.ConfigError(
      "data.path: got '', but data.name 'jsonl' expects a file"
    )
  lanes = settings.lanes
  if lanes != "auto" and (not isinstance(lanes, int) or lanes < 1):
    raise errors.ConfigError(
      f"lanes: got {lanes!r}, expected 'auto' or an integer of at least 1"
    )
