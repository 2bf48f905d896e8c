"""Runs the README's Python, and its example of a new algorithm."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedfm

README = pathlib.Path(__file__).parent.parent / "README.md"


def _blocks() -> list[str]:
  return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def _run(containing: str) -> dict:
  (block,) = [b for b in _blocks() if containing in b]
  namespace = {}
  exec(compile(block, str(README), "exec"), namespace)  # noqa: S102
  return namespace


def test_plain_pytrees_example_trains():
  names = _run("fedfm.data.from_arrays")
  assert int(names["state"].round) == 3
  assert np.isfinite(names["metrics"]["train/loss"])
  assert float(jnp.abs(names["state"].trainable).max()) > 0


def test_notebook_example_is_checked():
  assert _run("experiment.default_config")["settings"].rounds == 4


def test_new_algorithm_is_short_and_does_what_it_says():
  (block,) = [b for b in _blocks() if "def sign_median" in b]
  assert len(block.splitlines()) < 40
  sign_median = _run("def sign_median")["sign_median"]
  targets = {"a": 1.0, "b": 2.0, "c": -5.0}
  source = fedfm.data.from_arrays(
    {k: {"y": np.full((1,), v, np.float32)} for k, v in targets.items()}
  )

  def loss(w, base, batch, key):
    return jnp.sum(0.5 * (w - batch["y"]) ** 2 * batch["mask"]), {}

  algorithm = sign_median(
    loss, client_optimizer=optax.sgd(1.0), server_optimizer=optax.sgd(1.0)
  )
  cohort = fedfm.data.pack(source, source.ids, batch_size=1, lanes=1)
  state, _ = jax.jit(algorithm.round)(
    algorithm.init(jnp.zeros(())), None, cohort
  )
  # One step of rate 1 lands on each target; the median of 1, 2, -5 is 1.
  np.testing.assert_allclose(state.trainable, 1.0, rtol=1e-6)


def test_a_users_own_module_takes_an_adapter():
  names = _run("from flax import linen")
  assert names["logits"].shape == (4, 3)
  assert set(names["trainable"]) == {"up/kernel"}
