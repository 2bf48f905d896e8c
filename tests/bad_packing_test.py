"""Packing: bad clients and options end with one line."""

import dataclasses

import numpy as np
import pytest
import reference

from fedfm import data, errors


def misread(fields):
  """A source whose second client reads as something else."""
  good = reference.numbered([3, 3])
  return dataclasses.replace(
    good, read_fn=lambda c: fields if c == "client 1" else good.read(c)
  )


IDS = ["client 0", "client 1"]
X = np.ones((3, 2), np.float32)
NUMBERS = np.arange(3, dtype=np.int32)


@pytest.mark.parametrize(
    ("source", "ids", "options", "error", "words"),
    [
        (None, ["client 0"] * 2, {}, errors.DataError, ["client 0", "twice"]),
        (None, ["client 9"], {}, errors.DataError, ["client 9"]),
        (None, IDS, {"lanes": 0}, errors.ConfigError, ["lanes", "0"]),
        (None, IDS, {"lanes": -2}, errors.ConfigError, ["lanes", "-2"]),
        (None, IDS, {"lanes": 1.5}, errors.ConfigError, ["lanes", "1.5"]),
        (None, IDS, {"lanes": True}, errors.ConfigError, ["lanes", "True"]),
        (None, IDS, {"lanes": "many"}, errors.ConfigError, ["lanes", "many"]),
        (
            None, IDS, {"lanes": 3, "process_count": 2},
            errors.ConfigError, ["lanes", "3", "2"],
        ),
        (
            None, IDS, {"lanes": "auto", "process_count": 999},
            errors.ConfigError, ["lanes", "999"],
        ),
        (
            None, IDS, {"own_lanes": [0, 2]},
            errors.ConfigError, ["own_lanes", "2", "0 to 1"],
        ),
        (
            None, IDS, {"own_lanes": [1, 0]},
            errors.ConfigError, ["own_lanes", "[1, 0]", "ascending"],
        ),
        (
            None, IDS, {"own_lanes": [0], "lanes": "auto"},
            errors.ConfigError, ["lanes", "'auto'", "own_lanes"],
        ),
        (
            None, IDS, {"own_lanes": [0], "process_count": 2},
            errors.ConfigError, ["process_count", "2", "own_lanes"],
        ),
        (
            None, IDS, {"process_count": 2, "process_index": 2},
            errors.ConfigError, ["process_index", "2"],
        ),
        (None, IDS, {"batch_size": 0}, errors.ConfigError, ["batch_size", "0"]),
        (None, IDS, {"batch_size": 2.5}, errors.ConfigError, ["batch_size"]),
        (None, IDS, {"batch_size": "4"}, errors.ConfigError, ["batch_size"]),
        (None, IDS, {"epochs": 0}, errors.ConfigError, ["epochs", "0"]),
        (None, IDS, {"epochs": 0.5}, errors.ConfigError, ["epochs", "0.5"]),
        (None, IDS, {"local_steps": 0}, errors.ConfigError, ["local_steps"]),
        (None, IDS, {"max_examples": 0}, errors.ConfigError, ["max_examples"]),
        (None, IDS, {"seed": -1}, errors.ConfigError, ["seed", "-1"]),
        (None, IDS, {"seed": 2**32}, errors.ConfigError, ["seed"]),
        (
            data.from_arrays({"client 0": {"text": ["a", "b"]}}),
            ["client 0"], {}, errors.DataError, ["text", "token"],
        ),
        (
            data.from_arrays({"client 0": {"mask": [1.0]}}),
            ["client 0"], {}, errors.DataError, ["mask"],
        ),
        (misread({"id": NUMBERS}), IDS, {}, errors.DataError, ["client 1"]),
        (
            misread({"id": NUMBERS, "x": X[:, :1]}),
            IDS, {}, errors.DataError, ["client 1", "'x'"],
        ),
        (
            misread({"id": NUMBERS, "x": X.astype(np.float64)}),
            IDS, {}, errors.DataError, ["client 1", "'x'", "float64"],
        ),
        (
            misread({"id": NUMBERS[:2], "x": X[:2]}),
            IDS, {}, errors.DataError, ["client 1", "2", "3"],
        ),
        (
            misread({"id": np.arange(4, dtype=np.int32), "x": X}),
            IDS, {}, errors.DataError, ["client 1", "4", "3"],
        ),
    ],
)  # fmt: skip
def test_bad_input_ends_with_one_line(source, ids, options, error, words):
  source = reference.numbered([3, 3]) if source is None else source
  with pytest.raises(error) as raised:
    data.pack(source, ids, **{"batch_size": 2, "lanes": 2} | options)
  message = str(raised.value)
  assert "\n" not in message
  for word in words:
    assert word in message
