r"""Lists, verifies and exports the checkpoints of a run.

  python scripts/checkpoint.py list --workdir=/tmp/run
  python scripts/checkpoint.py verify --workdir=/tmp/run
  python scripts/checkpoint.py export --workdir=/tmp/run --output=/tmp/model

`verify` reads every array, and the states of clients that are kept on the host,
and compares their digests; it ends with exit code 2 if one differs. `export`
merges the adapter into the base and writes a Hugging Face folder, as export.py
does; `--config.FIELD=VALUE` changes a field of the run's config, such as the
mesh.
The run's folder is only read, so that this may run beside the training.
"""

import contextlib
import pathlib
from typing import Any

from absl import flags

import command_line
from fedfm import checkpoint, errors, experiment, hosting, report
import output_folder

_WORKDIR = flags.DEFINE_string("workdir", None, "Run's folder.", required=True)
_ROUND = flags.DEFINE_integer("round", None, "Round; default all, or newest.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder that `export` writes.")


def list_checkpoints(reader: checkpoint.Checkpointer, folder: pathlib.Path):
  """Prints a row a round, from the manifests alone."""
  rows: list[dict[str, Any]] = []
  for round in reader.all_rounds():
    row: dict[str, Any] = {"round": round}
    try:
      manifest = reader.manifest(round)
    except errors.CheckpointError as e:
      rows.append(row | {"saved": f"damaged: {e}"})
      continue
    base = manifest["run"].get("base")
    rows.append(
      row
      | {
        "saved": manifest["saved"],
        "arrays": len(manifest["leaves"]),
        "megabytes": megabytes(folder / str(round)),
        "best by": manifest["extra"].get("score"),
        "jax": manifest["versions"]["jax"],
        "base": base["digest"][:19] if base else "in it",
      }
    )
  command_line.show(report.table(rows) if rows else "no checkpoint")
  for name in reader.set_aside():
    command_line.show(f"set aside: {folder / name}")
  store = folder.parent / hosting.FOLDER
  if store.is_dir():
    command_line.show(f"clients' states: {store}, {megabytes(store):.3g} MB")


def megabytes(folder: pathlib.Path) -> float:
  """What the files take, without the holes in them, as far as they stay."""
  blocks = 0
  with contextlib.suppress(FileNotFoundError):  # A run beside may delete.
    for path in folder.rglob("*"):
      blocks += path.stat().st_blocks if path.is_file() else 0
  return blocks * 512 / 1e6


def verify(reader: checkpoint.Checkpointer, workdir: pathlib.Path):
  """Reads whole checkpoints; raises CheckpointError for damaged ones."""
  rounds = reader.all_rounds() if _ROUND.value is None else [_ROUND.value]
  damaged = []
  for round in rounds:
    try:
      arrays = reader.verify(round)
      half: list[str] = []
      if (workdir / hosting.FOLDER).is_dir():
        _, half = hosting.verify(workdir, int(arrays["clients"]))
      for problem in half:
        command_line.show(f"round {round}: the other copy is whole: {problem}")
      if not half:
        command_line.show(f"round {round}: every digest is right")
    except errors.CheckpointError as e:
      if _ROUND.value is None and round not in reader.all_rounds():
        command_line.show(f"round {round}: was deleted meanwhile")
        continue
      if not isinstance(e, checkpoint.DamagedError):
        raise
      damaged.append(round)
      command_line.show(f"round {round}: damaged: {e}")
  if damaged or not rounds:
    raise errors.CheckpointError(
      f"workdir: {_WORKDIR.value}: {len(damaged)} of {len(rounds)} checkpoints "
      f"are damaged: {damaged}"
    )


def export():
  """Writes a Hugging Face folder."""
  if _OUTPUT.value is None:
    raise errors.ConfigError("--output: got none, expected a folder to write")
  folder = output_folder.check_new("--output", _OUTPUT.value)
  run, state = experiment.open_run(
    _WORKDIR.value, command_line.overrides(), _ROUND.value
  )
  output_folder.write_merged(folder, run, state)
  command_line.show(f"round {int(state.round)} written to {folder}")


def main(command: str):
  if command == "export":
    export()
    return
  workdir = command_line.check_path("--workdir", _WORKDIR.value)
  folder = workdir / "checkpoints"
  with checkpoint.Checkpointer(folder, read_only=True) as reader:
    if command == "list":
      list_checkpoints(reader, folder)
    else:
      verify(reader, workdir)


if __name__ == "__main__":
  command_line.run(main, ("list", "verify", "export"))
