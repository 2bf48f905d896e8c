"""Rounds compiled for topologies: on virtual CPU devices, and by libtpu."""

import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import script_runs
import tiny

from fedfm import adapters, errors, models, settings, sharding, trees
from fedfm.models import families
from fedfm.scaling import cohort_shapes, costs, hlo, pod, report, topology

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="needs libtpu, which the extra `tpu` installs",
)


def pod_settings(folder, **changes):
  """Seven clients on four lanes, a model whose sizes are all different."""
  if not folder.exists():
    tiny.write_model(
      folder,
      width=128,
      num_layers=3,
      num_heads=4,
      num_kv_heads=2,
      head_dim=32,
      mlp_width=256,
      max_length=256,
    )
  values = {
    "clients_per_round": 7,
    "lanes": 4,
    "mesh": {"clients": -1, "fsdp": 2},
    # A TPU would make float32 weights bfloat16 before it gathers them, or not.
    "model": {
      "path": str(folder),
      "dtype": "bfloat16",
      "scan_layers": True,
      "remat": "full",
    },
    "adapter": {"rank": 4},
    "data": {"sequence_length": 64},
    "client": {"batch_size": 4, "local_steps": 3},
  }
  for name, value in changes.items():
    merge = isinstance(value, dict) and name in values
    values[name] = values[name] | value if merge else value
  return settings.from_dict(values)


def check_report(got, one):
  """What must hold of a report, whoever compiled the round."""
  layout = one.layout
  assert got["layout"]["tokens"] == 7 * 3 * 4 * 64 == layout.units
  # Full remat, a row's chunk of attention, and factors that cost more.
  ratio = got["flops"]["program"] / got["flops"]["formula"]
  assert 0.95 < ratio < 1.15, got["flops"]
  # Of 8 places on the lanes 7 are taken.
  assert got["flops"]["useful"] < 7 / 8 * got["flops"]["formula"]
  assert 0 < got["utilization"]["model"] < got["utilization"]["hardware"] < 1
  seconds = got["seconds"]
  assert seconds["round"] == seconds["core"] + seconds["exposed"]
  least = max(seconds["compute"], seconds["memory"])
  assert seconds["core"] >= least * (1 - 1e-12) > 0  # Summed in another order.
  assert got["tokens_per_second"] == layout.units / seconds["round"]
  memory = got["memory"]
  state, base, _ = one.arguments
  on_a_chip = {
    name: sum(
      np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree)
    )
    for name, tree in (("trainable", state.trainable), ("base", base))
  }
  assert sum(on_a_chip.values()) < memory["arguments"] < memory["total"]
  assert memory["largest"][0]["bytes"] <= memory["total"] < memory["limit"]
  assert any("base" in buffer["what"] for buffer in memory["largest"])
  # The sum of a device's part of the trainable crosses clients, once.
  crossing = [c for c in got["collectives"] if "clients" in c["axes"]]
  n = got["mesh"]["clients"]
  least = 2 * (n - 1) / n * on_a_chip["trainable"]
  assert least <= sum(c["bytes"] for c in crossing) < 1.1 * least + 400
  # Every layer's weights are gathered over fsdp, at least forward and back.
  (gathers,) = [
    c
    for c in got["collectives"]
    if (c["axes"], c["kind"]) == ("fsdp", "all-gather")
  ]
  steps = layout.slots * layout.local_steps
  layers = trees.num_bytes(base["layers"]) / 2  # All but what a chip has.
  assert gathers["bytes"] > 2 * steps * 0.9 * layers


@pytest.mark.slow
def test_report_on_virtual_devices(on_cpu, tmp_path):
  # A CPU computes in float32, so that half of it is no longer the largest.
  config = pod_settings(tmp_path / "m", model={"dtype": "float32"})
  one = pod.build(config, topology.parse("v5e:2x4"))
  assert one.layout == cohort_shapes.Layout(7, 4, 2, 3, 4, 64)
  assert dict(one.mesh.shape) == {"clients": 4, "fsdp": 2, "tensor": 1}
  check_report(report.compile_round(one), one)


def test_algorithms_say_how_clients_lie(on_cpu, tmp_path):
  machine = topology.parse("v5e:2x4")
  replicas = functools.partial(
    pod_settings,
    tmp_path / "m",
    algorithm="diloco",
    clients_per_round=8,
    adapter={"kind": "full"},
    client={"optimizer": "adamw", "batch_size": 4, "local_steps": 3},
  )
  one = pod.build(replicas(), machine)
  state, base, cohort = one.arguments
  assert base is None and cohort.aligned
  # Moments of replicas: rows over clients, each like the weights.
  kernel = state.trainable["layers"]["up_proj"].sharding.spec
  moments = [
    leaf
    for path, leaf in zip(trees.paths(state), jax.tree.leaves(state))
    if path.startswith("clients/") and path.endswith("layers/up_proj")
  ]
  assert len(moments) == 2
  for leaf in moments:
    assert leaf.shape[0] == 8
    assert leaf.sharding.spec == jax.P("clients", *kernel)
  with pytest.raises(errors.ConfigError, match="lanes: got 12, .* 8 clients"):
    pod.build(replicas(lanes=12), machine)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"mesh": {"clients": 3}}, ["3", "8", "topology v5e:2x4"]),
    ({"mesh": {"clients": 8, "fsdp": 2}}, ["16 devices", "8"]),
    ({"lanes": 6}, ["lanes: mesh.clients = 4 does not divide 6"]),
    ({"client": {"batch_size": 3}}, ["client.batch_size", "fsdp = 2", "3"]),
    (
      {"client": {"batch_size": 6, "accumulate": 2}},
      ["client.batch_size", "fsdp = 2", "3 in each of client.accumulate 2"],
    ),
    ({"client": {"local_steps": 0}}, ["client.local_steps: got 0"]),
    ({"data": {"sequence_length": 999}}, ["data.sequence_length", "256"]),
    ({"model": {"path": "nowhere"}}, ["nowhere"]),
    ({"deterministic": True}, ["deterministic: got True", "expected False"]),
  ],
)
def test_mistakes_are_named_before_anything_is_compiled(
  on_cpu, tmp_path, changes, words
):
  with pytest.raises(errors.FedFMError) as raised:
    pod.build(
      pod_settings(tmp_path / "m", **changes), topology.parse("v5e:2x4")
    )
  assert "\n" not in str(raised.value)
  for word in words:
    assert word in str(raised.value)


def test_steps_may_follow_from_examples(on_cpu, tmp_path):
  client = {"local_steps": 0, "max_examples": 9, "epochs": 2}
  config = pod_settings(tmp_path / "m", client=client, lanes="auto")
  layout = pod.build(config, topology.parse("v5e:2x4")).layout
  assert layout.local_steps == 2 * 3  # 9 examples are 3 batches of 4.
  assert layout.lanes % 4 == 0


SIZES = {
  "llama3_8b": 8_030_261_248,
  "llama3_70b": 70_553_706_496,
  "llama3_405b": 405_853_388_800,
}


@pytest.mark.parametrize("name", sorted(SIZES))
def test_shipped_shapes_are_those_of_the_models(name):
  file = CONFIGS / "models" / name / "config.json"
  _, config = families.read_config(file)
  assert trees.num_elements(models.decoder(config).shapes) == SIZES[name]
  assert sorted(p.name for p in file.parent.iterdir()) == ["config.json"]


@pytest.mark.parametrize(
  "path", sorted(CONFIGS.glob("llama*.py")), ids=lambda p: p.stem
)
def test_shipped_configs_are_valid(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = settings.from_dict(module.get_config().to_dict())
  assert pathlib.Path(config.model.path, "config.json").is_file()
  assert f"--config=configs/{path.name}" in module.__doc__


script = functools.partial(script_runs.script, "compile_for_pod.py")


def test_an_unknown_topology_ends_with_one_line():
  config = f"--config={CONFIGS / 'llama3_8b_lora.py'}"
  code, out, err = script(config, "--topology=v9:2x2")
  (line,) = err.splitlines()
  assert (code, out) == (2, "")
  assert "'v9:2x2'" in line and "v5e:2x2 to v5e:16x16" in line


@needs_libtpu
@pytest.mark.slow
def test_script_reports_on_a_tpu_topology(tmp_path):
  values = settings.to_dict(pod_settings(tmp_path / "m"))
  file = tmp_path / "config.py"
  file.write_text(
    "import ml_collections\n"
    f"def get_config():\n  return ml_collections.ConfigDict({values!r})\n"
  )
  config, out_file = f"--config={file}", tmp_path / "out.json"
  code, out, err = script(
    config,
    "--topologies=v5e:2x2,2*v5e:2x2",
    "--config.mesh.clients=-1",
    "--weak",
    f"--json={out_file}",
  )
  assert code == 0, err
  assert "| 2*v5e:2x2 |     8 |     8 |" in out
  one_slice, two_slices = json.loads(out_file.read_text())
  machine = topology.parse("v5e:2x2")
  check_report(one_slice, pod.build(pod_settings(tmp_path / "m"), machine))
  assert one_slice["seconds"]["network"] == 0 < two_slices["seconds"]["network"]
  assert two_slices["mesh"]["clients"] == 4
  assert two_slices["layout"]["num_clients"] == 14
  for arguments, words in (
    (
      ["--config.mesh.clients=3"],
      "mesh: clients=3 x fsdp=2 x tensor=1 needs 6",
    ),
    (["--config.lanes=3"], "lanes: mesh.clients = 2 does not divide 3"),
    (["--topology=v5e:3x3"], "topology: v5e:3x3"),
    # Of the cohort: for activations the compiler first tries for half an hour
    # to compute them again.
    (["--config.client.local_steps=4000000"], "of cohort); try fewer lanes"),
  ):
    code, out, err = script(config, "--topology=v5e:2x2", *arguments)
    (line,) = err.splitlines()
    assert code == 2 and words in line, (code, err)


@needs_libtpu
@pytest.mark.slow
def test_kernels_by_hand_are_said_not_to_be_counted(tmp_path):
  config = pod_settings(tmp_path / "m", data={"sequence_length": 128})
  got = report.compile_round(pod.build(config, topology.parse("v5e:2x2")))
  flops = got["flops"]
  assert flops["kernels_not_counted"] >= 2  # Forward and back.
  assert 0.8 < flops["program"] / flops["formula"] < 1


@needs_libtpu
@pytest.mark.slow
def test_messages_of_a_known_program_on_a_tpu_topology():
  devices = topology.devices(topology.parse("v5e:2x4"))
  mesh = sharding.make_mesh({"clients": 2, "fsdp": 2, "tensor": 2}, devices)

  def f(x):  # [16, 128, 256] float32, of which a device has an eighth.
    over_clients = jax.lax.psum(x, "clients")
    gathered = jax.lax.all_gather(over_clients, "fsdp", axis=1, tiled=True)
    return jax.lax.psum(jnp.sum(gathered, axis=1), ("clients", "tensor"))

  whole = jax.ShapeDtypeStruct(
    (16, 128, 256),
    jnp.float32,
    sharding=jax.NamedSharding(mesh, jax.P("clients", "fsdp", "tensor")),
  )
  run = jax.jit(
    jax.shard_map(
      f,
      mesh=mesh,
      in_specs=jax.P("clients", "fsdp", "tensor"),
      out_specs=jax.P(None, None),
      check_vma=False,
    )
  )
  text = run.lower(whole).compile().as_text()
  found = costs.measure(hlo.parse(text), mesh.shape).collectives
  sent = {(c.axes, c.kind): c.wire_bytes for c in found}
  part = 16 * 128 * 256 * 4 // 8
  assert sent == {
    (("clients",), "all-reduce"): part,
    (("fsdp",), "all-gather"): part,
    (("clients", "tensor"), "all-reduce"): 2 * 3 / 4 * 8 * 128 * 4,
  }


def test_rows_of_factors_that_do_not_divide_stay_whole():
  """An adapter never asks of a mesh what its model did not."""
  config = models.DecoderConfig(
    vocab_size=32, width=24, num_layers=1, num_heads=3, head_dim=2, mlp_width=8
  )
  model = models.decoder(config)
  adapter = adapters.lora(model, rank=2, targets=["q_proj"])
  mesh = sharding.make_mesh({"clients": 2, "fsdp": 4})
  shapes = jax.eval_shape(adapter.init, jax.random.key(0), model.shapes)
  placed = sharding.shardings(mesh, adapter.axes, shapes)["layers/q_proj"]
  assert placed["a"].spec == jax.P(None, "fsdp", None)
  assert placed["b"].spec == jax.P(None, None, ("tensor",))
