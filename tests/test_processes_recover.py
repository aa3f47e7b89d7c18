"""Two processes that skip a bad step, go back from one, and go on from copies of checkpoints."""

import json
import shutil

import pytest

from dsmoe.reporting import goodput, metrics
from tests import runs
from tests.helpers import assert_close

BAD = "4,6"  # the batches of which process 1 reads a row that is not finite
FLAGS = (
  "--config.data.validation_globs=()",
  "--config.model.num_nextn_predict_layers=0",
  "--config.log.log_every_steps=1",
  "--config.mesh.data=2",
  "--config.num_steps=8",
  "--elastic",
)


def both(workdir, *flags):
  """Runs two processes to their end; returns the output of the first."""
  program = ["tests/bad_batches.py", BAD]
  first, second = map(
    runs.finish, runs.start_processes(workdir, 2, *FLAGS, *flags, program=program)
  )
  assert first[0] == second[0] == 0, first[1] + first[2] + second[1] + second[2]
  assert "[Gloo] Rank" not in first[1] + second[1] and "step" not in second[1]
  return first[1]


def alone(workdir, *flags):
  runs.run(
    "tests/bad_batches.py",
    BAD,
    f"--config={runs.SHORT_RUN}",
    f"--workdir={workdir}",
    *FLAGS,
    *flags,
  )


def column(workdir, name):
  return [(row["step"], row[name]) for row in metrics.read_metrics(workdir) if name in row]


def assert_same_run(workdir, expected):
  """Compares what the runs have counted exactly, and their losses."""
  for name in ("skipped_steps", "rewinds", "bad_step", "tokens"):
    assert column(workdir, name) == column(expected, name)
  (steps, losses), (same_steps, expected_losses) = (
    zip(*column(folder, "loss")) for folder in (workdir, expected)
  )
  assert steps == same_steps
  assert_close(losses, expected_losses, "model_float32")


def checksums(workdir):
  """Returns the checksums of the last checkpoint's arrays, which are compared when it is saved."""
  return json.loads((workdir / "checkpoints" / "8" / "checksums" / "metadata").read_text())


@pytest.mark.slow
def test_two_processes_skip_the_same_steps(tmp_path):
  skip = "--config.recovery.bad_step=skip"
  out = both(tmp_path / "two", skip)
  assert "must be finite, at step 7; skipped (2 so far, 1 of at most 10 in a row)" in out
  alone(tmp_path / "one", skip)
  assert_same_run(tmp_path / "two", tmp_path / "one")
  assert column(tmp_path / "two", "skipped_steps") == [(n, int(n in (5, 7))) for n in range(1, 9)]


@pytest.mark.slow
def test_two_processes_go_back_alike_and_a_new_workdir_goes_on_from_copies(tmp_path):
  """Both go back to step 3, twice; a fresh workdir fetches the copy of step 6 and ends bitwise."""
  copies, two, new = (tmp_path / name for name in ("copies", "two", "new"))
  rewind = "--config.recovery.bad_step=rewind"
  copied = (f"--config.checkpoint.copy_to={copies}", "--config.checkpoint.copy_every_steps=3")
  out = both(two, rewind, *copied)
  assert "must be finite, at step 5; back to step 3 (2 returns so far, 2 of at most 10" in out
  for process in range(2):
    lines = map(json.loads, goodput.file_of(two, process).read_text().splitlines())
    returns = [row["resumed_from"] for row in lines if "resumed_from" in row and "began" not in row]
    assert returns == [3, 3]
  alone(tmp_path / "one", rewind)
  assert_same_run(two, tmp_path / "one")

  shutil.rmtree(copies / "checkpoints" / "8")  # as if the disk had been lost before the last copy
  out = both(new, rewind, *copied)
  assert f"fetched checkpoint 6 from {copies}" in out and "resumed from step 6" in out
  for workdir in (new, copies):
    assert checksums(workdir) == checksums(two)
  assert runs.comparable_metrics(new) == runs.comparable_metrics(two)
