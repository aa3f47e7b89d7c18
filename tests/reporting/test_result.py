"""result.json by itself: how a start ended, what is read back, and what is refused."""

import json
import math
import shutil
import subprocess

import pytest

from dsmoe.reporting import code_version, result
from tests.reporting.test_goodput import Clock, begin

ABOUT = {"config": {"num_steps": 9, "model": {"vocab_size": 96}}, "versions": {"jax": "0.10.2"}}
ABOUT |= {"git": {"commit": "a" * 40, "is_changed": True}, "dataset_sha256": "b" * 64}


def point(step, loss, checksum=5):
  return result.Point(step, step * 100, loss, None, 448, checksum)


def end(workdir, points, error=None, why="", check_owner=lambda: None):
  """Makes a start that ends after step 7; returns its record."""
  clock = Clock(1000.0)
  log = begin(workdir, clock, before=3)
  record = result.Record(workdir, log, check_owner)
  with record, log:
    log.start(0, 1, step_flops=1e12)
    record.about, record.has_begun = dict(ABOUT), True
    record.points, record.step, record.tokens, record.why = points, 7, 700, why
    log.enter("step")
    clock.pass_secs(40)
    log.write(7)
    if error is not None:
      raise error
  return record


def test_what_is_written_is_read(tmp_path):
  points = [point(2, 1.0, checksum=4), point(4, 3.5), point(6, 3.25), point(7, math.nan)]
  record = end(tmp_path, points, why="pruned")
  found = result.read(tmp_path)
  assert found.why == record.result.why == "pruned" and found.error is None
  assert found.best == record.result.best == points[2]  # of the last curve, which is another's
  assert found.final[:2] == (7, 700) and math.isnan(found.final.loss)
  assert found.final[3:] == points[3][3:]
  assert (found.step, found.tokens, found.seconds, found.num_starts) == (7, 700, 43, 1)
  assert found.seconds_of_all_starts == 43
  assert {name: secs for name, secs in found.seconds_by_kind.items() if secs} == {
    "start_up": 3,
    "step": 40,
  }
  assert (found.model_flops, found.model_flops_made_again) == (7e12, 0)
  assert (found.num_devices, found.num_processes, found.device_kind) == (8, 1, "cpu")
  assert {name: getattr(found, name) for name in ABOUT} == ABOUT
  assert found.result._replace(final=None) == record.result._replace(final=None)
  assert sorted(json.loads((tmp_path / "result.json").read_text())) == sorted(found._fields)
  assert [path.name for path in tmp_path.glob("result*")] == ["result.json"]


@pytest.mark.parametrize(
  ("error", "why", "name"),
  [
    (GeneratorExit(), "closed", None),
    (KeyboardInterrupt(), "stopped by SIGINT", None),
    (RuntimeError("out of memory"), "out of memory", "RuntimeError"),
    (ValueError(), "ValueError", "ValueError"),
  ],
)
def test_an_end_by_an_error_says_which(tmp_path, error, why, name):
  with pytest.raises(type(error)):
    end(tmp_path, [], error)
  found = result.read(tmp_path)
  assert (found.why, found.error, found.final, found.best) == (why, name, None, None)
  assert found.result == result.Result(7, 700, 43.0, 7e12, why, None, None)


def test_a_workdir_of_another_process_is_left_alone(tmp_path):
  def refuse():
    raise ValueError("in use by another")

  with pytest.raises(ValueError, match="in use"):
    end(tmp_path, [], check_owner=refuse)
  with pytest.raises(RuntimeError, match="out of memory"):  # which is what ends the run
    end(tmp_path, [], RuntimeError("out of memory"), check_owner=refuse)
  assert not (tmp_path / "result.json").exists()


def test_a_damaged_goodput_log_leaves_its_figures_out(tmp_path):
  (tmp_path / "goodput.jsonl").write_text("damaged\n{}\n")
  record = end(tmp_path, [])
  found = result.read(tmp_path)
  assert math.isnan(record.result.flops) and math.isnan(found.result.flops)
  assert found.seconds_by_kind is found.num_starts is found.seconds_of_all_starts is None
  assert found.model_flops is found.model_flops_made_again is None and found.seconds == 43


def test_what_is_no_result_is_refused(tmp_path):
  with pytest.raises(
    ValueError, match=r"must hold result.json, which a run writes at its end, got"
  ):
    result.read(tmp_path)
  end(tmp_path, [point(7, 2.5)])
  path = tmp_path / "result.json"
  values = json.loads(path.read_text())
  for change, message in (
    ({"format": 2}, "must have format 1, .* got 2"),
    ({"step": "7"}, r"is damaged \(TypeError\(\"step is '7'\"\)\): start the run again"),
    ({"seconds": None}, "seconds is None"),
    ({"final": {"step": 3}}, "is damaged.*loss"),
    ({"other": 1}, "is damaged.*other"),
  ):
    path.write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=message):
      result.read(tmp_path)
  for text in ("", "[]", '{"format": 1}', json.dumps(values)[:-9], "[" * 100_000):
    path.write_text(text)
    with pytest.raises(ValueError, match="it must be the JSON object that a run wrote, it is dam"):
      result.read(tmp_path)


def test_points_have_the_tokens_that_were_read():
  """At a step that was logged its own, else so many more as the steps since have read."""
  rows = [{"step": 2, "validation_loss": 5.0, "validation_tokens": 448}]
  rows += [{"step": 3, "loss": 1.0, "tokens": 1000}, {"step": 3, "validation_loss": None}]
  rows += [{"step": 5, "validation_loss": 4.0, "whole_validation_loss": 4.5}]
  found = list(result.points_of(rows, step_tokens=10))
  assert [(p.step, p.tokens, p.loss) for p in found[::2]] == [(2, 20, 5.0), (5, 1020, 4.0)]
  assert found[0].validation_tokens == 448 and found[2].whole_loss == 4.5
  assert found[1].tokens == 1000 and math.isnan(found[1].loss)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_a_checkout(tmp_path):
  def git(*arguments):
    names = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(tmp_path), *names, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

  assert code_version.git(tmp_path) is None
  git("init", "-q")
  (tmp_path / "dsmoe").mkdir()
  (tmp_path / "dsmoe" / "__init__.py").write_text("1\n")
  (tmp_path / "notes").write_text("1\n")
  git("add", "notes")
  git("commit", "-q", "-m", "notes")
  assert code_version.git(tmp_path) is None  # of another project, into which the code was installed
  git("add", "dsmoe")
  git("commit", "-q", "-m", "code")
  commit = git("rev-parse", "HEAD")
  (tmp_path / "runs").write_text("not of the project\n")
  assert code_version.git(tmp_path) == {"commit": commit, "is_changed": False}
  (tmp_path / "dsmoe" / "__init__.py").write_text("2\n")
  assert code_version.git(tmp_path) == {"commit": commit, "is_changed": True}
