"""Every algorithm by name, deterministic: the same bits on any mesh."""

import algorithm_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from fedfm import choices, clients, sharding
from fedfm.clients import deterministic


def narrow(x):
  """Float32 of float64, everything else as it is."""
  is_wide = np.asarray(x).dtype == np.float64
  return np.float32(x) if is_wide else x


def rounds(name, num_devices, lanes):
  """Bytes of the state and of the metrics after each of two rounds."""
  algorithm, problem = cases.build(name), cases.problem_of(name)
  mesh = sharding.make_mesh(
    {"clients": num_devices}, jax.devices()[:num_devices]
  )
  base, params = jax.device_put(
    (jax.tree.map(narrow, problem.base), problem.start(jnp.float32)),
    jax.NamedSharding(mesh, jax.P()),
  )
  state = deterministic.on_one_device(algorithm.init, mesh)(params)
  run = deterministic.deterministic(algorithm.round, mesh)
  history = []
  for ids in problem.rounds:
    cohort = jax.tree.map(narrow, problem.pack(ids, lanes=lanes))
    state, metrics = run(state, base, clients.put(cohort, mesh))
    history.append(reference.state_bytes((state, metrics)))
  return history


# Devices beyond the second only take longer to compile for: of every kind one.
ON_EIGHT = ("fedavg", "rolora", "ditto", "ifca", "fedmezo", "streaming_diloco")


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", choices.ALGORITHMS)
def test_every_algorithm_gives_the_same_bits_on_any_mesh(name):
  # Replicas have a place each, and there are four of them.
  lanes = 8 if cases.case_of(name).problem in ("linear", "lora") else 4
  one = rounds(name, 1, lanes)
  assert one[0] != one[1]
  for num_devices in (2, lanes) if name in ON_EIGHT else (2,):
    assert rounds(name, num_devices, lanes) == one
