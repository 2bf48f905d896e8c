"""Adapters and quantised bases by their settings: built, trained, exported."""

import jax
import numpy as np
import pytest
from script_runs import script
import tiny

from fedfm import adapters, errors, experiment, models, trees
from fedfm.adapters import peft
from fedfm.models import layers

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tiny")
  tiny.config(folder)  # Writes the model and the data.
  return folder


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"adapter": {"options": {"use_rslorra": True}}},
      r"^adapter.options.use_rslorra: unknown option .*'use_rslora'",
    ),
    (
      {"adapter": {"options": {"use_rslora": "perhaps"}}},
      r"^adapter.options.use_rslora: got 'perhaps', expected bool",
    ),
    (
      {"adapter": {"options": {"rank": 3}}},
      r"^adapter.options.rank: unknown option",
    ),
    ({"adapter": {"kind": "dora", "rank": 17}}, r"^adapter.rank: got 17"),
    (
      {"adapter": {"kind": "full", "options": {"size": 3}}},
      r"^adapter.options.size: unknown option \(there are none\)",
    ),
    (
      {"adapter": {"kind": "houlsby", "options": {"size": 0}}},
      r"^adapter.options.size: got 0",
    ),
    (
      {"adapter": {"kind": "ia3", "options": {"targets": ["kproj"]}}},
      r"^adapter.options.targets: .*did you mean 'k_proj'",
    ),
    (
      {"adapter": {"kind": "ia3", "options": {"feedforward": ["up_proj"]}}},
      r"^adapter.options.feedforward: layers/up_proj is not among the targets",
    ),
    (
      {"adapter": {"kind": "last_layers", "options": {"num_layers": 2}}},
      r"^adapter.options.num_layers: got 2, expected 1 to 1",
    ),
    (
      {"adapter": {"kind": "prompt_tuning", "options": {"num_tokens": 49}}},
      r"^adapter.options.num_tokens: 49 .*= 16, .* longest is 64",
    ),
    ({"adapter": {"kind": "subset"}}, r"^adapter.options.names: missing"),
    ({"adapter": {"kind": "bitfit"}}, r"^adapter.kind: 'bitfit' trains biases"),
    ({"model": {"quantize": "int9"}}, r"^model.quantize: got 'int9'.*int8"),
    (
      {"model": {"quantize": "nf4"}, "adapter": {"kind": "full"}},
      r"^adapter.kind: 'full' trains layers/.*, which is quantised",
    ),
    (
      {"algorithm": "fedit", "adapter": {"kind": "dora"}},
      r"^adapter.kind: got 'dora', but algorithm 'fedit' needs 'lora'",
    ),
  ],
)  # fmt: skip
def test_mistakes_are_one_line_before_anything_is_compiled(
  folder, changes, message
):
  config = tiny.config(folder, **changes)
  if "model" in changes:
    config["model"] = {"path": str(folder / "model")} | changes["model"]
  compiled = []
  listen = jax.monitoring.register_event_duration_secs_listener
  jax.clear_caches()

  def note(event, seconds, **kwargs):
    del seconds, kwargs
    if event == COMPILED:
      compiled.append(event)

  listen(note)
  try:
    with pytest.raises(errors.ConfigError, match=message) as raised:
      experiment.build(config)
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
  assert "\n" not in str(raised.value)
  assert not compiled


@pytest.fixture(scope="module")
def run(folder):
  """A finished run of one round: LoRA on an NF4 base."""
  config = tiny.config(
    folder,
    rounds=1,
    adapter={"kind": "lora", "options": {"use_rslora": True}},
    model={"quantize": "nf4"},
  )
  with tiny.one_device():
    experiment.train(config, folder / "run")
    return folder / "run", *experiment.open_run(folder / "run")


def test_the_base_is_quantised_and_never_stored(run):
  _, opened, state = run
  kernels = [
    x
    for x in trees.by_path(opened.base, layers.is_kernel).values()
    if layers.is_kernel(x)
  ]
  assert len(kernels) == 7
  # What is saved is the state: no more than the trainable and a few scalars.
  assert trees.num_bytes(state) < trees.num_bytes(state.trainable) + 100
  moved = trees.norm(trees.sub(state.trainable, opened.trainable))
  assert moved > 1e-3


@pytest.mark.slow
def test_a_run_is_exported_whole(run, tmp_path):
  workdir, opened, state = run
  output = tmp_path / "merged"
  code, out, err = script(
    "export.py", f"--workdir={workdir}", f"--output={output}"
  )
  assert (code, out) == (0, f"round 1: wrote {output}\n"), err
  tokens = np.arange(12).reshape(1, 12)
  want = opened.adapter.apply(opened.base, state.trainable, tokens)
  model, params = models.huggingface.load(output)
  np.testing.assert_allclose(
    model.apply(params, tokens), want, rtol=1e-4, atol=1e-5
  )


@pytest.mark.slow
def test_a_run_is_exported_for_peft(run, tmp_path):
  workdir, opened, state = run
  arguments = (f"--workdir={workdir}", f"--output={tmp_path / 'lora'}")
  code, _, err = script("export.py", *arguments, "--format=peft")
  assert code == 0, err
  adapter, trainable = peft.load(tmp_path / "lora", opened.model)
  assert adapter.config["use_rslora"]
  jax.tree.map(np.testing.assert_array_equal, trainable, state.trainable)
  # What is there is not written over, nor mixed with.
  code, out, err = script("export.py", *arguments)
  assert (code, out) == (2, "")
  assert err == f"error: --output: {tmp_path / 'lora'} is not empty\n"
  arguments = (arguments[0], f"--output={tmp_path / 'x'}", "--format=onnx")
  code, out, err = script("export.py", *arguments)
  assert (code, out) == (2, "")
  assert err == "error: --format: got 'onnx', expected 'merged' or 'peft'\n"


@pytest.mark.slow
def test_bases_are_compared(folder, tmp_path):
  config = tiny.config(folder)
  file = tmp_path / "config.py"
  file.write_text(
    "import ml_collections\n"
    f"def get_config(): return ml_collections.ConfigDict({config!r})\n"
  )
  code, out, err = script("compare_quantized.py", f"--config={file}")
  assert code == 0, err
  rows = [line.split("|")[1:-1] for line in out.splitlines() if "|" in line]
  assert [row[0].strip() for row in rows[2:]] == ["float32", "int8", "nf4"]
  sizes = [float(row[1]) for row in rows[2:]]
  assert sizes[0] > sizes[1] > sizes[2]


def test_prompts_have_one_format_only(folder, tmp_path):
  model, params = models.huggingface.load(folder / "model")
  adapter = adapters.prompt_tuning(model, num_tokens=2)
  trainable = adapter.init(jax.random.key(0), params)
  with pytest.raises(errors.ConfigError, match="cannot be merged"):
    adapters.export(tmp_path, model, params, adapter, trainable)
  assert not list(tmp_path.iterdir())
