"""Safetensors files: checked before any weight is read, written one by one."""

from collections.abc import Iterable, Mapping
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from fedfm import errors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {
  "F64": "float64",
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
}
# NumPy files may hold pickled objects.
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".npy", ".npz")
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03")


class TensorEntry(NamedTuple):
  """A tensor in an open file.

  Attributes:
    path: The file.
    name: Its name there.
    shape: Its shape there.
    dtype: Name of its dtype, a float.
    handle: The open file.
  """

  path: pathlib.Path
  name: str
  shape: tuple[int, ...]
  dtype: str
  handle: Any

  def read(self, index: tuple[slice, ...]) -> np.ndarray:
    """Copies one slice out of the file."""
    return self.handle.get_slice(self.name)[index]


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object in which no name is given twice.

  Args:
    path: The file.

  Returns:
    The object.

  Raises:
    CheckpointError: No such file, or not such an object.
  """
  if not path.is_file():
    raise errors.CheckpointError(f"{path}: no such file")
  return _parse(path, path.read_bytes())


def open_folder(directory: pathlib.Path) -> dict[str, TensorEntry]:
  """Opens `model.safetensors`, or the shards that its index names.

  Args:
    directory: The folder.

  Returns:
    Name -> tensor, over all files.

  Raises:
    CheckpointError: Nothing to read, or a file that cannot be trusted.
  """
  single, index = directory / SINGLE, directory / INDEX
  if single.exists() and index.exists():
    raise errors.CheckpointError(
      f"{directory}: holds both {SINGLE} and {INDEX}; keep one"
    )
  if single.exists():
    return open_file(single)
  if not index.exists():
    pickles = [p.name for p in directory.iterdir() if p.suffix in _PICKLES]
    if pickles:
      raise refuse_pickle(directory / min(pickles))
    raise errors.CheckpointError(
      f"{directory}: found neither {SINGLE} nor {INDEX}"
    )
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise errors.CheckpointError(f"{index}: expected an object weight_map")
  entries: dict[str, TensorEntry] = {}
  for file in sorted({str(file) for file in weight_map.values()}):
    if (
      file in ("", ".", "..") or file != os.path.basename(file) or "\\" in file
    ):
      raise errors.CheckpointError(
        f"{index}: weight_map names {file!r}, expected a file of its folder"
      )
    for name, entry in open_file(directory / file).items():
      if name in entries:
        raise errors.CheckpointError(
          f"{entry.path}: tensor {name} is in {entries[name].path.name} too"
        )
      entries[name] = entry
  for name, file in weight_map.items():
    if name not in entries or entries[name].path.name != file:
      raise errors.CheckpointError(
        f"{index}: weight_map puts tensor {name} in {file}, it is not there"
      )
  return entries


def write_file(
  path: pathlib.Path,
  layout: Mapping[str, tuple[str, tuple[int, ...]]],
  values: Iterable[np.ndarray],
) -> None:
  """Writes one safetensors file, a tensor at a time.

  Args:
    path: The file.
    layout: Name -> (dtype, shape), all known before the first value is made.
    values: The tensors, in that order.
  """
  codes = {dtype: code for code, dtype in _DTYPES.items()}
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, (dtype, shape) in layout.items():
    begin = end
    end += math.prod(shape) * jnp.dtype(dtype).itemsize
    header[name] = {
      "dtype": codes[dtype],
      "shape": list(shape),
      "data_offsets": [begin, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # The data is aligned.
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for (name, (dtype, shape)), value in zip(
      layout.items(), values, strict=True
    ):
      assert (value.dtype.name, value.shape) == (dtype, shape), name
      # In the layout's order: a transposed view is copied.
      flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
      file.write(flat.data)


def open_file(path: pathlib.Path) -> dict[str, TensorEntry]:
  """Opens one file: its header by hand, its offsets by safetensors.

  Args:
    path: The file.

  Returns:
    Name -> tensor.

  Raises:
    CheckpointError: A pickle, or a file that is damaged or has other dtypes.
  """
  if path.suffix in _PICKLES:
    raise refuse_pickle(path)
  if not path.is_file():
    raise errors.CheckpointError(f"{path}: no such file")
  with path.open("rb") as f:
    start = f.read(8)
    length = int.from_bytes(start, "little")
    size = path.stat().st_size
    if len(start) < 8 or length > size - 8:
      # A header of 640 bytes begins like a pickle too, but is in the file.
      if start.startswith(_PICKLE_STARTS):
        raise refuse_pickle(path)
      raise errors.CheckpointError(
        f"{path}: truncated or no safetensors file ({size} bytes)"
      )
    header = _parse(path, f.read(length))  # The library keeps the last twin.
  try:
    handle = safetensors.safe_open(path, framework="np")
  except (safetensors.SafetensorError, OSError) as e:
    raise errors.CheckpointError(
      f"{path}: truncated or damaged: {' '.join(str(e).split())}"
    ) from None
  entries = {}
  for name, entry in header.items():
    if name == "__metadata__":
      continue
    if name.endswith("position_ids") and entry["dtype"] == "I64":
      continue  # Old files of encoders spell 0, 1, 2, ... out.
    if entry["dtype"] not in _DTYPES:
      raise errors.CheckpointError(
        f"{path}: tensor {name} is {entry['dtype']}, expected one of "
        f"{', '.join(_DTYPES)}"
      )
    entries[name] = TensorEntry(
      path, name, tuple(entry["shape"]), _DTYPES[entry["dtype"]], handle
    )
  return entries


def refuse_pickle(path: pathlib.Path) -> errors.CheckpointError:
  """Builds the error to raise for pickled weights."""
  return errors.CheckpointError(
    f"{path}: pickled weights can run code and are not read; convert them to "
    "safetensors"
  )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Builds a JSON object; a name given twice is an error."""
  result = dict(pairs)
  if len(result) != len(pairs):
    seen = set()
    for name, _ in pairs:
      if name in seen:
        raise ValueError(f"{name!r} is given twice")
      seen.add(name)
  return result


def _parse(path: pathlib.Path, text: bytes) -> dict[str, Any]:
  try:
    value = json.loads(text, object_pairs_hook=_unique)
  except (ValueError, RecursionError) as e:
    raise errors.CheckpointError(f"{path}: bad JSON: {e}") from None
  if not isinstance(value, dict):
    raise errors.CheckpointError(f"{path}: expected a JSON object")
  return value


def make_folder(directory: pathlib.Path) -> None:
  """Makes a folder to write to, where there is none yet.

  Args:
    directory: The folder.

  Raises:
    CheckpointError: It cannot be made: there is a file, say.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise errors.CheckpointError(
      f"{directory}: no folder to write to: {e.strerror}"
    ) from None
