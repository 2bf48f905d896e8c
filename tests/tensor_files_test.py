"""Folders of safetensors files: whole ones open, damaged ones are refused."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from fedfm import errors
from fedfm.models import tensor_files

VALUES = {
  "a": np.arange(12, dtype=np.float32).reshape(3, 4),
  "b": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
  "c": np.arange(5, dtype=np.float16),
  "d": np.arange(4, dtype=np.float64),
}
SHARDS = [
  "model-00001-of-00002.safetensors",
  "model-00002-of-00002.safetensors",
]


def write(folder):
  safetensors_numpy.save_file(VALUES, folder / tensor_files.SINGLE)


def write_index(folder, index):
  (folder / tensor_files.INDEX).write_text(json.dumps(index))


def write_shards(folder):
  weight_map = {name: SHARDS[i % 2] for i, name in enumerate(VALUES)}
  for file in SHARDS:
    part = {n: VALUES[n] for n, f in weight_map.items() if f == file}
    safetensors_numpy.save_file(part, folder / file)
  index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
  write_index(folder, index)
  return index


def refuse(folder, *words):
  with pytest.raises(errors.CheckpointError) as e:
    tensor_files.open_folder(folder)
  assert "\n" not in str(e.value)
  for word in words:
    assert word in str(e.value), str(e.value)


@pytest.mark.parametrize("write_fn", [write, write_shards])
def test_slices_are_read_as_they_are(tmp_path, write_fn):
  write_fn(tmp_path)
  entries = tensor_files.open_folder(tmp_path)
  assert entries.keys() == VALUES.keys()
  for name, want in VALUES.items():
    entry = entries[name]
    assert (entry.shape, entry.dtype) == (want.shape, want.dtype.name)
    for index in (slice(0, 2), slice(1, 2), slice(1, None), slice(None)):
      got = entry.read((index,) * want.ndim)
      assert got.dtype == want.dtype
      np.testing.assert_array_equal(got, want[(index,) * want.ndim])


def test_links_to_files_elsewhere_are_followed(tmp_path):
  # Hugging Face's cache: a snapshot is a folder of links to blobs.
  blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
  blobs.mkdir(), snapshot.mkdir()
  write(blobs)
  (snapshot / tensor_files.SINGLE).symlink_to(blobs / tensor_files.SINGLE)
  assert tensor_files.open_folder(snapshot).keys() == VALUES.keys()


def test_empty_folder_is_refused(tmp_path):
  refuse(tmp_path, "neither", "model.safetensors")


def raw(header, data):
  header = header.encode()
  return struct.pack("<Q", len(header)) + header + data


ENTRY = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
INTEGERS = '"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
  "content,words",
  [
    (b"", ["truncated"]),
    (b"\x01\x00", ["truncated"]),
    (struct.pack("<Q", 1 << 40) + b"{}", ["truncated"]),
    (b"\x80\x04\x95" + bytes(100), ["pickle"]),
    (b"PK\x03\x04" + bytes(100), ["pickle"]),
    (raw("{" + ENTRY + "}", bytes(3)), ["truncated or damaged"]),
    (raw("{" + ENTRY + "}", bytes(5)), ["truncated or damaged"]),
    (raw("{" + ENTRY + "," + ENTRY + "}", bytes(4)), ["'a' is given twice"]),
    (raw('{"a":{"shape":[1],"shape":[2]}}', b""), ["'shape' is given twice"]),
    (raw('{"a":{"dtype":"F32"}}', b""), ["damaged"]),
    (raw("{" + INTEGERS + "}", bytes(4)), ["I32", "BF16"]),
    (raw("{nonsense}", b""), ["JSON"]),
    (raw("[]", b""), ["object"]),
    (raw("\x00", b""), ["JSON"]),
  ],
)
def test_damaged_files_are_refused(tmp_path, content, words):
  (tmp_path / tensor_files.SINGLE).write_bytes(content)
  refuse(tmp_path, "model.safetensors", *words)


def test_every_truncation_is_refused(tmp_path):
  write(tmp_path)
  path = tmp_path / tensor_files.SINGLE
  content = path.read_bytes()
  for size in range(len(content)):
    path.write_bytes(content[:size])
    refuse(tmp_path, "model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_by_name(tmp_path, name):
  write(tmp_path)
  os.rename(tmp_path / tensor_files.SINGLE, tmp_path / name)
  refuse(tmp_path, name, "pickle", "safetensors")


@pytest.mark.parametrize(
  "file,words",
  [
    ("../" + SHARDS[0], ["../model", "its folder"]),
    ("/etc/passwd", ["/etc/passwd", "its folder"]),
    ("..", ["'..'", "its folder"]),
    ("", ["''", "its folder"]),
    (3, ["3", "no such file"]),
    ("pytorch_model.bin", ["pytorch_model.bin", "pickle"]),
    ("model-00003-of-00002.safetensors", ["00003", "no such file"]),
  ],
)
def test_bad_index_is_refused(tmp_path, file, words):
  index = write_shards(tmp_path)
  index["weight_map"]["a"] = file
  write_index(tmp_path, index)
  refuse(tmp_path, *words)


def test_index_without_files_is_refused(tmp_path):
  for index in ({}, {"weight_map": {}}, {"weight_map": [1]}):
    write_index(tmp_path, index)
    refuse(tmp_path, "weight_map")


def test_index_and_shards_must_agree(tmp_path):
  index = write_shards(tmp_path)
  write_index(tmp_path, {"weight_map": index["weight_map"] | {"a": SHARDS[1]}})
  refuse(tmp_path, "tensor a", SHARDS[1], "not there")
  write_index(tmp_path, {"weight_map": index["weight_map"] | {"z": SHARDS[1]}})
  refuse(tmp_path, "tensor z", "not there")
  write_index(tmp_path, index)
  second = safetensors_numpy.load_file(tmp_path / SHARDS[1])
  safetensors_numpy.save_file(second | {"a": VALUES["a"]}, tmp_path / SHARDS[1])
  refuse(tmp_path, "tensor a is in", "too")
  (tmp_path / SHARDS[1]).unlink()
  refuse(tmp_path, SHARDS[1], "no such file")


def test_single_file_and_index_together_are_refused(tmp_path):
  write_shards(tmp_path)
  write(tmp_path)
  refuse(tmp_path, "both")
