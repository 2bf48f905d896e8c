"""Compressors of messages, up and down; what is received, and what it takes."""

from fedfm.compression.compressor import error_feedback, uplink
from fedfm.compression.powersgd import power_sgd
from fedfm.compression.quantise import bfloat16, e3m0, int4, int8
from fedfm.compression.rotation import rotation
from fedfm.compression.sign import sign
from fedfm.compression.sparsify import random_k, top_k

__all__ = [
  "bfloat16",
  "e3m0",
  "error_feedback",
  "int4",
  "int8",
  "power_sgd",
  "random_k",
  "rotation",
  "sign",
  "top_k",
  "uplink",
]
