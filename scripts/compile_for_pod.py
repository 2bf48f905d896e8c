r"""Compiles a config's round for TPU topologies, on a machine without.

  python scripts/compile_for_pod.py --config=configs/llama3_8b_lora.py \
    --topology=v5e:16x16

Needs libtpu (`pip install 'fedfm[tpu]'`), no TPU, no weights and no data. Says
what a chip's memory holds, what the round computes and sends, how long it
takes by the chip's published peaks, and what bounds it. A compilation takes
minutes. `--topologies=v5e:8x8,v5e:16x16,4*v5e:16x16` gives a scaling table.
"""

from collections.abc import Callable
import json
import pathlib
import re
from typing import Any

from absl import flags
import jax

import command_line
from fedfm import errors, experiment, settings
from fedfm.scaling import pod, report, tables, topology

_CONFIG = flags.DEFINE_string("config", None, "Config file.", required=True)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "Such as v5e:16x16, or 4*v5e:16x16 for four slices."
)
_SLICES = flags.DEFINE_integer(
  "slices", None, "Slices of the topology, where its name does not say it."
)
_TOPOLOGIES = flags.DEFINE_list(
  "topologies", None, "Several topologies, for a scaling table."
)
_WEAK = flags.DEFINE_bool(
  "weak", False, "Scale lanes and clients with the chips, from the first one."
)
_JSON = flags.DEFINE_string("json", None, "File for the reports as JSON.")
_HLO = flags.DEFINE_string("hlo", None, "Folder for the optimized programs.")


def main():
  # A TPU or GPU of this machine is not needed, and may be busy.
  jax.config.update("jax_platforms", "cpu")
  machines = _machines()
  values = command_line.load_config(_CONFIG.value)
  # Nothing is read; a config may leave it to the command line where data are.
  fields = values.setdefault("data", {})
  if isinstance(fields, dict):  # Anything else is refused below.
    fields.setdefault("path", "not_read")
  config = experiment.as_settings(values)
  rounds = [
    pod.build(_scaled(config, machine, machines[0]), machine)
    for machine in machines
  ]  # All are checked before the first is compiled.
  reports = []
  for one in rounds:
    command_line.show(f"compiling {_CONFIG.value} for {one.topology} ...")
    reports.append(report.compile_round(one, _keeper(one)))
    command_line.show(f"\n{tables.markdown(reports[-1])}\n")
  if _TOPOLOGIES.value:
    command_line.show(tables.scaling_table(reports))
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(reports, indent=2) + "\n")


def _keeper(one: pod.PodRound) -> Callable[[str], Any] | None:
  """Writes a program into --hlo, named after its topology."""
  if not _HLO.value:
    return None
  folder = pathlib.Path(_HLO.value)
  folder.mkdir(parents=True, exist_ok=True)
  name = re.sub(
    r"\W", "_", f"{pathlib.Path(_CONFIG.value).stem} {one.topology}"
  )
  return (folder / f"{name}.txt").write_text


def _machines() -> list[topology.Topology]:
  several, one = _TOPOLOGIES.value or [], _TOPOLOGY.value
  if bool(several) == bool(one):
    raise errors.ConfigError(
      "--topology: expected either --topology or --topologies"
    )
  names = several or [one or ""]
  return [topology.parse(name, _SLICES.value) for name in names]


def _scaled(
  config: settings.Settings,
  machine: topology.Topology,
  first: topology.Topology,
) -> settings.Settings:
  """Keeps lanes and clients a chip the same, where --weak asks for it."""
  if not _WEAK.value:
    return config
  values = settings.to_dict(config)
  for name in ("lanes", "clients_per_round"):
    if not isinstance(values[name], int):
      raise errors.ConfigError(
        f"{name}: got {values[name]!r}, expected a number with --weak"
      )
    values[name] = values[name] * machine.chips // first.chips
  return settings.from_dict(values)


if __name__ == "__main__":
  command_line.run(main)
