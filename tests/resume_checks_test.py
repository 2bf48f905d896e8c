"""What a run checks before it goes on: nothing is started over, or mixed."""

import json
import os
import pathlib
import shutil

import pytest
import tiny

from fedfm import (
  checkpoint,
  data_files,
  errors,
  experiment,
  metrics,
  recording,
  settings,
)
from fedfm.data import file_digest

METADATA = "_CHECKPOINT_METADATA"
ROUNDS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def built(folder):
  return tiny.build(
    folder,
    rounds=ROUNDS,
    checkpoint={"every": 2, "keep_last": 3, "keep_best": "eval/unseen/loss"},
  )


@pytest.fixture(scope="module")
def whole(folder, built):
  """A run that nothing happened to: rounds 0, 2 and 3 are saved."""
  experiment.run(built, folder / "whole")
  return folder / "whole"


@pytest.fixture
def run(whole, tmp_path):
  return pathlib.Path(shutil.copytree(whole, tmp_path / "run"))


def tree(folder):
  return {
    p: p.read_bytes()
    for p in sorted(folder.rglob("*"))
    if p.is_file() and p.name not in ("log.txt", "run.lock")
  }


def names(folder):
  return sorted(p.name for p in folder.iterdir())


def refused(built, workdir, match, kind=errors.CheckpointError):
  with pytest.raises(kind, match=match) as error:
    experiment.run(built, workdir)
  assert "\n" not in str(error.value)
  return error.value


def test_a_damaged_older_checkpoint_does_not_stop_a_run(built, run):
  for name in ("0", "2"):
    (run / "checkpoints" / name / METADATA).write_text("{}")
  other = tiny.variant(built, rounds=ROUNDS + 2)
  experiment.run(other, run)
  assert "2.damaged" in names(run / "checkpoints")
  assert [x["round"] for x in metrics.read(run)] == list(range(ROUNDS + 3))


def test_a_damaged_checkpoint_above_the_rounds_is_set_aside(built, whole, run):
  shutil.copytree(run / "checkpoints" / "3", run / "checkpoints" / "9")
  experiment.run(built, run)
  assert names(run / "checkpoints") == ["0", "2", "3", "9.damaged"]
  assert tiny.content(run) == tiny.content(whole)


@pytest.mark.parametrize("how", ["gone", "all gone", "damaged", "set aside"])
def test_a_run_without_an_intact_checkpoint_is_not_started_over(
  built, run, how
):
  folder = run / "checkpoints"
  for path in list(folder.iterdir()):
    if how == "damaged":
      (path / METADATA).write_text("{}")
    else:
      shutil.rmtree(path)
  if how == "all gone":
    shutil.rmtree(folder)
  if how == "set aside":
    (folder / "3.damaged").mkdir()
    (run / "metrics.jsonl").unlink()
  config = (run / "config.json").read_bytes()
  before = tree(run / "tensorboard") | {
    p: p.read_bytes() for p in run.glob("metrics.jsonl")
  }
  for _ in range(2):
    refused(built, run, "workdir: .* no intact checkpoint.* start in a new f")
  assert (run / "config.json").read_bytes() == config
  for path, content in before.items():
    assert path.read_bytes() == content
  # As the message says.
  (run / "metrics.jsonl").unlink(missing_ok=True)
  shutil.rmtree(folder)
  experiment.run(tiny.variant(built, rounds=1), run)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(
  built, whole, run
):
  """The line of round 0 is there, and half of its checkpoint."""
  shutil.rmtree(run / "checkpoints")
  (run / "checkpoints" / "0.orbax-checkpoint-tmp").mkdir(parents=True)
  lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
  (run / "metrics.jsonl").write_text(lines[0] + lines[1][:20])
  (run / "summary.json").unlink()
  experiment.run(built, run)
  assert tiny.content(run) == tiny.content(whole)


def test_a_round_is_told_of_after_the_first_checkpoint_is_whole(
  built, tmp_path, monkeypatch
):
  """So that a kill leaves either of what the tests above have."""
  write, seen = metrics.MetricsWriter.write, []

  def look(self, line):
    found = names(tmp_path / "checkpoints")
    seen.append((line["round"], "0" in found))
    write(self, line)

  monkeypatch.setattr(metrics.MetricsWriter, "write", look)
  experiment.run(tiny.variant(built, rounds=2), tmp_path)
  assert seen == [(0, False), (1, True), (2, True)]


def test_lost_lines_of_metrics_are_warned_of(built, whole, run, caplog):
  lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
  (run / "metrics.jsonl").write_text("".join([lines[0], *lines[2:]]))
  assert experiment.run(built, run)[0]["rounds"] == ROUNDS
  assert "lacks the lines of 1 of 4 rounds, the first" in caplog.text
  assert "lacks the lines of 1 of 4" in (run / "log.txt").read_text()
  (run / "metrics.jsonl").unlink()
  summary = experiment.run(built, run)[0]
  assert summary["rounds"] == ROUNDS and summary["final"] == {}
  assert "lacks the lines of 4 of 4 rounds" in caplog.text


def test_folders_in_the_place_of_files(built, whole, run):
  (run / "log.txt").unlink()
  (run / "log.txt").mkdir()
  experiment.run(built, run)
  assert tiny.content(run) == tiny.content(whole)
  (run / "metrics.jsonl").unlink()
  (run / "metrics.jsonl").mkdir()
  refused(built, run, "metrics.jsonl: cannot be written: Is a directory")
  shutil.rmtree(run / "checkpoints")
  refused(built, run, "metrics.jsonl: cannot be read: Is a directory")


def test_a_config_that_is_no_object(built, run):
  for text, match in (
    ("[1]", "config.json: got a JSON list, expected an object"),
    ("[" * 100_000, "config.json: not JSON: maximum recursion"),
  ):
    (run / "config.json").write_text(text)
    refused(built, run, match)
    with pytest.raises(errors.CheckpointError, match=match):
      experiment.open_run(run)


def test_a_config_of_an_older_version_goes_on(built, whole, run):
  file = run / "config.json"
  config = json.loads(file.read_text())
  del config["rounds_per_dispatch"], config["algorithm_options"]
  del config["server"]["average"], config["devices"]
  file.write_text(json.dumps(config))
  experiment.run(built, run)
  assert tiny.content(run) == tiny.content(whole)
  other = tiny.variant(built, server={"average": 0.5})
  refused(other, run, "server.average: had 0.0, now 0.5", errors.ConfigError)


def test_checkpoints_that_vanish_meanwhile_end_in_one_line(
  built, tmp_path, monkeypatch
):
  write = metrics.MetricsWriter.write

  def write_and_remove(self, line):
    write(self, line)
    if line["round"] == 1:
      shutil.rmtree(tmp_path / "checkpoints")

  monkeypatch.setattr(metrics.MetricsWriter, "write", write_and_remove)
  error = refused(built, tmp_path, "checkpoints: cannot be listed: No such")
  assert error.exit_code == 3


def test_a_run_goes_on_with_its_own_data_only(built, whole, run, tmp_path):
  old = pathlib.Path(built.settings.data.path)
  moved = pathlib.Path(shutil.copy(old, tmp_path / "moved.jsonl"))
  os.utime(moved, (0, 0))
  other = tiny.variant(built, data={"path": str(moved)})
  experiment.run(other, run)
  assert tiny.content(run) == tiny.content(whole)
  moved.write_text(old.read_text().replace("cat", "dog"))
  before = tree(run)
  match = "data.path: .*moved.jsonl does not hold the data .* digest sha256:"
  refused(other, run, match, errors.DataError)
  assert tree(run) == before


def test_a_manifest_without_a_digest_of_data_goes_on(whole):
  with checkpoint.Checkpointer(whole / "checkpoints", read_only=True) as reader:
    manifest = reader.manifest(ROUNDS)
  assert manifest["run"].pop("data").startswith("sha256:")
  now = manifest["run"] | {"data": "sha256:x"}
  recording.check_data(whole, manifest, now)
  config = now["config"]
  other = now | {"config": config | {"data": config["data"] | {"path": "x"}}}
  with pytest.raises(errors.DataError, match="data.path: had .* no digest"):
    recording.check_data(whole, manifest, other)


def test_the_files_of_clients_are_data_with_their_names(built, tmp_path):
  def digest():
    data = {"name": "files", "path": str(tmp_path), "files": "*.jsonl"}
    train = built.data.train  # Not looked at.
    return data_files.digest(settings.from_dict({"data": data}), train)

  for name in ("a.jsonl", "b.jsonl", "README"):
    (tmp_path / name).write_text(name)
  name = digest()
  (tmp_path / "README").write_text("of no client")
  assert digest() == name
  (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
  assert digest() != name


def test_a_digest_of_files_is_of_their_content(tmp_path):
  files = {name: tmp_path / name for name in "abc"}
  for size, path in zip((700, 0, 5000), files.values()):
    path.write_bytes(bytes(i % 251 for i in range(size)))
  name = file_digest.digest(files)
  assert name == file_digest.digest(dict(reversed(files.items())))
  assert name != file_digest.digest({**files, "d": files["b"]})

  def changed(at, **options):
    content = bytearray(files["c"].read_bytes())
    before = file_digest.digest(files, **options)
    content[at] ^= 1
    files["c"].write_bytes(content)
    after = file_digest.digest(files, **options)
    content[at] ^= 1
    files["c"].write_bytes(content)
    return before != after

  # All of it where it is small, else a part here and there.
  assert all(changed(at) for at in range(0, 5000, 50))
  some = [
    changed(at, most_bytes=1000, part_bytes=10) for at in range(0, 5000, 7)
  ]
  assert 0.1 < sum(some) / len(some) < 0.3
  with pytest.raises(errors.DataError, match="away: cannot be read: No such"):
    file_digest.digest({"": tmp_path / "away"})
