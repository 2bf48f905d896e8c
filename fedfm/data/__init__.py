"""Populations of clients, and how their data reaches the device."""

from fedfm.data import partition, python_stdlib, sampling
from fedfm.data.files import from_jsonl, from_tfds
from fedfm.data.packing import pack
from fedfm.data.source import (
  ClientSource,
  FederatedData,
  from_arrays,
  subset,
  union,
)
from fedfm.data.text import tokenize
from fedfm.data.tokenizers import Tokenizer, byte_tokenizer

__all__ = [
  "ClientSource",
  "FederatedData",
  "Tokenizer",
  "byte_tokenizer",
  "from_arrays",
  "from_jsonl",
  "from_tfds",
  "pack",
  "partition",
  "python_stdlib",
  "sampling",
  "subset",
  "tokenize",
  "union",
]
