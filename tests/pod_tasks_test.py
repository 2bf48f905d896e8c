"""Every task's round, and algorithms', compiled for topologies as shapes."""

import json

import classification_test
import contrastive_test
import instruction_run_test
import pod_compile_test
import pytest
import tiny

from fedfm import clients, data, models, population, settings
from fedfm.scaling import pod, report, tables, topology

MACHINE = topology.parse("v5e:2x4")
SIZES = {"width": 64, "num_layers": 2, "num_heads": 2, "mlp_width": 128}


def merged(values, **changes):
  """A config on four lanes of two chips, and what else is to change."""
  common = {
    "lanes": 4,
    "mesh": {"clients": -1, "fsdp": 2},
    "client": {"batch_size": 4, "local_steps": 3},
    "eval": {"batch_size": 4},
  }
  for new in (common, changes):
    for name, value in new.items():
      merge = isinstance(value, dict) and name in values
      values = values | {name: values[name] | value if merge else value}
  return values


def language_model(folder):
  return merged(tiny.config(folder))


def token_ids(folder):
  path = folder / "tokens.jsonl"
  row = json.dumps({"client": "a", "ids": [1, 2]})
  path.write_text(f"{row}\n" * 4)
  return merged(
    tiny.config(folder), data={"path": str(path), "token_key": "ids"}
  )


def prompts(folder):
  tiny.write_model(folder / "model")
  for name in ("local_training_0", "local_training_1", "global_test"):
    rows = instruction_run_test.rows(3)
    (folder / f"{name}.json").write_text(json.dumps(rows))
  return merged(instruction_run_test.config(folder))


def prompts_in_rows_of_their_own(folder):
  return merged(prompts(folder), data={"packed": False})


def texts(folder):
  values = classification_test.text_config(folder)
  path = classification_test.write_encoder(folder / "encoder", **SIZES)
  return merged(values, model={"path": path}, adapter={"rank": 4})


def _images(folder, config):
  model = classification_test.write_config(folder / "vision", config)
  return merged(classification_test.image_config(folder, model))


def images(folder):
  return _images(folder, models.CNNConfig(num_classes=2, image_size=8))


def patches(folder):
  config = models.VisionConfig(
    num_classes=2,
    image_size=8,
    patch_size=2,
    num_channels=1,
    architecture="ViTForImageClassification",
    **SIZES,
  )
  return _images(folder, config)


def pairs(folder):
  tower = models.StackConfig(**SIZES)
  model = contrastive_test.write_clip(
    folder / "model", text=tower, image=tower, patch_size=2
  )
  return merged(contrastive_test.config(folder, model))


TASKS = {
  task.__name__: task
  for task in (
    language_model,
    token_ids,
    prompts,
    prompts_in_rows_of_their_own,
    texts,
    images,
    patches,
    pairs,
  )
}


@pytest.mark.parametrize("task", sorted(TASKS))
def test_cohorts_of_shapes_are_like_those_that_are_packed(
  on_cpu, task, tmp_path
):
  config = settings.from_dict(TASKS[task](tmp_path))
  one = pod.build(config, MACHINE)
  got = one.arguments[2]
  source = population.load(config, one.model.config).data.train
  packed = data.pack(source, source.ids[:1], batch_size=4, lanes=4)
  want = clients.put(packed, one.mesh)
  assert sorted(got.batches) == sorted(want.batches)
  for name, x in want.batches.items():
    mine = got.batches[name]
    # [lanes, steps, rows, ...]: steps are the population's.
    assert (mine.shape[0], mine.shape[2:]) == (4, x.shape[2:]), name
    assert (mine.dtype, mine.sharding) == (x.dtype, x.sharding), name
  for name in clients.cohort.shardings(one.mesh):
    if name != "batches":
      mine, x = getattr(got, name), getattr(want, name)
      assert (mine.dtype, mine.ndim) == (x.dtype, x.ndim), name
      assert mine.sharding == x.sharding, name


@pytest.mark.slow
@pytest.mark.parametrize("task", ["texts", "images", "patches", "pairs"])
def test_tasks_compute_what_the_formula_says(on_cpu, task, tmp_path):
  config = settings.from_dict(TASKS[task](tmp_path))
  one = pod.build(config, MACHINE)
  got = report.compile_round(one)
  ratio = got["flops"]["program"] / got["flops"]["formula"]
  assert 0.9 < ratio < 1.15, got["flops"]
  count = config.clients_per_round * 3 * 4
  assert got["layout"]["examples"] == count
  assert got["examples_per_second"] == count / got["seconds"]["round"]
  assert f"{count // 12} on 4 lanes, 3 steps of 4 examples" in tables.markdown(
    got
  )
  assert "examples/s" in tables.scaling_table([got])


@pytest.mark.slow
@pytest.mark.parametrize(
  ("algorithm", "adapter"),
  [
    ("fedavg", "lora"),
    ("mimelite", "lora"),  # Two gradients a step.
    ("fedkseed", "lora"),  # No gradient, and so nothing again.
    ("ifca", "lora"),  # Losses of all clusters come first.
    ("diloco", "full"),
    ("fedavg", "last_layers"),
    ("fedavg", "head"),
  ],
)
def test_algorithms_compute_what_the_formula_says(
  on_cpu, algorithm, adapter, tmp_path
):
  config = pod_compile_test.pod_settings(
    tmp_path / "model",
    model={"dtype": "float32"},
    algorithm=algorithm,
    clients_per_round=8,
    adapter={"kind": adapter} if adapter != "lora" else {"rank": 4},
  )
  got = report.compile_round(pod.build(config, MACHINE))
  ratio = got["flops"]["program"] / got["flops"]["formula"]
  assert 0.95 < ratio < 1.15, got["flops"]
