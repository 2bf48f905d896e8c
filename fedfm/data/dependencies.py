"""Public text to pre-train on: the sources of installed dependencies.

Python, but also C and C++ headers, Cython, type stubs and documents: a base
knows more than the domain that it is federated in. Nothing of the standard
library may be among them, as it is what the quickstart federates and evaluates
on: files that share more than a few lines with it (old copies, backports,
vendored modules) are left out.
"""

from collections.abc import Iterable
import hashlib
import importlib.metadata
import pathlib
import sysconfig

PYTHON = (".py",)
OTHER_TEXT = (
  ".c", ".cc", ".css", ".f90", ".h", ".hpp", ".html", ".js", ".md", ".proto",
  ".pxd", ".pxi", ".pyi", ".pyx", ".rst", ".txt",
)  # fmt: skip
_SHINGLE_LINES = 3
_MIN_BYTES = 512
_MAX_BYTES = 200_000
# Backports of, and references to, the standard library under another name.
_EXCLUDED = ("importlib_", "backports", "typing_extensions", "zipp", "tomli")


def shingles(text: str) -> set[int]:
  """Hashes each run of three non-trivial lines, white space stripped.

  Args:
    text: A source file.

  Returns:
    64-bit hashes.
  """
  lines = [line.strip() for line in text.splitlines()]
  lines = [line for line in lines if len(line) > 12]
  runs = zip(*(lines[i:] for i in range(_SHINGLE_LINES)))
  return {
    int.from_bytes(
      hashlib.blake2b("\n".join(run).encode(), digest_size=8).digest(),
      "little",
    )
    for run in runs
  }


def source_files(
  distributions: Iterable[str] | None = None,
  suffixes: Iterable[str] = PYTHON,
) -> list[tuple[str, str, str]]:
  """Reads the text files of installed distributions, without duplicates.

  Args:
    distributions: Names of distributions; default all that are installed.
    suffixes: Endings of the files to read.

  Returns:
    A list of (distribution, path, text), sorted; UTF-8 files of 512 bytes to
    200 kB only, as larger ones are mostly generated tables.
  """
  if distributions is None:
    distributions = {
      d.metadata["Name"] for d in importlib.metadata.distributions()
    }
  suffixes = tuple(suffixes)
  found, seen = [], set()
  for name in sorted(distributions):
    for path in importlib.metadata.files(name) or ():
      if path.suffix not in suffixes or any(
        p.startswith(_EXCLUDED) for p in path.parts
      ):
        continue
      file = pathlib.Path(str(path.locate()))
      if not file.is_file():
        continue
      raw = file.read_bytes()
      digest = hashlib.blake2b(raw).digest()
      if digest in seen or not _MIN_BYTES <= len(raw) <= _MAX_BYTES:
        continue
      seen.add(digest)
      try:
        found.append((name, str(path), raw.decode("utf-8")))
      except UnicodeDecodeError:
        continue
  return sorted(found)


def standard_library_texts() -> list[str]:
  """Reads all of the running Python's standard library, its tests included.

  Returns:
    The texts of its source files; undecodable bytes are dropped.
  """
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  return [
    path.read_text(encoding="utf-8", errors="ignore")
    for path in sorted(root.rglob("*.py"))
    if "site-packages" not in path.parts
  ]


def without_copies(
  files: list[tuple[str, str, str]],
  protected: Iterable[str],
  max_shared: float = 0.05,
) -> tuple[list[tuple[str, str, str]], list[str]]:
  """Leaves out files that share runs of lines with protected texts.

  Args:
    files: (distribution, path, text).
    protected: Texts that must not be trained on.
    max_shared: Largest share of a file's three-line runs that may also stand in
      the protected texts.

  Returns:
    The files kept, and the paths of those left out.
  """
  known: set[int] = set()
  for text in protected:
    known |= shingles(text)
  kept, left_out = [], []
  for name, path, text in files:
    own = shingles(text)
    if own and len(own & known) / len(own) > max_shared:
      left_out.append(path)
    else:
      kept.append((name, path, text))
  return kept, left_out


def without_near_duplicates(
  files: list[tuple[str, str, str]], max_shared: float = 0.5
) -> list[tuple[str, str, str]]:
  """Leaves out files that mostly repeat those before them.

  Args:
    files: (distribution, path, text); the first of near-duplicates stays.
    max_shared: Largest share of a file's three-line runs that may also stand in
      the files kept before it.

  Returns:
    The files kept, in order.
  """
  known: set[int] = set()
  kept = []
  for file in files:
    own = shingles(file[2])
    if own and len(own & known) / len(own) > max_shared:
      continue
    known |= own
    kept.append(file)
  return kept
