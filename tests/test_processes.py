"""Runs of two processes on this machine: the numbers of one, one writer, ends that are agreed on."""

import signal
import socket

import pytest

from dsmoe import runtime
from dsmoe.reporting import metrics
from tests import runs
from tests.helpers import assert_close


def start(workdir, *overrides, of_each=((), ())):
  """Starts the short run as two processes, its experts split between them."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    coordinator = f"localhost:{free.getsockname()[1]}"
  split = ("--config.mesh.expert=2", "--config.model.dispatch=all_gather", *overrides)
  flags = (f"--coordinator={coordinator}", "--num_processes=2")
  return [
    runs.start_training(workdir, *split, *flags, f"--process_id={i}", *of_each[i]) for i in range(2)
  ]


def steps_and_losses(workdir):
  rows = [row for row in metrics.read_metrics(workdir) if "loss" in row]
  return [row["step"] for row in rows], [row["loss"] for row in rows]


@pytest.mark.slow
def test_two_processes_are_stopped_killed_and_go_on_as_one_would(tmp_path):
  """SIGTERM reaches one of them, and both save the same step; one goes on alone, then both."""
  expected = tmp_path / "one"
  code, out, err = runs.finish(runs.start_training(expected, "--config.num_steps=30"))
  assert code == 0, out + err
  workdir = tmp_path / "two"

  both = start(workdir, "--config.num_steps=30")
  assert runs.wait_for(lambda: runs.logged_lines(workdir) >= 3, both[0])
  both[1].send_signal(signal.SIGTERM)
  (code, out, err), (other_code, other_out, _) = map(runs.finish, both)
  assert (code, other_code) == (0, 0), out + err
  [line] = [line for line in out.splitlines() if line.startswith("stopped by SIGTERM; saved at")]
  assert "saved at" not in other_out
  stopped = int(line.split()[-1])

  alone = runs.start_training(workdir, "--config.num_steps=30", "--allow_config_change")
  assert runs.wait_for(lambda: steps_and_losses(workdir)[0][-1] > stopped + 1, alone)
  alone.send_signal(signal.SIGTERM)
  code, out, err = runs.finish(alone)
  assert code == 0 and f"resumed from step {stopped}" in out, out + err

  both = start(workdir, "--config.num_steps=30", "--allow_config_change")
  assert runs.wait_for(lambda: steps_and_losses(workdir)[0][-1] > stopped + 8, both[0])
  both[1].kill()
  code, out, err = runs.finish(both[0])
  runs.finish(both[1])
  # In the midst of a save JAX's service ends the process, when it misses the other's heartbeat.
  assert code in (75, -signal.SIGABRT), out + err
  assert "process 0 of 2 lost another process" in err or "another task died" in err, out + err

  both = start(workdir, "--config.num_steps=30", "--allow_config_change")
  ended = [runs.finish(process) for process in both]
  assert [code for code, *_ in ended] == [0, 0], ended
  steps, losses = steps_and_losses(workdir)
  expected_steps, expected_losses = steps_and_losses(expected)
  assert steps == expected_steps == list(range(2, 31, 2))
  assert_close(losses, expected_losses, "model_float32")


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_both(tmp_path):
  rates = tuple((f"--config.optim.learning_rate=1e-{i + 3}",) for i in range(2))
  nowhere = ((), (f"--config.data.train_globs=('{tmp_path}/nowhere',)",))
  for of_each, message in (
    (rates, "the same config; between process 0 and process 1 differ: optim.learning_rate: 0.001"),
    (nowhere, "process 1: every glob of data.train_globs must match a file"),
  ):
    (code, _, err), (other_code, _, other_err) = map(
      runs.finish, start(tmp_path / "run", of_each=of_each)
    )
    assert (code, other_code) == (2, 2), err + other_err
    assert "Traceback" not in err + other_err and message in err
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("localhost:1234", 2, None), "go together, got localhost:1234, 2 and None"),
    (("localhost", 2, 0), "must be an address and a port, got 'localhost'"),
    (("localhost:1234", 2, 2), r"--process_id \(2\) must be below --num_processes \(2\)"),
  ],
)
def test_bad_ways_to_join_are_refused(monkeypatch, arguments, message):
  monkeypatch.setattr(runtime.cpu, "keep_memory", lambda: None)
  with pytest.raises(ValueError, match=message):
    runtime.start(*arguments)


def test_a_process_says_whom_it_waited_for(monkeypatch):
  monkeypatch.setattr(runtime.cpu, "keep_memory", lambda: None)
  monkeypatch.setattr(runtime, "_JOIN_SECS", 0.3)
  with socket.socket() as silent:  # it does not listen
    silent.bind(("localhost", 0))
    coordinator = f"localhost:{silent.getsockname()[1]}"
    with pytest.raises(TimeoutError, match=rf"process 1 of 2 waited 0.3 s for .* at {coordinator}"):
      runtime.start(coordinator, 2, 1)
