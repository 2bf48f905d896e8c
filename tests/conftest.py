"""Gives every test eight virtual CPU devices, before jax is imported.

The programs of tests are tiny and run once: compiling them without LLVM's
optimisations halves the time. Numbers are held by the tests all the same.
"""

import os

os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8"
  " --xla_backend_optimization_level=0"
)
