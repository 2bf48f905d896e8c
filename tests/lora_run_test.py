"""Runs of the LoRA methods from a config: resumed, evaluated, on a mesh."""

import inspect

import jax
import numpy as np
import pytest
import reference
import tiny

from fedfm import algorithms, checkpoint, choices, experiment, metrics

# Options of a population of 8 clients, and an adapter of rank 2.
OPTIONS = {
  "flora": {"ranks": (2, 1)},
  "fedex_lora": {"residual": "low_rank", "residual_rank": 6},
  "flexlora": {"ranks": (1, 2), "client_alpha": "equal"},
  "hetlora": {"ranks": (2, 2, 1), "decay": 0.5},
  "zero_padding": {"ranks": (1, 2)},
  "feddpa_f": {"global_rounds": 1},
}
NAMES = [
  name
  for name in choices.ALGORITHMS
  if "adapter" in inspect.signature(getattr(algorithms, name)).parameters
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("federation")


def config(folder, name, **changes):
  return tiny.config(
    folder,
    algorithm=name,
    algorithm_options=OPTIONS.get(name, {}),
    **{"adapter": {"targets": ("q_proj",)}} | changes,
  )


@pytest.mark.slow
def test_a_changed_base_is_saved_and_evaluated(folder):
  values = config(folder, "flora", eval={"every": 1})
  with tiny.one_device():
    built = experiment.build(values)
    summary, state = experiment.run(built, folder / "whole")
    experiment.train(values | {"rounds": 1}, folder / "parts")
    _, resumed = experiment.run(built, folder / "parts")
  assert reference.state_bytes(state) == reference.state_bytes(resumed)
  # The adapter is at zero; all that was learned is in the base.
  assert not any(pair["b"].any() for pair in state.trainable.values())
  assert summary["final"]["eval/seen/loss"] < summary["base"]["eval/seen/loss"]
  base = built.algorithm.effective_base(state, built.base)
  got = built.evaluate(state.trainable, base)
  for name, value in got.items():
    np.testing.assert_allclose(value, summary["final"][name], rtol=1e-6)
  lines = metrics.read(folder / "whole")
  assert all(line["lora/aggregation_error"] < 1e-5 for line in lines[1:])
  # The stack of three clients comes down in the second round.
  down = [line["comm/bytes_down"] for line in lines[1:]]
  assert down[0] == 0 < down[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_from_a_config_alike_on_a_mesh_and_through_a_checkpoint(
  folder, tmp_path, name
):
  values = config(folder, name)
  with tiny.one_device():
    one = experiment.build(values)
  many = experiment.build(
    values | {"mesh": {"clients": 2, "fsdp": 2, "tensor": 2}}
  )
  results = []
  for built in (one, many):

    def weights(state, built=built):
      """Kernels with all that was learned; factors need not be unique."""
      base = built.algorithm.effective_base(state, built.base)
      return built.adapter.merge(base, state.trainable)

    state = built.initial_state()
    start = jax.device_get((weights(state), state.clients))
    with jax.set_mesh(built.mesh):
      for index in range(2):
        state, got = built.run_round(state, built.base, built.cohort(index))
        got = jax.device_get(got)
        assert all(np.isfinite(x) for x in got.values())
    results.append((jax.device_get((weights(state), state.clients)), got))
  (state_one, metrics_one), (state_many, metrics_many) = results
  for before, a, b in zip(
    *map(jax.tree.leaves, (start, state_one, state_many))
  ):
    size = np.abs(np.asarray(a, np.float64) - before).max(initial=0)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * size + 1e-6)
  assert (
    any(
      np.any(x != y)
      for x, y in zip(*map(jax.tree.leaves, (start[0], state_one[0])))
    )
    or "fedsa" in name
  )  # Its own B are not in the global model.
  assert metrics_one["lora/aggregation_error"] == pytest.approx(
    float(metrics_many["lora/aggregation_error"]), rel=1e-2, abs=1e-5
  )
  with checkpoint.Checkpointer(tmp_path / "checkpoints") as checkpointer:
    checkpointer.save(2, state)
    checkpointer.wait()
    restored = checkpointer.restore(checkpoint.abstract(state))
  assert reference.state_bytes(restored[1]) == reference.state_bytes(state)
