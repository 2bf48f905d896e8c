"""Markdown of the reports on compiled rounds."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedfm.report import table


def gib(num_bytes: float) -> str:
  """Bytes as text.

  Examples:
    >>> gib(3 << 29)
    '1.50 GiB'
  """
  return f"{num_bytes / (1 << 30):.2f} GiB"


def markdown(report: Mapping[str, Any]) -> str:
  """Formats a report of `compile_round` for people."""
  memory, seconds = report["memory"], report["seconds"]
  spent = report["compilation"]
  layout, flops = report["layout"], report["flops"]
  mesh = " x ".join(f"{k} {v}" for k, v in report["mesh"].items())
  unit = layout["unit"]
  length = f" x {layout['length']}" if unit == "tokens" else ""
  formula = flops["program"] / flops["formula"]
  unseen = flops["kernels_not_counted"]
  kernels = f"; {unseen} kernels are not counted" if unseen else ""
  alone = ("compute", "memory", "links", "network")
  rows = {
    "topology": f"{report['topology']}, {report['chips']} chips",
    "mesh": mesh,
    "parameters": f"{_count(report['parameters']['model'])}; trained "
    f"{report['parameters']['trainable'] / 1e6:.1f} M a client",
    "clients": f"{layout['num_clients']} on {layout['lanes']} lanes, "
    f"{layout['local_steps']} steps of {layout['rows']}{length} {unit}",
    "memory of a chip": f"{gib(memory['total'])} of {gib(memory['limit'])}: "
    f"arguments {gib(memory['arguments'])}, temporaries "
    f"{gib(memory['temporaries'])}",
    "FLOPs": f"{flops['program']:.3g}, {formula:.2f} of the formula's; useful "
    f"{flops['useful']:.3g}{kernels}",
    "if alone": ", ".join(f"{name} {seconds[name]:.3g} s" for name in alone),
    "round": f"{seconds['round']:.3g} s, {seconds['exposed']:.2g} s of it "
    f"waits for messages; bound by {report['bound']}; the compiler's own "
    f"estimate {seconds['round_by_compiler']:.3g} s",
    "utilization": f"{report['utilization']['model']:.0%} of peak (useful), "
    f"{report['utilization']['hardware']:.0%} (all that runs); "
    f"{report['utilization']['model_by_compiler']:.0%} by the compiler's",
    f"{unit}/s": f"{_speed(report):,.0f}",
    "compilation": f"{spent['seconds']:.0f} s here, "
    f"{spent['processor_seconds']:.0f} s of processors; the process's peak "
    f"{gib(spent['peak_bytes'])}",
  }
  largest = [
    {
      "GiB": round(b["bytes"] / (1 << 30), 3),
      "shape": b["shape"],
      "what": _short(b["what"]),
    }
    for b in memory["largest"]
  ]
  sent = [
    {
      "axes": c["axes"],
      "kind": c["kind"],
      "times": c["times"],
      "GB": round(c["bytes"] / 1e9, 3),
    }
    for c in report["collectives"]
  ]
  return "\n\n".join(
    [
      table([{"": name, "predicted": value} for name, value in rows.items()]),
      "Largest arrays on a chip:",
      table(largest),
      "Sent by a chip in a round:",
      table(sent),
    ]
  )


def scaling_table(reports: Sequence[Mapping[str, Any]]) -> str:
  """Formats reports on several topologies as one table.

  Args:
    reports: From `report.compile_round`; the speed of a chip is relative to
      the first.

  Returns:
    Markdown.
  """
  first = _speed(reports[0]) / reports[0]["chips"]
  return table(
    [
      {
        "topology": r["topology"],
        "chips": r["chips"],
        "lanes": r["layout"]["lanes"],
        "GiB a chip": round(r["memory"]["total"] / (1 << 30), 2),
        "round, s": float(f"{r['seconds']['round']:.3g}"),
        f"{r['layout']['unit']}/s": round(_speed(r)),
        "per chip": f"{_speed(r) / r['chips'] / first:.0%}",
        "utilization": f"{r['utilization']['model']:.0%}",
        "bound": r["bound"],
      }
      for r in reports
    ]
  )


def _count(parameters: float) -> str:
  if parameters < 1e8:
    return f"{parameters / 1e6:.2f} M"
  return f"{parameters / 1e9:.2f} B"


def _speed(report: Mapping[str, Any]) -> float:
  """Units of a round a second, tokens or examples."""
  return report[f"{report['layout']['unit']}_per_second"]


def _short(op_name: str) -> str:
  """The end of a traced operation's path, which says what it is."""
  parts = [p for p in op_name.split("/") if p not in ("while", "body")]
  return "/".join(parts[-3:])
