"""Bad fields and flags, and what the one line about them must say."""

HUGE = "1" + "0" * 400
LONG = "a" * 300

# Fields, as a command line gives them, and what the line must say.
CONFIG = {
  "client.learning_rat=1": r"client.learning_rat: unknown .*learning_rate'",
  "nothing.at.all=1": r"nothing.at.all: unknown field",
  "rounds=ten": r"rounds: got 'ten', expected int",
  "rounds=1e3": r"rounds: got '1e3', expected int",
  "rounds=0": r"rounds: got 0, expected at least 1",
  "rounds_per_dispatch=0": r"rounds_per_dispatch: got 0, expected at least 1",
  "rounds_per_dispatch=3": (
    r"rounds: got 2, expected a multiple of rounds_per_dispatch = 3"
  ),
  "rounds=2147483648": r"rounds: got 2147483648, expected below 2\*\*31",
  "rounds=1000000000000": r"rounds: got 1000000000000, expected below 2\*\*31",
  "rounds=-1": r"rounds: got -1, expected at least 1",
  "seed=-1": r"seed: got -1, expected 0 <= seed < 2\*\*32",
  "seed=4294967296": r"seed: got 4294967296, expected",
  "clients_per_round=0": r"clients_per_round: got 0, expected at least 1",
  "clients_per_round=9": r"clients_per_round: got 9, .* has 8 clients",
  "lanes=2147483648": r"lanes: got 2147483648, .* below 2\*\*31",
  "lanes=0": r"lanes: got 0, expected",
  "lanes=12": r"lanes: mesh.clients = 8 does not divide 12",
  "client.learning_rate=nan": r"client.learning_rate: got nan, expected",
  "data.alpha=nan": r"data.alpha: got nan, expected a finite number",
  "client.learning_rate=-1": r"client.learning_rate: got -1.0, expected",
  f"client.learning_rate={HUGE}": r"client.learning_rate: got inf, expected",
  "client.clip_norm=-1": r"client.clip_norm: got -1.0, expected",
  "server.learning_rate=inf": r"server.learning_rate: got inf, expected",
  "client.weighting=tokns": r"client.weighting: got 'tokns' .*'tokens'",
  "sampler=poison": r"sampler: got 'poison' .*'poisson'",
  "algorithm=fedavgg": r"algorithm: got 'fedavgg' .*'fedavg'",
  "aggregator=crum": r"aggregator: got 'crum' .*'krum'",
  "aggregator_options.f=1": r"aggregator_options.f: unknown option",
  "mesh.clients=3": r"mesh: clients=3 .* needs 3 devices, .* are 8",
  "mesh.clients=16": r"mesh: clients=16 .* needs 16 devices, .* are 8",
  "mesh.expert=2": r"mesh.expert: unknown field",
  "mesh.fsdp=0": r"mesh.fsdp: got 0, expected",
  "mesh.fsdp=8": r"client.batch_size: mesh.fsdp = 8 does not divide 2",
  "adapter.rank=17": r"adapter.rank: got 17, expected 1 to 16",
  "adapter.targets=q_prj": r"adapter.targets: .*'q_proj'",
  "data.sequence_length=65": r"data.sequence_length: got 65, .* is 64",
  "deterministic=true": r"lanes: got 'auto', but deterministic",
  "checkpoint.keep_last=0": r"checkpoint.keep_last: got 0, expected",
  "checkpoint.keep_best=eval/unsen/loss": r"checkpoint.keep_best: .*unseen",
  "checkpoint.keep_best=eval/seen/personal_loss": (
    r"checkpoint.keep_best: got 'eval/seen/personal_loss' .*'eval/seen/"
  ),
  "checkpoint.every=0": r"checkpoint.every: got 0, expected at least 1",
  "client.batch_size=1000000000000": (
    r"client.batch_size: got 1000000000000, expected below 2\*\*31"
  ),
  "client.batch_size=2147483640": (
    r"client.batch_size: got 2147483640, whose rows take .* GB on \d+ lanes, "
    r"expected at most this machine's .* GB of memory"
  ),
  "eval.batch_size=2147483640": (
    r"eval.batch_size: got 2147483640, whose rows take .* GB"
  ),
  "client.epochs=1000000000000": (
    r"client.epochs: got 1000000000000, expected below 2\*\*31"
  ),
  "model.path=" + LONG: rf"model.path: {LONG}: File name too long",
  "data.path=" + LONG: rf"{LONG}.* cannot be read",
  "client.epochs=0": r"client.epochs: got 0, expected at least 1",
  "client.store=disk": r"client.store: got 'disk'",
  "data.schedule=phase": r"data.schedule: .*'phases'",
  "eval.finetune_steps=-1": r"eval.finetune_steps: got -1, expected at least 0",
  "model.quantize=int5": r"model.quantize: got 'int5' .*'int8'",
  "realism.dropout=2": r"realism.dropout: got 2.0",
  "server.average=1": r"server.average: got 1.0, expected 0 <= x < 1",
  "checkpoint.best_is=low": r"checkpoint.best_is: got 'low' .*'lowest'",
  "safety.on_bad_loss=rollback": r"safety.on_bad_loss: .*'roll_back'",
  "safety.max_jump=0.5": r"safety.max_jump: got 0.5, expected more than 1",
  "safety.window=2": r"safety.window: got 2, expected at least 3",
  "model.dtype=float8": r"model.dtype: got 'float8'",
  "data.name=jsonn": r"jsonn",
  "privacy.kind=gausian": r"privacy.kind: got 'gausian' .*'gaussian'",
  "privacy.delta=0": r"privacy.delta: got 0.0, expected in \(0, 1\)",
  "privacy.delta=1": r"privacy.delta: got 1.0, expected in \(0, 1\)",
  "privacy.clip_norm=0": r"privacy.clip_norm: got 0.0, expected .* above 0",
  "privacy.accountant=prv": r"privacy.accountant: got 'prv'",
  "privacy.epsilon=2": r"privacy.epsilon: got 2.0, but privacy.kind is 'none'",
  "privacy.kind=gaussian": r"privacy.noise_multiplier: missing",
}
GAUSSIAN = ("--config.privacy.kind=gaussian", "--config.sampler=poisson")
NOISE = (*GAUSSIAN, "--config.privacy.noise_multiplier=1.1")
SECURE = ("--config.privacy.secure_aggregation.enabled=true",)
PRIVACY = {
  (*NOISE, "--config.privacy.epsilon=2"): (
    r"privacy.epsilon: got 2.0, and privacy.noise_multiplier 1.1; expected one"
  ),
  (*GAUSSIAN, "--config.privacy.noise_multiplier=nan"): (
    r"privacy.noise_multiplier: got nan, expected"
  ),
  (*GAUSSIAN, "--config.privacy.noise_multiplier=1e-300"): (
    r"privacy.noise_multiplier: got 1e-300 sensitivities, expected 0, or 0.001"
  ),
  (*NOISE, "--config.privacy.clip_norm=1e39"): (
    r"privacy.clip_norm: got 1e\+39, expected 1e-18 to 1e\+18"
  ),
  (*SECURE, "--config.privacy.clip_norm=1e39"): (
    r"error: privacy.clip_norm: got 1e\+39, expected 1e-18 to 1e\+18"
  ),
  (*GAUSSIAN, "--config.privacy.epsilon=1e300"): (
    r"privacy.epsilon: got 1e\+300, which noise of .* keeps to, expected less"
  ),
  (*GAUSSIAN, "--config.privacy.epsilon=-1"): (
    r"privacy.epsilon: got -1.0, expected"
  ),
  (*NOISE, "--config.sampler=uniform"): (
    r"privacy.accountant: got 'pld', but sampler 'uniform' .* expected 'rdp'"
  ),
  (*NOISE, "--config.sampler=round_robin"): (
    r"sampler: got 'round_robin', which no accountant matches, expected"
  ),
  (*NOISE, "--config.sampler=weighted", "--config.privacy.accountant=rdp"): (
    r"sampler: got 'weighted', which no accountant matches"
  ),
  (*NOISE, "--config.realism.availability=0.5"): (
    r"realism.availability: got 0.5, but privacy.kind 'gaussian' expects 1.0"
  ),
  (*NOISE, "--config.safety.on_bad_loss=roll_back"): (
    r"safety.on_bad_loss: got 'roll_back', .* privacy.kind 'gaussian' expects"
  ),
  (*NOISE, "--config.algorithm=scaffold"): (
    r"algorithm: got 'scaffold', .* privacy.kind 'gaussian' expects one of fed"
  ),
  (*NOISE, "--config.aggregator=median"): (
    r"aggregator: got 'median', but privacy.kind 'gaussian' expects 'mean'"
  ),
  (*SECURE, "--config.aggregator=median"): (
    r"aggregator: got 'median', but .*secure_aggregation, .* expects 'mean'"
  ),
  (*SECURE, "--config.algorithm=qfedavg"): (
    r"algorithm: got 'qfedavg', .*secure_aggregation, .* expects one of fedavg"
  ),
  (*SECURE, "--config.communication.up=int8"): (
    r"communication.up: got 'int8', but .*secure_aggregation, .* 'none'"
  ),
  (*SECURE, "--config.privacy.secure_aggregation.bits=16"): (
    r"privacy.secure_aggregation.bits: got 16, but sums of 3 clients, each up "
    r"to clip norm 1 x scale 65536, expect at least 19"
  ),
  (*SECURE, "--config.privacy.secure_aggregation.threshold=4"): (
    r"privacy.secure_aggregation.threshold: got 4, expected 1 to the 3 clients"
  ),
  (*SECURE, "--config.privacy.secure_aggregation.rounding=up"): (
    r"privacy.secure_aggregation.rounding: got 'up'"
  ),
  (*NOISE, *SECURE, "--config.privacy.secure_aggregation.scale=16"): (
    r"privacy.secure_aggregation.scale: got 16, with which rounding \d+ values"
  ),
}
FILES = ("--config.data.name=files", "--config.data.path=.")
# Several fields that contradict each other, and other flags.
COMMANDS = {
  ("--config.deterministic=1", "--config.lanes=8", "--config.mesh.fsdp=2"): (
    r"deterministic: got a mesh of fsdp = 2, tensor = 1, expected 1 and 1"
  ),
  (
    "--config.aggregator=krum",
    "--config.aggregator_options.num_byzantine=1",
  ): r"clients_per_round: got 3, but aggregator 'krum' expects at least 5",
  (
    "--config.aggregator=trimmed_mean",
    "--config.aggregator_options.num_byzantine=-1",
  ): r"aggregator_options.num_byzantine: got -1",
  (
    "--config.aggregator=trimmed_mean",
    "--config.aggregator_options.num_byzantine=2",
  ): r"clients_per_round: got 3, but aggregator 'trimmed_mean' expects at",
  (
    "--config.algorithm=ditto",
    "--config.client.store=host",
    "--config.deterministic=1",
    "--config.lanes=8",
  ): r"client.store: got 'host', but deterministic = True expects 'device'",
  ("--config.data.index=i", "--config.data.partition=iid"): (
    r"data.partition: got 'iid', but data.index expects 'natural'"
  ),
  ("--config.data.index=i",): r"eval.max_clients: got 0, but data.index",
  ("--config.data.index=i", "--config.sampler=weighted"): (
    r"sampler: got 'weighted', but data.index expects 'uniform' or"
  ),
  ("--config.data.index=i", "--config.data.name=files"): (
    r"data.name: got 'files', but data.index expects 'jsonl'"
  ),
  (
    "--config.checkpoint.every=3",
    "--config.rounds_per_dispatch=2",
  ): r"checkpoint.every: got 3, expected a multiple of rounds_per_dispatch = 2",
  (
    "--config.checkpoint.every=2",
    "--config.rounds_per_dispatch=2",
    "--config.safety.on_bad_loss=roll_back",
  ): r"rounds_per_dispatch: got 2, but safety.on_bad_loss = 'roll_back'",
  (
    "--config.algorithm=ditto",
    "--config.client.store=host",
    "--config.checkpoint.every=2",
    "--config.rounds_per_dispatch=2",
  ): r"rounds_per_dispatch: got 2, but clients' states .* are on the host",
  (
    "--config.algorithm=streaming_diloco",
    "--config.client.optimizer=adam",
    "--config.algorithm_options.num_fragments=2",
  ): r"algorithm_options.num_fragments: got 2 for 1 layers",
  (
    "--config.aggregator=bulyan",
    "--config.aggregator_options.num_byzantine=1",
  ): r"clients_per_round: got 3, but aggregator 'bulyan' expects at least 7",
  (*FILES, "--config.data.files=/absolute"): (
    r"data.path, data.files: .: holds no file '/absolute'"
  ),
  (
    "--config.client.epochs=2147483647",
    "--config.client.local_steps=0",
  ): r"client.epochs: got 2147483647, with which the rows of a round take .* G",
  (
    "--config.data.partition=merged",
    "--config.data.num_clients=99",
  ): r"data.num_clients: got 99, but there are \d+ to merge",
  ("--config.rounds",): r"--config.rounds: got no value",
  ("--profile_round=0",): r"profile_round: got 0, expected 1 to rounds = 2",
  ("--profile_round=x",): r"profile_round.*x",
  ("--round=3",): r"Unknown command line flag 'round'",
  ("again",): r"arguments: 'again' is not a flag",
  ("--config=no.py",): r"--config: 'no.py' is not a file",
  (
    "--coordinator=h:1",
    "--num_processes=2",
    "--process_id=2",
  ): r"--process_id: got 2, expected 0 to 1",
  (
    "--coordinator=h:1",
    "--num_processes=-3",
    "--process_id=0",
  ): r"--num_processes: got -3, expected at least 1",
  (
    "--coordinator=h:\u00b2",
    "--num_processes=2",
    "--process_id=1",
  ): r"--coordinator: got 'h:\u00b2', expected host:port",
  ("--coordinator=h:1",): r"--coordinator, --num_processes and --process_id",
  (
    "--coordinator=nowhere",
    "--num_processes=2",
    "--process_id=1",
  ): r"--coordinator: got 'nowhere', expected host:port",
}
