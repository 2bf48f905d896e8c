"""Holds the layers: which part of fedfm may import which, and what else."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "fedfm"
MAX_LINES = 400
BANNED_NAMES = {"utils", "util", "common", "helpers", "misc"}

# Each part with the parts that it may import; an import only points up here.
_CORE = {"errors", "types", "trees", "sharding", "sums"}
_LOCAL = _CORE | {"models", "adapters", "clients"}
_FEDERATED = _LOCAL | {"aggregators", "compression", "privacy"}
_STUDIES = _FEDERATED | {"algorithms"}
_RECORDS = {"errors", "types", "trees", "sharding", "run_folder"}
ALLOWED = {
  "errors": set(),
  "trees": set(),
  "sums": set(),
  "types": {"errors", "trees"},
  "sharding": {"errors", "trees"},
  "models": _CORE,
  "model_flops": {"types", "trees", "models"},
  "adapters": _CORE | {"models"},
  "clients": _CORE | {"models", "adapters"},
  "aggregators": _LOCAL,
  "compression": _LOCAL,
  "privacy": _LOCAL,
  "algorithms": _FEDERATED,
  "attacks": _STUDIES,
  "audit": _STUDIES,
  "ownership": _STUDIES,
  "contribution": _STUDIES,
  "completion": {"errors", "data", "models"},
  "questions": {
    "errors",
    "types",
    "sharding",
    "data",
    "models",
    "completion",
  },
  "evaluation": _FEDERATED | {"report"},
  "data": {"errors", "types"},
  "run_folder": {"errors"},
  "run_log": {"errors", "metrics"},
  "goodput": set(),
  "guard": set(),
  "interruption": set(),
  "processes": {"errors"},
  "checkpoint": _RECORDS,
  "model_folders": {"errors", "sharding", "models", "checkpoint"},
  "metrics": _RECORDS,
  "report": _RECORDS | {"metrics"},
  "prefetch": set(),
}
# The experiment's own parts may import everything above, and each other.
EXPERIMENT = {
  "arm_runs",
  "assembly",
  "baselines",
  "blueprint",
  "choices",
  "comparison",
  "comparison_checks",
  "data_files",
  "dispatch",
  "experiment",
  "host_memory",
  "hosting",
  "ledger",
  "optimizers",
  "participation",
  "personalization",
  "planning",
  "population",
  "protection",
  "recording",
  "rounds",
  "settings",
}
SCALING = {"scaling"}
# Who may import a third-party package; every other package is open to all.
ONLY = {
  "flax": {"models", "adapters"},
  "orbax": {"checkpoint"},
  "tensorflow_datasets": {"data"},
  "array_record": {"data"},
  "ml_collections": {"experiment"},
  "absl": {"experiment"},
  "dp_accounting": {"privacy"},
  "chex": set(),
  "tensorflow": set(),
  "torch": set(),
}


def python_files(*folders):
  return sorted(
    path for folder in folders for path in (ROOT / folder).rglob("*.py")
  )


def part_of(path):
  """The part of fedfm that a file belongs to: a module or a subpackage."""
  first = path.relative_to(PACKAGE).parts[0]
  return first.removesuffix(".py")


def imports(path):
  """Yields the dotted names that a file imports, in functions too."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: relative import"
      for alias in node.names:
        yield f"{node.module}.{alias.name}"
    elif isinstance(node, ast.Call):
      name = ast.unparse(node.func)
      constant = node.args and isinstance(node.args[0], ast.Constant)
      if constant and name in ("importlib.import_module", "__import__"):
        yield node.args[0].value


PARTS = {part_of(p) for p in python_files("fedfm")} - {"__init__"}


def allowed_parts(part):
  if part in ALLOWED:
    return ALLOWED[part]
  everything = set(ALLOWED) | EXPERIMENT
  return everything | SCALING if part in SCALING else everything


def test_every_part_has_a_layer():
  unknown = PARTS - set(ALLOWED) - EXPERIMENT - SCALING
  assert not unknown, f"give these a row in {__file__}: {sorted(unknown)}"


def test_table_has_no_cycle():
  done = set()
  while len(done) < len(ALLOWED):
    ready = {p for p, to in ALLOWED.items() if to <= done} - done
    assert ready, f"cycle among {set(ALLOWED) - done}"
    done |= ready


@pytest.mark.parametrize("part", sorted(PARTS))
def test_imports_point_left(part):
  for path in python_files("fedfm"):
    if part_of(path) != part:
      continue
    for name in imports(path):
      first, *rest = name.split(".")
      if first == "fedfm" and rest:
        target = rest[0]
        assert target in PARTS, f"{path}: imports {name} of the package itself"
        ok = target == part or target in allowed_parts(part)
        assert ok, f"{path}: {part} may not import {target}"
      elif first in ONLY:
        assert part in ONLY[first], f"{path}: {part} may not import {first}"


def test_scripts_and_configs_are_not_imported():
  for path in python_files("fedfm"):
    for name in imports(path):
      assert name.split(".")[0] not in ("scripts", "configs", "tests"), path


def test_scripts_leave_orbax_and_flax_to_the_package():
  for path in python_files("scripts", "configs"):
    for name in imports(path):
      assert name.split(".")[0] not in ("flax", "orbax"), path


@pytest.mark.parametrize("folder", ["fedfm", "scripts", "configs", "tests"])
def test_files_are_short_and_well_named(folder):
  for path in python_files(folder):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path}: {lines} lines, at most {MAX_LINES}"
    parts = path.relative_to(ROOT).with_suffix("").parts
    words = {word for part in parts for word in part.split("_")}
    assert not words & BANNED_NAMES, path
    assert "lib" not in words, path


@pytest.mark.parametrize(
  "name", ["flax", "orbax", "tensorflow_datasets", "ml_collections"]
)
def test_the_walk_finds_what_is_there(name):
  found = {n.split(".")[0] for p in python_files("fedfm") for n in imports(p)}
  assert name in found
