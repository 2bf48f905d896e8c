"""From settings to a population: read, held out, tokenized, dealt anew."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import numpy as np

from fedfm import blueprint, errors, models
from fedfm import data as data_lib
from fedfm.data import (
  holdout,
  image_text,
  instructions,
  partition,
  prompt_formats,
  text,
)
from fedfm.settings import DataSettings, EvalSettings, Settings

# Data sets without clients of their own, whose fields have our names.
POOLED = ("npz", "sentence_polarity")


class Population(NamedTuple):
  """Who there is, in numbers.

  Attributes:
    data: Numeric clients.
    tokenizer: Text to tokens and back; None of images.
  """

  data: data_lib.FederatedData
  tokenizer: data_lib.Tokenizer | None


def load(settings: Settings, config: Any) -> Population:
  """Loads the population that the settings name, and makes it numeric.

  Args:
    settings: The run's settings.
    config: The model's, which has the vocabulary and the classes.

  Returns:
    A `Population`.

  Raises:
    ConfigError: A partition that the data cannot give, or a vocabulary that is
      smaller than the tokenizer's.
    DataError: Missing or malformed data, a tokenizer or a template.
  """
  d = settings.data
  model_folder = blueprint.model_folder(settings)
  num_classes = getattr(config, "num_classes", 0)
  tokenizer = None
  if not d.image_key or (d.task == "contrastive" and not d.token_key):
    with errors.at("model.path", model_folder):
      tokenizer = _tokenizer(str(model_folder))
    if tokenizer.vocab_size > config.vocab_size:
      raise errors.ConfigError(
        f"model.path: {model_folder}: vocabulary of {config.vocab_size} is "
        f"smaller than the tokenizer's {tokenizer.vocab_size}"
      )
  if d.task == "classification":
    rows_of = _labelled(d, tokenizer, config)
    settings_of_rows = dataclasses.replace(d, label_key="label")
  elif d.task == "contrastive":
    rows_of, settings_of_rows = _pairs(d, tokenizer, config), d
  else:
    assert tokenizer is not None
    rows_of = _rows_of(d, tokenizer, model_folder, config.vocab_size)
    settings_of_rows = d
  raw = _read(d, num_classes, settings.eval)
  by_example = deals_examples(d)
  if by_example:
    raw = raw._replace(train=repartition(raw.train, d, settings.seed))
  numeric = data_lib.FederatedData(
    train=rows_of(raw.train),
    evals={
      name: rows_of(few_clients(source, settings.eval.max_clients))
      for name, source in raw.evals.items()
    },
  )
  checked = d.prompt_key or d.token_key or d.task == "contrastive"
  if checked and not d.index:
    # Texts are known to be texts; these may not fit, and are found out now.
    for source in (numeric.train, *numeric.evals.values()):
      for client_id in source.ids:
        source.read(client_id)
  if not by_example:
    train = repartition(numeric.train, settings_of_rows, settings.seed)
    numeric = numeric._replace(train=train)
  numeric = _hold_out_dealt(numeric, settings)
  return Population(numeric, tokenizer)


def _hold_out_dealt(
  data: data_lib.FederatedData, settings: Settings
) -> data_lib.FederatedData:
  """Holds examples out in each client that a pool was dealt out to."""
  fraction = settings.data.dealt_heldout_fraction
  if not fraction:
    return data
  if "seen" in data.evals or settings.data.partition == "natural":
    raise errors.ConfigError(
      f"data.dealt_heldout_fraction: got {fraction}, expected 0 where clients "
      "are natural or their held-out examples are a population already"
    )
  split = holdout.hold_out(data.train, 0.0, fraction)
  seen = few_clients(split.evals["seen"], settings.eval.max_clients)
  return data_lib.FederatedData(split.train, {"seen": seen, **data.evals})


def deals_examples(d: DataSettings) -> bool:
  """Whether a partition deals examples out, before rows are made of them.

  A row of several prompts with their responses has no one label, and neither
  has a row that begins in the middle of a text.
  """
  if d.task == "classification":  # A row is an example.
    return False
  return d.task == "contrastive" or bool(d.prompt_key or _category(d))


def _category(d: DataSettings) -> str | None:
  """The field that examples are dealt out by, or None."""
  by_label = d.partition in ("dirichlet", "shards")
  return d.label_key if by_label and d.label_key != d.client_key else None


def _read(
  d: DataSettings, num_classes: int, evaluated: EvalSettings
) -> data_lib.FederatedData:
  """Reads the fields that the settings name, and holds a part out.

  Args:
    d: What to read.
    num_classes: Labels are below it, where they are classified.
    evaluated: How many clients are, and how many pairs are told apart.

  Returns:
    Clients to train on and populations to evaluate on, not numeric yet.
  """
  if d.name == "python_stdlib":
    return data_lib.python_stdlib.load(d.path or None)
  dealt_by = _category(d) if deals_examples(d) else None
  if d.name == "npz" and d.task == "contrastive":
    fields = {"x": "x", d.token_key or d.text_key: d.token_key or d.text_key}
    if dealt_by:
      fields["y"] = dealt_by
    return data_lib.from_npz(d.path, fields, evaluated.batch_size)
  if d.name == "npz":
    with errors.at("data.path", d.path):
      raw = data_lib.from_npz(d.path)
      for source in (raw.train, *raw.evals.values()):
        data_lib.check_labels(source, num_classes)
    return raw
  if d.name == "sentence_polarity":
    return data_lib.sentence_polarity(d.path, d.heldout_fraction)
  required = (d.prompt_key, d.response_key) if d.prompt_key else ()
  texts = (*required, d.context_key) if d.context_key and required else required
  options: dict[str, Any] = {"required": required}
  if d.token_key:
    options["token_key"] = d.token_key
  elif not texts:
    texts = (d.text_key,)
  label_key = d.label_key if d.task == "classification" else None
  if d.index:
    source = data_lib.from_indexed_jsonl(
      d.path, d.index, d.client_key, texts, **options
    )
    return data_lib.indexed.hold_out(
      source, d.unseen_fraction, d.heldout_fraction, evaluated.max_clients
    )
  if d.name == "jsonl":
    source = data_lib.from_jsonl(
      d.path,
      d.client_key,
      texts,
      label_key=label_key,
      category_key=dealt_by,
      **options,
    )
    if label_key:
      data_lib.check_labels(source, num_classes, label_key)
  elif d.name == "files":
    with errors.at("data.path, data.files", d.path):
      source = data_lib.from_files(
        d.path, d.files, texts, category_key=dealt_by, **options
      )
  else:
    if d.task == "contrastive":
      texts = (d.image_key, *(() if d.token_key else (d.text_key,)))
    elif d.image_key:
      texts = (d.image_key,)
    more = (d.token_key, label_key, dealt_by)
    fields = (*texts, *(key for key in more if key))
    source = data_lib.from_tfds(
      d.name,
      d.split,
      d.client_key,
      d.path or None,
      fields,
      label_key,
      num_classes,
    )
  test = None
  if d.test_files:
    with errors.at("data.path, data.test_files", d.path):
      test = data_lib.from_files(d.path, d.test_files, texts, **options)
    source = data_lib.subset(
      source, [i for i in source.ids if i not in test.ids]
    )
  raw = holdout.hold_out(source, d.unseen_fraction, d.heldout_fraction)
  return (
    raw if test is None else raw._replace(evals={**raw.evals, "test": test})
  )


def _rows_of(
  d: DataSettings,
  tokenizer: data_lib.Tokenizer,
  model_folder: pathlib.Path,
  vocab_size: int,
) -> Callable[[data_lib.ClientSource], data_lib.ClientSource]:
  """Chooses what makes rows of tokens: of tokens, of prompts, or of text."""
  if d.token_key:
    return functools.partial(
      text.from_tokens,
      sequence_length=d.sequence_length,
      token_key=d.token_key,
      pad=tokenizer.pad,
      vocab_size=vocab_size,
    )
  if d.prompt_key:
    return functools.partial(
      data_lib.instruct,
      tokenizer=tokenizer,
      sequence_length=d.sequence_length,
      fields=instructions.Fields(
        d.prompt_key, d.response_key, d.context_key or None
      ),
      prompt_format=prompt_formats.load(d.template, model_folder),
      packed=d.packed,
    )
  return functools.partial(
    text.tokenize,
    tokenizer=tokenizer,
    sequence_length=d.sequence_length,
    text_key="text" if d.name == "python_stdlib" else d.text_key,
  )


def _labelled(
  d: DataSettings, tokenizer: data_lib.Tokenizer | None, config: Any
) -> Callable[[data_lib.ClientSource], data_lib.ClientSource]:
  """Returns what makes a classifier's inputs of labelled texts or images."""
  pooled = d.name in POOLED
  label_key = "label" if pooled else d.label_key
  if tokenizer is None:
    return functools.partial(
      data_lib.images_labelled,
      num_classes=config.num_classes,
      shape=models.image_shape(config),
      image_key="x" if pooled else d.image_key,
      label_key=label_key,
    )
  return functools.partial(
    data_lib.tokenize_labelled,
    tokenizer=tokenizer,
    sequence_length=d.sequence_length,
    num_classes=config.num_classes,
    text_key="text" if pooled else d.text_key,
    label_key=label_key,
  )


def _pairs(
  d: DataSettings, tokenizer: data_lib.Tokenizer | None, config: Any
) -> Callable[[data_lib.ClientSource], data_lib.ClientSource]:
  """Returns what makes pairs of images and texts numeric."""
  return functools.partial(
    data_lib.image_text_pairs,
    shapes=image_text.Shapes(
      models.image_shape(config), config.vocab_size, config.eos_id
    ),
    sequence_length=d.sequence_length,
    tokenizer=tokenizer,
    image_key="x" if d.name in POOLED else d.image_key,
    text_key=d.token_key or d.text_key,
  )


def _tokenizer(path: str) -> data_lib.Tokenizer:
  """Loads a tokenizer, once while its files stay: it remembers words."""
  folder = pathlib.Path(path)
  files = [folder] if folder.is_file() else sorted(folder.glob("*tok*"))
  return _tokenizer_as_of(path, tuple(f.stat().st_mtime_ns for f in files))


@functools.lru_cache(maxsize=1)
def _tokenizer_as_of(
  path: str, modified: tuple[int, ...]
) -> data_lib.Tokenizer:
  del modified
  return data_lib.load_tokenizer(path)


def few_clients(
  source: data_lib.ClientSource, max_clients: int
) -> data_lib.ClientSource:
  """Keeps at most `max_clients` (0: all), evenly spaced in the order of ids."""
  if not 0 < max_clients < len(source):
    return source
  ids = sorted(source.ids)
  at = np.linspace(0, len(ids) - 1, max_clients).round().astype(int)
  return data_lib.subset(source, [ids[i] for i in at])


def repartition(
  source: data_lib.ClientSource, settings: DataSettings, seed: int
) -> data_lib.ClientSource:
  """Deals the training examples out to other clients, where asked to.

  Args:
    source: The natural clients.
    settings: `partition`, and what it takes.
    seed: The run's seed.

  Returns:
    `source` itself for "natural"; else clients of the pooled examples, as many
    as `num_clients` says or as there were. "iid" keeps the natural sizes then,
    so that only what the clients hold differs. "merged" joins whole clients.
    A `label_key` that is `client_key` labels rows by their natural client; one
    of text has a label a text.

  Raises:
    ConfigError: As in `data.partition`, under the field's full name.
  """
  try:
    return _partition(source, settings, seed)
  except errors.ConfigError as e:
    if hasattr(settings, str(e).partition(":")[0]):
      raise errors.ConfigError(f"data.{e}") from None
    raise


def _partition(
  source: data_lib.ClientSource, settings: DataSettings, seed: int
) -> data_lib.ClientSource:
  d = settings
  if d.partition == "natural":
    return source
  count = d.num_clients or len(source)
  if d.partition == "merged":
    return partition.merged(source, count)
  read = [source.read(client_id) for client_id in source.ids]
  pool = {name: np.concatenate([x[name] for x in read]) for name in read[0]}
  if d.label_key == d.client_key:
    sizes = [source.size(client_id) for client_id in source.ids]
    pool[d.label_key] = np.repeat(np.arange(len(source)), sizes)
  elif pool.get(d.label_key, np.zeros(0)).dtype == object:
    pool[d.label_key] = np.unique(pool[d.label_key], return_inverse=True)[1]
  if d.partition == "dirichlet":
    return partition.dirichlet(pool, count, d.alpha, d.label_key, seed)
  if d.partition == "shards":
    return partition.shards(pool, count, d.shards, d.label_key, seed)
  sizes = None if d.num_clients else [source.size(i) for i in source.ids]
  return partition.iid(pool, count, seed, sizes)
