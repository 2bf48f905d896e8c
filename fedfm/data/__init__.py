"""Populations of clients, and how their data reaches the device."""

from fedfm.data import (
  continual,
  id_file,
  indexed,
  partition,
  python_stdlib,
  realism,
  resident,
  sampling,
)
from fedfm.data.files import from_files, from_jsonl, from_tfds
from fedfm.data.image_text import image_text_pairs
from fedfm.data.indexed import from_indexed_jsonl
from fedfm.data.instructions import instruct
from fedfm.data.labelled import (
  check_labels,
  from_npz,
  images_labelled,
  sentence_polarity,
  tokenize_labelled,
)
from fedfm.data.packing import pack
from fedfm.data.source import (
  ClientSource,
  FederatedData,
  from_arrays,
  spread,
  subset,
  union,
)
from fedfm.data.text import tokenize
from fedfm.data.tokenizer_files import load_tokenizer
from fedfm.data.tokenizers import Tokenizer, byte_tokenizer

__all__ = [
  "ClientSource",
  "FederatedData",
  "Tokenizer",
  "byte_tokenizer",
  "check_labels",
  "continual",
  "from_arrays",
  "from_files",
  "from_indexed_jsonl",
  "from_jsonl",
  "from_npz",
  "from_tfds",
  "image_text_pairs",
  "images_labelled",
  "id_file",
  "indexed",
  "instruct",
  "load_tokenizer",
  "pack",
  "partition",
  "python_stdlib",
  "realism",
  "resident",
  "sampling",
  "sentence_polarity",
  "spread",
  "subset",
  "tokenize",
  "tokenize_labelled",
  "union",
]
