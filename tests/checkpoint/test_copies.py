"""Tests of copies of checkpoints: dsmoe/checkpoint/copies.py, folders.py and second_folder.py."""

import pathlib
import shutil
import threading
import time

import numpy as np
import pytest

from dsmoe import checkpoint
from dsmoe.checkpoint import folders, second_folder
from dsmoe.config import CheckpointConfig
from dsmoe.training.train_step import TrainState
from tests.helpers import small_config
from tests.runs import assert_bitwise_equal, checkpoint_arrays


def config_of(copy_to, every=2, copy_keep=0, keep_last=1):
  return CheckpointConfig(1, keep_last, 0, str(copy_to), every, copy_keep)


def state_of(step, seed=0):
  rng = np.random.default_rng([step, seed])
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  return TrainState(
    np.array(step, np.int32), {"w": draw(30, 7), "b": draw(3)}, {"mu": draw(30, 7)}, {"e": draw(5)}
  )


def settle(checkpoints):
  """Waits until nothing is being copied."""
  end = time.monotonic() + 60
  while checkpoints._copies.in_use() and time.monotonic() < end:
    time.sleep(0.01)
  assert not checkpoints._copies.in_use()


def save(workdir, config, steps, seed=0):
  """Saves states, each copied before the next one is saved."""
  with checkpoint.Checkpointer(workdir, config) as checkpoints:
    for step in steps:
      checkpoints.save(state_of(step, seed), {"batch": step})
      checkpoints.wait()
      settle(checkpoints)


def contents_of(folder):
  """Returns the bytes of each file by its name."""
  paths = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
  return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_holds(workdir, step, seed=0):
  """Checks a checkpoint against the state it was made from."""
  state = state_of(step, seed)
  found = checkpoint_arrays(workdir, step)
  expected = {"['step']": state.step, "['params']['w']": state.params["w"]}
  expected |= {"['params']['b']": state.params["b"], "['opt_state']['mu']": state.opt_state["mu"]}
  assert_bitwise_equal(found, expected | {"['router_bias']['e']": state.router_bias["e"]})


@pytest.fixture(params=["disk", "store"])
def copy_to(request, tmp_path, monkeypatch):
  """A folder for copies; one is treated as object stores are, where nothing is renamed."""
  path = tmp_path / request.param / "copy"
  monkeypatch.setattr(folders, "_commits_by_file", lambda path: "/store/" in str(path))
  return path


def test_copies_follow_their_rhythm_and_are_bitwise_whole(tmp_path, copy_to):
  """Every second step and the last one, though the workdir keeps only the newest."""
  save(tmp_path / "run", config_of(copy_to), range(1, 6))
  assert folders.steps_in(copy_to) == [2, 4, 5]
  for step in (2, 4, 5):
    assert_holds(copy_to, step)
  assert folders.steps_in(tmp_path / "run")[-1] == 5
  ours, theirs = (path / "checkpoints" / "5" for path in (tmp_path / "run", copy_to))
  assert contents_of(ours) == contents_of(theirs)


def test_a_workdir_without_checkpoints_goes_on_from_the_newest_copy(tmp_path, copy_to, capfd):
  save(tmp_path / "run", config_of(copy_to), (2, 4))
  (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 4}\n')
  (tmp_path / "run" / "config.before_step_2.json").write_text("{}")
  save(tmp_path / "run", config_of(copy_to), (6,))
  shutil.rmtree(tmp_path / "run")
  with checkpoint.Checkpointer(tmp_path / "new", config_of(copy_to)) as checkpoints:
    assert checkpoints.find_step() == 6
    restored, position = checkpoints.restore(state_of(6), 6)
  assert position == {"batch": 6}
  np.testing.assert_array_equal(restored.params["w"], state_of(6).params["w"])
  assert (tmp_path / "new" / "metrics.jsonl").read_text() == '{"step": 4}\n'
  assert (tmp_path / "new" / "config.before_step_2.json").exists()
  said = f"fetched checkpoint 6 from {copy_to}, as {tmp_path / 'new'} does not have it\n"
  assert said in capfd.readouterr().out
  # A step that is wanted is fetched too; none is where the workdir has what it needs.
  with checkpoint.Checkpointer(tmp_path / "new", config_of(copy_to), 2) as checkpoints:
    assert checkpoints.find_step(2) == 2
  assert second_folder._fetch(tmp_path / "new", copy_to, None) is None
  assert second_folder._fetch(tmp_path / "new", copy_to, 3) is None


class Killed(BaseException):
  """Ends what is being done at once, as SIGKILL does."""


@pytest.mark.parametrize("work", ["copy", "delete", "move"])
def test_what_a_kill_leaves_is_no_copy(tmp_path, copy_to, monkeypatch, work):
  """Before each access to a file or folder in turn; nothing cleans up."""
  save(tmp_path / "run", config_of(copy_to), (2, 4))
  source, target = (path / "checkpoints" / "4" for path in (tmp_path / "run", copy_to))
  whole = contents_of(source)
  monkeypatch.setattr(folders, "_FILES_AT_ONCE", 1)  # a thread that dies is the last one
  path_class = type(folders.contents.step_folder(copy_to, 4))
  left = None

  def counted(name):
    original = getattr(path_class, name)

    def access(self, *args, **kwargs):
      nonlocal left
      left -= 1
      if left < 0:
        raise Killed
      return original(self, *args, **kwargs)

    return access

  aside = copy_to / "aside" / "4"
  num_killed = 0
  for number in range(1000):
    for path in (target.parent, aside.parent):
      shutil.rmtree(path, ignore_errors=True)
    aside.parent.mkdir()
    if work != "copy":
      shutil.copytree(source, target)
    ours, theirs, there = map(path_class, (source, target, aside))
    left = number
    with monkeypatch.context() as patch:
      for name in ("mkdir", "open", "write_text", "rename", "unlink", "rmtree"):
        patch.setattr(path_class, name, counted(name))
      try:
        if work == "copy":
          folders.copy_folder(ours, theirs)
        else:
          folders.delete(theirs) if work == "delete" else folders.move(theirs, there)
        break
      except Killed:
        num_killed += 1
    complete = [path for path in (target, aside) if folders.is_complete(path_class(path))]
    assert all(contents_of(path) == whole for path in complete)
    assert complete or work != "move"
  is_long = work == "copy" or (work == "move" and "/store/" in str(copy_to))
  assert num_killed >= (30 if is_long else 1)
  kept = {"copy": target, "move": aside}.get(work)
  assert kept is None or contents_of(kept) == whole
  assert work == "copy" or not target.exists()


def test_a_half_copy_is_passed_over_and_deleted(tmp_path, copy_to):
  save(tmp_path / "run", config_of(copy_to), (2, 4))
  name = "4" if "/store/" in str(copy_to) else "4.orbax-checkpoint-tmp"
  newest = copy_to / "checkpoints" / "4"
  (newest / "commit_success.txt").unlink()
  newest.rename(newest.with_name(name))
  shutil.rmtree(tmp_path / "run")
  save(tmp_path / "run", config_of(copy_to, every=3), (3,))  # goes on from 2
  assert_holds(tmp_path / "run", 3)
  assert folders.steps_in(copy_to) == [2, 3]
  assert sorted(path.name for path in (copy_to / "checkpoints").iterdir()) == ["2", "3"]


def test_a_failing_copy_does_not_end_the_run(tmp_path, monkeypatch, capfd):
  """It is said once, and tried again with the next one."""
  copy_folder, failing = folders.copy_folder, True

  def copy(source, target, *args):
    if failing:
      raise OSError("no space\nleft")
    copy_folder(source, target, *args)

  monkeypatch.setattr(folders, "copy_folder", copy)
  config = config_of(tmp_path / "copy")
  with checkpoint.Checkpointer(tmp_path / "run", config) as checkpoints:
    for step in (2, 4, 6):
      failing = step < 6
      checkpoints.save(state_of(step), step)
      checkpoints.wait()
      settle(checkpoints)
    out = capfd.readouterr().out
    assert out.count("not copied") == 1
    assert (
      f"checkpoint 2 is not copied to {tmp_path / 'copy'} (no space left); the run goes on" in out
    )
    checkpoints.save(state_of(7), 7)
    failing = True
  assert "checkpoint 7 is not copied" in capfd.readouterr().out
  assert folders.steps_in(tmp_path / "copy") == [6]
  failing = False
  save(tmp_path / "run", config, ())  # the same command again
  assert folders.steps_in(tmp_path / "copy") == [6, 7]


def test_saving_does_not_wait_for_a_slow_copy(tmp_path, monkeypatch, capfd):
  """What is being copied is not deleted; of what waits for its turn the newest is copied."""
  copy_folder, started, go_on, beats = folders.copy_folder, threading.Event(), threading.Event(), []

  def copy(*args):
    started.set()
    assert go_on.wait(60)
    copy_folder(*args)

  def beat():
    beats.append(len(beats))
    go_on.set()

  monkeypatch.setattr(folders, "copy_folder", copy)
  config = config_of(tmp_path / "copy")
  with checkpoint.Checkpointer(tmp_path / "run", config, None, beat) as checkpoints:
    checkpoints.save(state_of(2), 2)
    assert started.wait(60)
    for step in (4, 6, 7):
      checkpoints.save(state_of(step), step)
    checkpoints.wait()
    assert folders.steps_in(tmp_path / "run") == [2, 6, 7]
  assert beats and folders.steps_in(tmp_path / "copy") == [2, 7]
  assert f"waiting for the copy of checkpoint 2 to {tmp_path / 'copy'}: " in capfd.readouterr().out
  for step in (2, 7):
    assert_holds(tmp_path / "copy", step)


def test_old_copies_are_deleted(tmp_path, copy_to):
  save(tmp_path / "run", config_of(copy_to, copy_keep=2), (2, 4, 6, 8))
  assert [path.name for path in sorted((copy_to / "checkpoints").iterdir())] == ["6", "8"]


def test_copies_of_an_abandoned_future_are_set_aside(tmp_path, copy_to):
  config = config_of(copy_to, keep_last=9)
  save(tmp_path / "run", config, (2, 4, 6))
  with checkpoint.Checkpointer(tmp_path / "run", config, 2) as checkpoints:
    checkpoints.set_later_aside(2)
    checkpoints.save(state_of(4, seed=1), {})
  assert folders.steps_in(copy_to) == [2, 4]
  assert_holds(copy_to, 4, seed=1)
  aside = copy_to / "checkpoints_after_step_2"
  assert sorted(path.name for path in aside.iterdir()) == ["4", "6"]


@pytest.mark.parametrize("name", ["run", "run/copy", "."])
def test_copies_inside_the_workdir_are_refused(tmp_path, name):
  with pytest.raises(ValueError, match="copy_to must be a folder outside the workdir, got"):
    checkpoint.Checkpointer(tmp_path / "run", config_of(tmp_path / name))


def test_another_run_that_copies_to_the_same_folder_is_refused(tmp_path):
  with checkpoint.Checkpointer(tmp_path / "one", config_of(tmp_path / "copy")):
    with pytest.raises(ValueError, match="copy must have one run at a time, and is in use by"):
      checkpoint.Checkpointer(tmp_path / "other", config_of(tmp_path / "copy"))
  save(tmp_path / "other", config_of(tmp_path / "copy"), (2,))


def test_a_run_that_fails_copies_what_it_saved_and_an_interrupted_one_does_not_wait(tmp_path):
  for name, kind, expected in (("a", RuntimeError, [3]), ("b", KeyboardInterrupt, [])):
    config = config_of(tmp_path / name / "copy")
    with pytest.raises(kind):
      with checkpoint.Checkpointer(tmp_path / name / "run", config) as checkpoints:
        checkpoints.save(state_of(3), 3)
        raise kind
    assert folders.steps_in(tmp_path / name / "run") == [3]
    assert folders.steps_in(tmp_path / name / "copy") == expected


def test_the_copy_is_a_workdir_with_config_and_tokenizer(tmp_path):
  """The tokenised text may be on a disk of another host."""
  cache, workdir, copy_to = (tmp_path / name for name in ("cache", "run", "copy"))
  cache.mkdir()
  for name in ("tokenizer.json", "tokenizer_config.json", "inputs.json", "manifest.json"):
    (cache / name).write_text(f'"{name}"')
  config = small_config(**{"data.cache_dir": str(cache)})
  checkpoint.record_config(workdir, config, 0)
  assert checkpoint.tokenizer_path(config, workdir) == cache / "tokenizer.json"
  save(workdir, config_of(copy_to), (2,))
  shutil.rmtree(cache)
  assert checkpoint.load_config(copy_to) == config
  path = pathlib.Path(checkpoint.tokenizer_path(config, copy_to))
  assert path == copy_to / "data" / "tokenizer.json" and path.read_text() == '"tokenizer.json"'
  found = sorted(path.name for path in (copy_to / "data").iterdir())
  assert found == ["inputs.json", "tokenizer.json", "tokenizer_config.json"]


def test_a_workdir_that_another_process_does_not_see_is_refused(tmp_path, monkeypatch):
  """As the second process finds it, which does not write the file that is looked for."""
  monkeypatch.setattr(second_folder.jax, "process_count", lambda: 2)
  monkeypatch.setattr(second_folder.processes, "is_first", lambda: False)
  monkeypatch.setattr(second_folder.processes, "exchange", lambda text: [text, text])
  with pytest.raises(
    ValueError, match="must be one folder that all processes see, which the first"
  ):
    second_folder._check_folders(tmp_path / "run", str(tmp_path / "copy"))
