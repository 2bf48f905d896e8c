"""Gives tests eight virtual CPU devices and a cache of compiled programs.

Before jax is imported; pytest-xdist's workers and subprocesses inherit both.
"""

import atexit
import os
import pathlib
import shutil
import sys
import tempfile

from absl import flags
import pytest

if "PYTEST_XDIST_WORKER" not in os.environ:
  os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
  if any("not slow" in a or "not optimized" in a for a in sys.argv):
    # Most of the time goes into compiling. Tests of bits, which LLVM may change
    # from one program to another, run what it makes at its best.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _CACHE = tempfile.mkdtemp(prefix="fedfm-tests-")
  atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# The scripts' own modules, such as `train` and `command_line`.
sys.path.append(str(pathlib.Path(__file__).parent.parent / "scripts"))


# Linux aborts a process that maps more than 65,530 pieces of memory; each
# program that XLA compiles for the CPU holds several.
MOST_MAPPINGS = 30_000


@pytest.fixture(autouse=True)
def few_mappings():
  """Drops jax's compiled programs once a worker holds very many."""
  yield
  maps = pathlib.Path("/proc/self/maps")
  count = maps.read_bytes().count(b"\n") if maps.exists() else 0
  if count > MOST_MAPPINGS and "jax" in sys.modules:
    sys.modules["jax"].clear_caches()


@pytest.fixture
def compiled():
  """A list that grows with every program that jax compiles."""
  import jax

  names = []

  def listen(event, duration_secs, **kwargs):
    del duration_secs
    if event == "/jax/core/compile/backend_compile_duration":
      names.append(kwargs)

  jax.clear_caches()
  jax.monitoring.register_event_duration_secs_listener(listen)
  yield names
  jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def no_required_flags(monkeypatch):
  """Forgets that flags which other tests' scripts define are required."""
  for name in flags.FLAGS:
    monkeypatch.setattr(flags.FLAGS[name], "validators", [])


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch):
  """Where nothing cuts the power; a busy disk takes minutes."""
  monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def opened_store(tmp_path):
  """See `store_states.written`."""
  import store_states

  made = store_states.written(tmp_path / "store")
  yield made
  made.close()


@pytest.fixture
def on_cpu(monkeypatch):
  """Topologies are made of virtual CPU devices, which have no links."""
  import jax

  from fedfm.scaling import estimate, topology

  def devices(machine):
    return jax.devices()[: machine.chips]

  monkeypatch.setattr(topology, "devices", devices)
  monkeypatch.setattr(estimate, "_links", lambda devices, machine: 2)
