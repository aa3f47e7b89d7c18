"""scripts/sweep.py as a user runs it."""

import json
import os
import pathlib
import signal
import time

import pytest

from dsmoe.reporting import metrics
from dsmoe.sweeps import results
from tests import runs
from tests.sweeps import fake_sweep

CONFIG = f"--config={runs.SHORT_RUN}"


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([CONFIG], "has no function sweep(add)"),
    ([CONFIG, "--grid", "batch_size=8", "optim.lr=1,2"], "config.optim has no field 'lr'; did you mean '"),
    (
      [CONFIG, "--grid=batch_size=8", "--storage=postgresql://me:pass@127.0.0.1:9/x"],
      "--storage must be a PostgreSQL server that answers: postgresql+psycopg://me:***@127.0.0.1:9/x",
    ),
    (["--config=experiments/tiny.py", "--trials=0"], "at least one point, and search(trial) gives"),
    (["--status", "--retry_failed"], "--status changes nothing, and --retry_failed must not go with"),
    (["--status"], "a sweep's workdir must have the file sweep.json"),
  ],
)  # fmt: skip
def test_mistakes_end_in_a_sentence_before_anything_is_written(tmp_path, flags, message):
  workdir = tmp_path / "sweep"
  code, out, err = runs.call("scripts/sweep.py", f"--workdir={workdir}", *flags)
  assert (code, out) == (2, "") and message in err and err.count("\n") == 1
  assert not workdir.exists()


def test_status_prints_the_table(tmp_path):
  fake_sweep.make(tmp_path)
  written = tmp_path / "status.json"
  out = runs.run("scripts/sweep.py", f"--workdir={tmp_path}", "--status", f"--json={written}")
  assert "fake: 12 complete, 1 interrupted, 3 waiting, 1 pruned, 1 failed" in " ".join(out.split())
  assert "settings are tied" in out or "is better than" in out
  assert len(json.loads(written.read_text())["trials"]) == 18


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(tmp_path):
  """A worker is killed after the first checkpoint of its first trial."""
  fields = ("num_steps=24", "log.eval_every_steps=6", "balance.bias_freeze_step=20")
  grid = ("--grid", "optim.learning_rate=1e-3,4e-3")
  flags = [f"--config.{field}" for field in fields]
  process = runs.start("scripts/sweep.py", CONFIG, f"--workdir={tmp_path / 'sweep'}", *flags, *grid)
  checkpoints = tmp_path / "sweep" / "trials" / "0000" / "checkpoints"
  while not (checkpoints / "6").exists():  # the one of step 3 is whole by then
    assert process.poll() is None, process.communicate()
    time.sleep(0.05)
  children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
  os.kill(int(children.split()[0]), signal.SIGKILL)
  code, _, err = runs.finish(process)
  assert code == 0 and "was ended by SIGKILL" in err, err
  trials = results.read(tmp_path / "sweep").trials
  assert [trial.state for trial in trials] == ["complete", "complete"]
  alone = tmp_path / "alone"
  first = "--config.optim.learning_rate=1e-3"
  runs.run("-m", "dsmoe.train", CONFIG, f"--workdir={alone}", *flags, first)
  losses = [
    metrics.read_metrics(folder)[-1]["validation_loss"] for folder in (alone, trials[0].workdir)
  ]
  assert trials[0].value == losses[0] == losses[1] != trials[1].value
