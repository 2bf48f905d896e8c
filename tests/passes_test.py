"""What algorithms say of their passes is what they run, and what it costs."""

import collections

import algorithm_cases
import jax
import jax.numpy as jnp
import pytest

from fedfm import choices, model_flops, models
from fedfm.algorithms.per_fedavg import meta_loss
from fedfm.clients import estimators
from fedfm.types import Passes

MARKS = ("lgamma", "digamma")  # What a log-gamma becomes: forward, and back.
STEP_LOOP = 2  # The loop over steps is inside of the loop over segments.


def marked(loss):
  """A loss with one log-gamma, by which passes of it are told."""

  def with_mark(trainable, base, batch, key):
    value, aux = loss(trainable, base, batch, key)
    return jax.lax.lgamma(value), aux

  return with_mark


def counts(jaxpr, depth=0):
  """How often each mark runs, by (how many while loops it is in, mark)."""
  found = collections.Counter()
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name in MARKS:
      found[depth, name] += 1
    inner, many = depth + (name == "while"), 1
    if name == "scan":
      many = equation.params["length"]
    parts = []
    for parameter in equation.params.values():
      several = isinstance(parameter, tuple | list)
      for part in parameter if several else [parameter]:
        part = getattr(part, "jaxpr", part)
        if hasattr(part, "eqns"):
          parts.append(counts(part, inner))
    # Of a conditional's branches one runs.
    together = collections.Counter.__or__ if name == "cond" else None
    for part in parts:
      part = collections.Counter({k: many * n for k, n in part.items()})
      found = together(found, part) if together else found + part
  return found


def passes_of_a_round(algorithm, problem):
  state = jax.eval_shape(algorithm.init, problem.start(jnp.float32))
  jaxpr = jax.make_jaxpr(algorithm.round)(
    state, problem.base, problem.pack(problem.rounds[0], 1)
  )
  found = counts(jaxpr.jaxpr)
  return Passes(
    forwards=found[STEP_LOOP, "lgamma"],
    backwards=found[STEP_LOOP, "digamma"],
    first_forwards=found[STEP_LOOP - 1, "lgamma"],
  )


# Traces of gradients of gradients hold dead code: for these see below.
META = {"per_fedavg", "first_order_per_fedavg"}


@pytest.mark.parametrize("name", sorted({*choices.ALGORITHMS} - META))
def test_an_algorithm_names_the_passes_that_its_round_runs(name, monkeypatch):
  problem = algorithm_cases.problem_of(name)
  problem = problem._replace(loss=marked(problem.loss))
  case = algorithm_cases.case_of(name)
  monkeypatch.setitem(algorithm_cases.PROBLEMS, case.problem, problem)
  algorithm = algorithm_cases.build(name)
  assert algorithm.passes == passes_of_a_round(algorithm, problem)


WIDTH, ROWS = 128, 2048
MODEL = models.decoder(
  models.DecoderConfig(
    vocab_size=10, width=4, num_layers=2, num_heads=2, mlp_width=8
  )
)


def deep_loss(trainable, base, batch, key):
  """Three products, whose inputs have gradients as well."""
  x = batch["x"] * trainable["scale"]
  for kernel in trainable.get("kernels", base):
    x = jnp.tanh(x @ kernel)
  return jnp.sum(x**2 * batch["mask"][:, None]), {}


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize(
  ("loss", "passes"),
  [
    (deep_loss, Passes()),
    (
      meta_loss(deep_loss, 0.1, first_order=True),
      algorithm_cases.build("first_order_per_fedavg").passes,
    ),
    (
      meta_loss(deep_loss, 0.1, first_order=False),
      algorithm_cases.build("per_fedavg").passes,
    ),
    (
      estimators.forward_mode(deep_loss),
      algorithm_cases.build("forward_gradients").passes,
    ),
    (
      estimators.zeroth_order(deep_loss),
      algorithm_cases.build("fedmezo").passes,
    ),
  ],
)
def test_passes_cost_what_the_compiler_counts(loss, passes, is_frozen):
  kernels = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * 3
  trainable = {"scale": jax.ShapeDtypeStruct((WIDTH,), jnp.float32)}
  base: object = kernels
  if not is_frozen:
    trainable, base = trainable | {"kernels": kernels}, None
  batch = {
    "x": jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),
    "mask": jax.ShapeDtypeStruct((ROWS,), jnp.float32),
  }
  key = jax.eval_shape(jax.random.key, 0)
  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  compiled = step.lower(trainable, base, batch, key).compile()
  counted = compiled.cost_analysis()["flops"]

  kind, trained = ("lora", {}) if is_frozen else ("full", MODEL.shapes)
  expected, one_forward = (
    model_flops.flops_per_token(MODEL, kind, trained, 5, p)
    for p in (passes, Passes(1, 0))
  )
  ratio = (expected.frozen + expected.trainable) / (
    one_forward.frozen + one_forward.trainable
  )
  forward = 3 * 2 * ROWS * WIDTH**2
  # What is no product (tanh, noise) is little.
  assert counted / forward == pytest.approx(ratio, rel=0.04)
