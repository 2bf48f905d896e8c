"""Every field of a run's config: its type, default, unit and meaning."""

import dataclasses
from typing import Any

from fedfm.settings import checks

# Options by name, checked against the signature of what they are given to.
Options = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings:
  """Devices along each mesh axis; -1 takes the rest."""

  clients: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
  """The foundation model."""

  path: str = ""  # A model's folder; "" is the byte Llama that fedfm ships.
  init: str = "pretrained"  # Or "random": same architecture, fresh weights.
  dtype: str = "float32"  # Compute dtype: float32 or bfloat16.
  quantize: str = ""  # Frozen kernels as int8 or nf4; "" for floats.
  scan_layers: bool = False  # One scan over layers; compiles faster.
  remat: str = "none"  # none, full, mlp or dots; see `DecoderConfig`.
  num_classes: int = 0  # Of a new classifier; 0 for the folder's own.
  attention_kernel: str = "auto"  # By the backend; or xla, cudnn or splash.
  loss_chunk: int | str = "auto"  # Tokens whose logits exist at once; 0: all.


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSettings:
  """What clients train."""

  kind: str = "lora"  # A factory of `fedfm.adapters`, such as "ia3" or "full".
  rank: int = 8  # Of lora and dora.
  alpha: float = 16.0  # Their update is scaled by alpha / rank.
  targets: tuple[str, ...] = ("q_proj", "v_proj")  # Kernels' names; likewise.
  also: tuple[str, ...] = ()  # Parameters trained beside it: "classifier".
  options: Options = dataclasses.field(default_factory=dict)  # Of any kind.


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
  """The population."""

  task: str = "language_model"  # Or classification, contrastive (CLIP).
  # python_stdlib, jsonl, files (a client each), npz, sentence_polarity, or a
  # TFDS data set.
  name: str = "python_stdlib"
  path: str = (
    ""  # The file of jsonl, npz, ...; folder of files; TFDS's data_dir.
  )
  files: str = "*.json*"  # Of data.name files: which are clients.
  test_files: str = ""  # Which are evaluated on, as population "test".
  # Of data.name jsonl with very many clients: the folder of an index of the
  # file, made if missing, by which names and lines are found on the disk.
  index: str = ""
  split: str = "train"  # Split of a TFDS data set.
  client_key: str = "client"  # Field that tells clients apart; "" for one.
  text_key: str = "text"  # Field that holds the text.
  image_key: str = ""  # Field of the images; "" for text alone.
  # Field of token ids, to read instead of text.
  token_key: str = ""
  # Fields of prompts and responses, to read instead of text: the loss is on the
  # responses. The context may be empty, and "" is no such field.
  prompt_key: str = ""
  context_key: str = ""
  response_key: str = "response"
  # How prompts are written: auto (the model folder's chat template, else
  # alpaca_short), a name of `data.prompt_formats`, or a .jinja file.
  template: str = "auto"
  packed: bool = True  # Several prompts with their responses in a row.
  sequence_length: int = 256  # Tokens in a row.
  # Whether the rows of all clients stay on the device, at most 2 GiB, and a
  # round is sent their numbers only.
  resident: bool = False
  unseen_fraction: float = 0.1  # Clients never trained on; jsonl and TFDS.
  heldout_fraction: float = 0.2  # Documents held out in each client; likewise.
  # Examples held out in each client that a partition dealt a pool out to, as
  # population "seen".
  dealt_heldout_fraction: float = 0.0
  # natural, merged (natural clients joined), or, of the pooled rows, iid,
  # dirichlet or shards.
  partition: str = "natural"
  num_clients: int = 0  # Of another partition; 0 for as many as there are.
  # Field of the labels, integers, for classification, dirichlet and shards;
  # where it is `client_key`, a row's label is its natural client.
  label_key: str = "label"
  alpha: float = 0.1  # Of dirichlet: near 0 a client has one label.
  shards: int = 2  # A client's shards.
  # How the population changes over rounds: static, arrivals (options: rounds)
  # or phases (options: num_phases, rounds_each).
  schedule: str = "static"
  schedule_options: Options = dataclasses.field(default_factory=dict)


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
  accumulate: int = 1  # Microbatches a local step, which divide its rows.
  epochs: int = 1  # Passes over the client's rows.
  local_steps: int = 0  # Most steps; 0 for no limit.
  max_examples: int = 0  # Most rows used in an epoch; 0 for all.
  # By examples, tokens or uniform; auto is the algorithm's own.
  weighting: str = "auto"
  store: str = "auto"  # Of what clients keep: device, host (a file), or auto.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
  """The server optimizer of `fedopt`, and the rate of all."""

  optimizer: str = "sgd"  # Of fedopt: sgd, momentum, adam, adagrad or yogi.
  # None is the algorithm's own: 0.1 of adaptive ones, 0.7 of DiLoCo's, 0.5 of
  # Reptile, 1 of all others.
  learning_rate: float | None = None
  schedule: str = "constant"  # Over rounds: constant, linear or cosine, to 0.
  momentum: float = 0.9  # Of fedavgm, diloco and optimizer momentum.
  tau: float = 1e-3  # Added to the root that adaptive optimizers divide by.
  average: float = 0.0  # Decay of the average that is evaluated; 0 for none.


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommunicationSettings:
  """What is done to messages to make them smaller; "none" for nothing."""

  up: str = "none"  # Compressor of what clients send, such as int8 or top_k.
  up_options: Options = dataclasses.field(default_factory=dict)
  down: str = "none"  # Compressor of what the server sends.
  down_options: Options = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealismSettings:
  """How clients behave; the defaults are ideal. See `data/realism.py`."""

  availability: float = 1.0  # Mean share of rounds in which a client is online.
  period: int = 0  # Rounds of a cycle of availability; 0 for none.
  dropout: float = 0.0  # Chance that a client never reports.
  least_work: float = 1.0  # Share of its steps that a client does at least.
  deadline: float = 0.0  # Simulated seconds that a round waits; 0 for all.
  late: str = "drop"  # Or partial: stop in time with the steps done so far.
  rate_spread: float = 0.0  # Of the clients' log learning rates.


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceSettings:
  """Simulated devices of clients: medians of log-normal profiles."""

  flops_per_second: float = 1e12
  up_bytes_per_second: float = 1.25e6
  down_bytes_per_second: float = 6.25e6
  latency_seconds: float = 0.1
  spread: float = 0.5  # Standard deviation of the logarithms.


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecureAggregationSettings:
  """Secure aggregation, simulated; see `privacy/secure_sum.py`."""

  enabled: bool = False
  bits: int = 32  # Of an integer of the masked sum.
  scale: float = 2.0**16  # Integers to a unit of the weights.
  rounding: str = "stochastic"  # Or nearest.
  threshold: int = 1  # A round of fewer survivors changes nothing.
  dropout: float = 0.0  # Chance to leave after the masks were agreed on.


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacySettings:
  """Privacy of clients. With it, clients weigh the same."""

  kind: str = "none"  # Or gaussian: central DP-FedAvg.
  clip_norm: float = 1.0  # Largest norm of a client's delta.
  # Standard deviation of the noise on the sum, over the clip norm; or epsilon,
  # which the noise is then chosen for, over all rounds.
  noise_multiplier: float | None = None
  epsilon: float | None = None
  delta: float = 1e-5  # Below 1 / population, to mean anything.
  accountant: str = "pld"  # Of sampler poisson: pld or rdp; of uniform: rdp.
  secure_aggregation: SecureAggregationSettings = SecureAggregationSettings()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
  """Evaluation, per client, on every population held out."""

  every: int = 10  # Rounds between evaluations; the last round always is.
  batch_size: int = 8  # Rows a step.
  max_examples: int = 8  # Rows a client, spread over it; 0 for all.
  max_clients: int = 0  # Clients a population, evenly spaced; 0 for all.
  finetune_steps: int = 0  # Clients also tune the model before; 0 for none.


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
  """What is kept on disk."""

  every: int = 10  # Rounds between checkpoints; the last round always is.
  keep_last: int = 3  # Checkpoints kept.
  keep_every: int = 0  # Rounds that this divides are kept for ever; 0 for none.
  keep_best: str = ""  # Metric whose best round is kept: "eval/unseen/loss".
  best_is: str = "lowest"  # Or "highest".

  @property
  def best_by(self) -> str:
    """What rounds are compared by; scores of other things do not count."""
    return f"{self.best_is} {self.keep_best}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SafetySettings:
  """What to do about a round whose training loss is bad."""

  # "continue" warns; "stop" ends the run; "roll_back" goes back to the last
  # checkpoint of `checkpoint.every` and leaves the rounds since then out.
  on_bad_loss: str = "continue"
  # A loss above so many times the median of the rounds before is bad, as one
  # that is not finite always is; 0 for no such limit.
  max_jump: float = 0.0
  window: int = 10  # Rounds that the median is of.
  max_rollbacks: int = 3  # In a run; one more stops it.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Everything that a run is a function of."""

  seed: int = 0  # Of every random number, in [0, 2**32).
  rounds: int = 40
  # Rounds of one program, for those shorter than their start; divides what
  # comes every so many rounds.
  rounds_per_dispatch: int = 1
  clients_per_round: int = 16
  lanes: int | str = "auto"  # Parallel tracks that clients run on.
  # The same bits on any mesh of clients and number of processes; slower, and
  # needs a number of lanes.
  deterministic: bool = False
  # uniform, poisson, weighted, round_robin, or elastic (options: counts, the
  # replicas of each phase, and rounds_each).
  sampler: str = "uniform"
  sampler_options: Options = dataclasses.field(default_factory=dict)
  algorithm: str = "fedavg"
  algorithm_options: Options = dataclasses.field(default_factory=dict)
  aggregator: str = "mean"  # Or a robust rule, such as "median" or "krum".
  aggregator_options: Options = dataclasses.field(default_factory=dict)
  mesh: MeshSettings = MeshSettings()
  model: ModelSettings = ModelSettings()
  adapter: AdapterSettings = AdapterSettings()
  data: DataSettings = DataSettings()
  client: ClientSettings = ClientSettings()
  server: ServerSettings = ServerSettings()
  communication: CommunicationSettings = CommunicationSettings()
  realism: RealismSettings = RealismSettings()
  devices: DeviceSettings = DeviceSettings()
  privacy: PrivacySettings = PrivacySettings()
  eval: EvalSettings = EvalSettings()
  checkpoint: CheckpointSettings = CheckpointSettings()
  safety: SafetySettings = SafetySettings()

  def __post_init__(self):
    checks.check(self)
