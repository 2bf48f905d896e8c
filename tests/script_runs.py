"""Runs of the scripts, as processes of their own."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def script(name, *arguments):
  """Runs a script on one device; returns (exit code, stdout, stderr)."""
  process = subprocess.run(
    [sys.executable, ROOT / "scripts" / name, *arguments],
    env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    check=False,
  )
  return process.returncode, process.stdout, process.stderr
