"""Runs of the scripts, as processes of their own or in this one."""

import contextlib
import importlib.util
import io
import os
import pathlib
import subprocess
import sys

from absl import flags
import pytest

import command_line

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = {p.stem for p in (ROOT / "scripts").glob("*.py")} - {"command_line"}


def environment(devices=None):
  """Variables of a process with virtual devices; it compiles as this one does.

  Args:
    devices: How many; None leaves it to the process.

  Returns:
    A dict for `subprocess`.
  """
  given = os.environ.get("XLA_FLAGS", "").split()
  flags_of_xla = [f for f in given if "optimization_level" in f]
  if devices is not None:
    flags_of_xla.append(f"--xla_force_host_platform_device_count={devices}")
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": " ".join(flags_of_xla),
  }


def script(name, *arguments):
  """Runs a script on one device; returns (exit code, stdout, stderr)."""
  process = subprocess.run(
    [sys.executable, ROOT / "scripts" / name, *arguments],
    env=environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  return process.returncode, process.stdout, process.stderr


def here(name, *arguments, commands=()):
  """As `script`, in this process: much faster where little is computed."""
  out, err, code = io.StringIO(), io.StringIO(), 0
  with pytest.MonkeyPatch.context() as patch, _flags_of(name) as module:
    patch.setattr(command_line, "_OVERRIDES", [])
    patch.setattr(sys, "argv", [name, *arguments])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      try:
        command_line.run(module.main, commands)
      except SystemExit as e:
        code = e.code
  return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def _flags_of(name):
  """Loads a script anew, its flags in the place of those of other scripts."""
  every = flags.FLAGS
  others = {
    flag: (module, every[flag])
    for flag in every
    if (module := every.find_module_defining_flag(flag)) in SCRIPTS
  }
  for flag in others:
    delattr(every, flag)
  before = set(every)
  spec = importlib.util.spec_from_file_location(
    f"loaded_{name.removesuffix('.py')}", ROOT / "scripts" / name
  )
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # Flags are registered by it.
  try:
    spec.loader.exec_module(module)
    yield module
  finally:
    every.unparse_flags()
    for flag in set(every) - before:
      delattr(every, flag)
    for flag, (defined_by, value) in others.items():
      every[flag] = value
      every.register_flag_by_module(defined_by, value)
    del sys.modules[spec.name]
