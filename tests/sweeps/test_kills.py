"""Sweeps whose workers, runners and server are killed end as one left alone."""

import collections
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from dsmoe.sweeps import results
from tests.sweeps import fake_runner, fake_sweep, postgres

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
POINTS = [
  {"optim.learning_rate": rate, "balance.bias_update_speed": speed}
  for rate in (5e-4, 2e-3, 8e-3, 3e-2)
  for speed in (0.001, 0.01)
]
LIMIT_SECS = 400


def start(workdir, machine="here", num_workers=2, storage="", secs="0.2") -> subprocess.Popen:
  """Starts a runner of a sweep whose trials sleep `secs` between their ten points."""
  arguments = [str(ROOT / "tests/sweeps/fake_runner.py"), str(workdir), machine]
  env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "FAKE_SECS": secs}
  env["FAKE_HOLD"] = str(workdir / "hold")
  log = open(workdir / f"{machine}.log", "ab")
  return subprocess.Popen(
    [sys.executable, *arguments, str(num_workers), storage],
    cwd=ROOT,
    env=env,
    stdout=log,
    stderr=log,
  )


def workers_of(process: subprocess.Popen) -> list[int]:
  """Returns the workers that a runner has started."""
  path = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
  return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def prepared(folder, points=POINTS, num_seeds=2, max_restarts=5) -> pathlib.Path:
  folder.mkdir(parents=True)
  (folder / "space.json").write_text(json.dumps([points, num_seeds, max_restarts]))
  return folder


def check_as_left_alone(sweep: results.Sweep, num_seeds=2) -> None:
  """Checks that every trial is complete once, with the values that an uninterrupted run has."""
  seeds = range(num_seeds)
  expected = [(point, seed) for point in POINTS for seed in seeds]
  last = fake_runner.config().num_steps
  assert [(t.params, t.seed) for t in sweep.trials] == expected
  assert [(t.state, t.error) for t in sweep.trials] == [("complete", "")] * len(expected)
  assert [t.value for t in sweep.trials] == [fake_sweep.loss(p, s, last) for p, s in expected]


def finished(process: subprocess.Popen) -> int:
  try:
    return process.wait(LIMIT_SECS)
  finally:
    process.kill()


@pytest.mark.slow
def test_kills_of_workers_and_runners(tmp_path):
  folder = prepared(tmp_path / "killed")
  chance = random.Random(20)
  kills = ["worker"] * 10 + ["runner"] * 3
  chance.shuffle(kills)
  runner = start(folder)
  done = collections.Counter()
  while kills:
    time.sleep(chance.uniform(0.2, 2.5))
    assert runner.poll() is None, (folder / "here.log").read_text()[-2000:]
    if kills[-1] == "runner":
      runner.kill()
      runner.wait()
      runner = start(folder)
    elif running := workers_of(runner):
      try:
        os.kill(chance.choice(running), signal.SIGKILL)
      except ProcessLookupError:  # one killed before, which its runner has noticed since
        continue
    else:
      continue
    done[kills.pop()] += 1
  assert done == {"worker": 10, "runner": 3}
  assert finished(runner) == 0
  check_as_left_alone(results.read(folder))


@pytest.mark.slow
def test_two_machines_and_a_server_that_is_started_again(tmp_path):
  with postgres.Server() as server:
    folder = prepared(tmp_path / "two")
    (folder / "hold").touch()  # trials go on when both machines have one, and the server is gone
    runners = [start(folder, name, 1, server.url, "0.1") for name in ("one", "other")]
    while sum("trial" in log.read_text() for log in folder.glob("logs/*.log")) < 2:
      for name, runner in zip(("one", "other"), runners):
        assert runner.poll() is None, (folder / f"{name}.log").read_text()[-2000:]
      time.sleep(0.1)
    server.stop()
    (folder / "hold").unlink()
    time.sleep(1)
    server.start()
    assert [finished(runner) for runner in runners] == [0, 0]
    check_as_left_alone(results.read(folder, server.url))
    other = prepared(tmp_path / "else" / "two")
    assert finished(start(other, storage=server.url)) != 0
    assert "must have one sweep of a name, and the study 'two'" in (other / "here.log").read_text()
    assert not (other / "sweep.json").exists()
    assert "secret" not in "".join(p.read_text() for p in folder.glob("*.log"))


@pytest.mark.slow
def test_a_sweep_is_handed_back_and_goes_on(tmp_path):
  points = [{"optim.learning_rate": rate} for rate in (2.0, 0.5, 1e-3)]
  folder = prepared(tmp_path / "back", points, 1, 1)
  (folder / "hold").touch()  # the last trial waits for the signal; the one before it comes less far
  runner = start(folder, num_workers=1, secs="0.1")
  while not list(folder.glob("trials/0002/saved.json")):
    assert runner.poll() is None, (folder / "here.log").read_text()[-2000:]
    time.sleep(0.05)
  runner.send_signal(signal.SIGTERM)
  assert finished(runner) == 3
  sweep = results.read(folder)
  assert [trial.state for trial in sweep.trials] == ["failed", "failed", "waiting"]
  assert sweep.trials[0].error == "optim.learning_rate must be at most 1, got 2.0"
  assert "at most 1 times in a row after the same point" in sweep.trials[1].error
  (folder / "hold").unlink()
  assert finished(start(folder, num_workers=1)) == 0
  assert results.read(folder).trials[2].state == "complete"
