"""The default data set: this Python's own standard library, by module.

Every installation has it, it is real text by many hands, and its clients are
as heavy-tailed as those of a federation: a client is a top-level module or
package (`json`, `argparse`, ...), its documents are source files. TFDS holds
it as ArrayRecord files, built without TensorFlow on first use, a set for each
Python release.
"""

from collections.abc import Iterator
import contextlib
import functools
import hashlib
import io
import os
import pathlib
import sys
import sysconfig
import tempfile
from typing import Any, ClassVar, NamedTuple

from fedfm import errors
from fedfm.data import files, source

NAME = "python_stdlib"
_VERSION = "1.0.0"
_MIN_CLIENT_BYTES = 4096
_BLOCK_BYTES = 2048
_HELD_OUT_SHARE = 0.2
_UNSEEN_SHARE = 0.15
# Tests and tools of Python's own, other people's packages, and build settings
# that differ from machine to machine.
_SKIPPED_FOLDERS = frozenset((
    "__pycache__", "_bundled", "dist-packages", "idlelib", "lib2to3",
    "site-packages", "test", "tests", "turtledemo",
))  # fmt: skip
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


class SourceFile(NamedTuple):
  """One file of the standard library."""

  client: str  # Top-level module or package.
  path: str  # Relative to the library, with forward slashes.
  text: str


def standard_library_files() -> list[SourceFile]:
  """Returns the files of the running Python's standard library, sorted.

  Tests, IDLE, lib2to3, installed packages and generated settings are left out,
  and files that are empty or not UTF-8.

  Returns:
    `(client, path, text)` for each file, of small modules too.

  Raises:
    DataError: There are none, as in a Python whose library is a zip file.
  """
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  result = []
  for path in sorted(root.rglob("*.py")):
    parts = path.relative_to(root).parts
    if any(
      part in _SKIPPED_FOLDERS or part.startswith(_SKIPPED_PREFIXES)
      for part in parts
    ):
      continue
    try:
      text = path.read_bytes().decode()
    except UnicodeDecodeError:
      continue
    if text:
      client = parts[0].removesuffix(".py")
      result.append(SourceFile(client, "/".join(parts), text))
  if not result:
    raise errors.DataError(f"{root}: no source files of the standard library")
  return result


def load(data_dir: str | os.PathLike | None = None) -> source.FederatedData:
  """Returns the data set as text, building it on first use (a few seconds).

  Args:
    data_dir: Where the built files are kept; default the environment variable
      `FEDFM_DATA_DIR`, else `~/.cache/fedfm`.

  Returns:
    Sources of the field `text`, bytes [documents]: `train`; `evals["seen"]`,
    about 20% of the train clients' text, held out; `evals["unseen"]`, all text
    of about 23 clients that are never trained on, the same on every Python.

  Raises:
    DataError: The folder cannot be written to, or its files are damaged.
  """
  root = pathlib.Path(
    data_dir or os.environ.get("FEDFM_DATA_DIR") or "~/.cache/fedfm"
  ).expanduser()
  config = _config_name()
  built = root / NAME / config / _VERSION
  if not built.exists():
    try:
      _build(root, built)
    except OSError as e:
      raise errors.DataError(
        f"{root}: cannot build the data set {NAME!r} here: {e.strerror or e}"
      ) from None

  def read(split: str) -> source.ClientSource:
    return files.from_tfds(
      f"{NAME}/{config}:{_VERSION}", split, "client", root, fields=["text"]
    )

  try:
    return source.FederatedData(
      train=read("train"),
      evals={"seen": read("heldout"), "unseen": read("unseen")},
    )
  except errors.DataError as e:
    raise errors.DataError(f"{built}: damaged, delete this folder: {e}") from e


def splits(library: list[SourceFile]) -> dict[str, list[SourceFile]]:
  """Splits the library into documents to train on and to evaluate on.

  Files are cut at line ends into blocks of about 2 kB. A block is held out
  if a hash of (client, path, number) says so, so the choice depends on nothing
  else; neighbours of the same split are one document.

  Args:
    library: As of `standard_library_files`.

  Returns:
    Documents of `train`, `heldout` and `unseen`, in the library's order.
    Clients below 4 kB, or of a single block, are left out.
  """
  clients: dict[str, list[SourceFile]] = {}
  for file in library:
    clients.setdefault(file.client, []).append(file)
  result: dict[str, list[SourceFile]] = {
    "train": [],
    "heldout": [],
    "unseen": [],
  }
  for client, own in clients.items():
    if sum(len(file.text.encode()) for file in own) < _MIN_CLIENT_BYTES:
      continue
    if _unit_hash("unseen clients", client) < _UNSEEN_SHARE:
      result["unseen"] += own
      continue
    blocks = {
      (file.path, number): block
      for file in own
      for number, block in enumerate(_blocks(file.text))
    }
    if len(blocks) < 2:
      continue
    held_out = _choose_held_out(client, list(blocks))
    for file in own:
      before = None
      for number, block in enumerate(_blocks(file.text)):
        split = "heldout" if (file.path, number) in held_out else "train"
        if split == before:
          document = result[split].pop()
          block = document.text + block
        result[split].append(SourceFile(client, file.path, block))
        before = split
  return result


def _choose_held_out(client: str, keys: list) -> set:
  """Returns the blocks to hold out: at least one, and never all."""
  score = {key: _unit_hash("block", client, *map(str, key)) for key in keys}
  ranked = sorted(keys, key=score.__getitem__)
  count = sum(x < _HELD_OUT_SHARE for x in score.values())
  return set(ranked[: min(max(count, 1), len(keys) - 1)])


def _blocks(text: str) -> list[str]:
  """Cuts text at line ends; blocks reach 2 kB but for a last of over 0.5 kB."""
  blocks, lines, size = [], [], 0
  for line in text.splitlines(keepends=True):
    lines.append(line)
    size += len(line.encode())
    if size >= _BLOCK_BYTES:
      blocks.append("".join(lines))
      lines, size = [], 0
  if lines and blocks and size < _BLOCK_BYTES // 4:
    blocks[-1] += "".join(lines)
  elif lines:
    blocks.append("".join(lines))
  return blocks


def _unit_hash(*parts: str) -> float:
  """Hashes strings to [0, 1), the same on every machine and Python."""
  digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
  return int.from_bytes(digest, "big") / 2**64


def _config_name() -> str:
  """Names the release, e.g. `cpython_3_12_1`: another has another library."""
  return f"{sys.implementation.name}_" + "_".join(
    map(str, sys.version_info[:3])
  )


@functools.cache
def _builder_class() -> type:
  """Defines the TFDS builder; a function as TFDS takes 0.7 s to import."""
  import tensorflow_datasets as tfds

  class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """The running Python's standard library, by module."""

    # Finding it would need importlib_resources, which TFDS does not install.
    code_path = None
    BUILDER_CONFIGS: ClassVar[list] = [
      tfds.core.BuilderConfig(name=_config_name(), version=_VERSION)
    ]

    def _info(self) -> tfds.core.DatasetInfo:
      text = tfds.features.Text()
      return tfds.core.DatasetInfo(
        builder=self,
        description=__doc__,
        features=tfds.features.FeaturesDict(
          {"client": text, "path": text, "text": text}
        ),
        disable_shuffling=True,
      )

    def _split_generators(self, dl_manager) -> dict[str, Any]:
      del dl_manager
      return {
        name: self._generate_examples(documents)
        for name, documents in splits(standard_library_files()).items()
      }

    def _generate_examples(
      self, documents: list[SourceFile]
    ) -> Iterator[tuple[int, dict[str, str]]]:
      for key, document in enumerate(documents):
        yield key, document._asdict()

  return PythonStdlib


def _build(root: pathlib.Path, built: pathlib.Path) -> None:
  """Builds in a private folder, then renames, as others may build as well."""
  root.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=".build-", dir=root) as folder:
    # TFDS prints and draws progress bars whatever it is told.
    with (
      contextlib.redirect_stdout(io.StringIO()),
      contextlib.redirect_stderr(io.StringIO()),
    ):
      builder = _builder_class()(data_dir=folder, file_format="array_record")
      builder.download_and_prepare()
    built.parent.mkdir(parents=True, exist_ok=True)
    try:
      os.rename(builder.data_dir, built)
    except OSError:
      # Another process was first; what it built is the same.
      if not built.exists():
        raise
