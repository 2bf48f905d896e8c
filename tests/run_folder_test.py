"""One run, one folder, one writer."""

import json
import signal
import subprocess
import sys
import time

import pytest

from fedfm import errors, run_folder

CONFIG = {"seed": 1, "rounds": 10, "mesh": {"clients": 4, "fsdp": 1}}


def commit(workdir, config=CONFIG, **options):
  """Makes a folder a run's."""
  with run_folder.claim(workdir, config, **options) as run:
    run.commit()


def tree(folder):
  """Path -> content of everything, None for a folder."""
  return {
    p: p.read_bytes() if p.is_file() else None
    for p in sorted(folder.rglob("*"))
  }


def test_a_claim_that_is_not_committed_leaves_no_trace(tmp_path):
  with run_folder.claim(tmp_path / "a" / "b", CONFIG):
    assert (tmp_path / "a" / "b" / "run.lock").exists()
  assert tree(tmp_path) == {}
  (tmp_path / "empty").mkdir()
  run_folder.claim(tmp_path / "empty", CONFIG).close()
  assert tree(tmp_path) == {tmp_path / "empty": None}
  commit(tmp_path / "run")
  (tmp_path / "run" / "run.lock").write_text("process 7, long dead")
  before = tree(tmp_path)
  changed = CONFIG | {"rounds": 20}
  run_folder.claim(tmp_path / "run", changed).close()
  with pytest.raises(errors.ConfigError, match="seed: had 1, now 2"):
    run_folder.claim(tmp_path / "run", CONFIG | {"seed": 2})
  assert tree(tmp_path) == before


def test_a_lock_file_that_went_away_locks_nothing(tmp_path, monkeypatch):
  """Whoever opened a file that its owner took along has to look again."""
  first = run_folder.claim(tmp_path / "run", CONFIG)
  real, left = run_folder.fcntl.flock, [first]

  def flock(descriptor, operation):
    while left:
      left.pop().close()  # Removes the file that is being locked here.
    return real(descriptor, operation)

  monkeypatch.setattr(run_folder.fcntl, "flock", flock)
  (tmp_path / "run").mkdir(exist_ok=True)
  (tmp_path / "run" / "config.json").write_text(json.dumps(CONFIG))
  with run_folder.claim(tmp_path / "run", CONFIG):
    monkeypatch.undo()
    with pytest.raises(errors.CheckpointError, match="is being written by"):
      run_folder.claim(tmp_path / "run", CONFIG)


def test_claims_a_new_folder_and_resumes_it(tmp_path):
  workdir = tmp_path / "a" / "run"
  with run_folder.claim(workdir, CONFIG) as run:
    assert run.path == workdir and not run.resumed
    assert not (workdir / "config.json").exists()
    run.commit()
    assert json.loads((workdir / "config.json").read_text()) == CONFIG
    (workdir / "checkpoints").mkdir()
  with run_folder.claim(workdir, CONFIG) as run:
    assert run.resumed


def test_tuples_and_lists_are_the_same_config(tmp_path):
  commit(tmp_path, {"targets": ("q", "v")})
  with run_folder.claim(tmp_path, {"targets": ["q", "v"]}) as run:
    assert run.resumed


def test_another_config_is_refused_with_the_difference(tmp_path):
  commit(tmp_path)
  before = (tmp_path / "config.json").read_bytes()
  other = {"seed": 2, "rounds": 20, "mesh": {"clients": 4}, "lanes": "auto"}
  with pytest.raises(errors.ConfigError) as info:
    run_folder.claim(tmp_path, other)
  message = str(info.value)
  assert message.endswith(
    "seed: had 1, now 2; mesh.fsdp: had 1, now nothing; "
    'lanes: had nothing, now "auto"'
  )
  assert "\n" not in message
  assert (tmp_path / "config.json").read_bytes() == before
  # the refusal let go of the lock
  run_folder.claim(tmp_path, CONFIG).close()


def test_some_fields_may_change(tmp_path):
  commit(tmp_path)
  changed = CONFIG | {"rounds": 20, "mesh": {"clients": 2, "fsdp": 2}}
  with pytest.raises(errors.ConfigError, match="mesh.clients: had 4, now 2"):
    run_folder.claim(tmp_path, changed)
  commit(tmp_path, changed, may_change=("rounds", "mesh"))
  assert json.loads((tmp_path / "config.json").read_text()) == changed


def test_a_second_claim_is_refused_until_the_first_is_closed(tmp_path):
  run = run_folder.claim(tmp_path, CONFIG)
  with pytest.raises(
    errors.CheckpointError, match="is being written by process [0-9]+ on "
  ):
    run_folder.claim(tmp_path, CONFIG)
  run.close()
  run.close()
  run_folder.claim(tmp_path, CONFIG).close()


def test_a_killed_process_leaves_the_folder_free(tmp_path):
  code = (
    "import sys, time\nfrom fedfm import run_folder\n"
    f"run = run_folder.claim(sys.argv[1], {CONFIG!r})\nrun.commit()\n"
    "print('claimed', flush=True)\ntime.sleep(60)"
  )
  child = subprocess.Popen(
    [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
  )
  try:
    assert child.stdout.readline() == b"claimed\n"
    with pytest.raises(
      errors.CheckpointError, match=f"written by process {child.pid} "
    ):
      run_folder.claim(tmp_path, CONFIG)
  finally:
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
  start = time.monotonic()
  with run_folder.claim(tmp_path, CONFIG) as run:
    assert run.resumed and time.monotonic() - start < 1


def test_what_is_no_run_is_left_alone(tmp_path):
  (tmp_path / "thesis.tex").write_text("x")
  with pytest.raises(errors.CheckpointError, match="not a run .*'thesis.tex'"):
    run_folder.claim(tmp_path, CONFIG)
  with pytest.raises(errors.CheckpointError, match="workdir: .*ot a directory"):
    run_folder.claim(tmp_path / "thesis.tex", CONFIG)
  with pytest.raises(errors.CheckpointError, match="workdir: .*ot a directory"):
    run_folder.claim(tmp_path / "thesis.tex" / "run", CONFIG)
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_kill_before_the_config_was_written_is_still_a_new_run(tmp_path):
  (tmp_path / "run.lock").write_text("process 1")
  (tmp_path / "config.json.part").write_text('{"se')
  with run_folder.claim(tmp_path, CONFIG) as run:
    assert not run.resumed


def test_a_broken_config_is_named(tmp_path):
  (tmp_path / "config.json").write_text('{"seed": ')
  with pytest.raises(errors.CheckpointError, match="config.json: not JSON"):
    run_folder.claim(tmp_path, CONFIG)


def test_write_json_keeps_the_old_file_when_it_fails(tmp_path):
  path = tmp_path / "summary.json"
  run_folder.write_json(path, {"a": 1})
  for bad in ({"a": float("nan")}, {"a": object()}):
    with pytest.raises(errors.CheckpointError, match="summary.json: not JSON"):
      run_folder.write_json(path, bad)
  assert run_folder.read_json(path) == {"a": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
  with pytest.raises(errors.CheckpointError, match="cannot be read"):
    run_folder.read_json(tmp_path / "none.json")
