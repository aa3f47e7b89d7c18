"""The processes of a run as children: output, signals, codes, and starting them again."""

import contextlib
import os
import signal
import sys
import threading
import time

import pytest

from dsmoe.launching import run as run_lib
from dsmoe.launching import supervise
from dsmoe.launching.supervise import Command


def shell(text: str, held: bool = False) -> Command:
  return Command(["bash", "-c", text], {}, held)


def when(condition, act) -> threading.Thread:
  """Calls `act` in a thread as soon as `condition()`."""

  def wait():
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
      time.sleep(0.01)
    act()

  thread = threading.Thread(target=wait)
  thread.start()
  return thread


@pytest.mark.parametrize(
  "code, again",
  [(0, False), (1, False), (2, False), (75, True), (-9, True), (-6, True), (130, False)]
  + [(137, True), (255, True), (64, False)],
)
def test_which_codes_start_a_run_again(code, again):
  assert run_lib.restarts(code) == again


def test_lines_begin_with_their_process(capfd):
  commands = [shell(f"echo one {i}; echo two {i} >&2") for i in range(3)]
  assert supervise.supervise(lambda _: commands, 0) == 0
  lines = capfd.readouterr().out.splitlines()
  assert sorted(lines) == sorted(f"[{i}] {word} {i}" for i in range(3) for word in ("one", "two"))


def test_a_run_goes_on_when_nobody_reads_its_output(tmp_path, monkeypatch):
  """It writes more than a pipe holds."""
  reader, writer = os.pipe()
  os.close(reader)
  done = tmp_path / "done"
  with open(writer, "w") as closed:
    monkeypatch.setattr(sys, "stdout", closed)
    commands = [shell(f"yes a line | head -c 400000; touch {done}")]
    assert supervise.supervise(lambda _: commands, 0) == 0
    monkeypatch.undo()
    with contextlib.suppress(BrokenPipeError):
      closed.close()
  assert done.exists()


def test_output_in_files(tmp_path, capfd):
  commands = [Command(["bash", "-c", "echo $WHO"], {"WHO": f"process {i}"}) for i in range(2)]
  assert supervise.supervise(lambda _: commands, 0, str(tmp_path / "logs")) == 0
  assert capfd.readouterr().out == ""
  for i in range(2):
    assert (tmp_path / "logs" / f"process_{i}.log").read_text() == f"process {i}\n"


@pytest.mark.parametrize("failure", ["exit 75", "kill -9 $$", "kill -6 $$"])
def test_all_are_started_again(failure, capfd):
  starts = []

  def commands_of(attempt):
    starts.append(attempt)
    return [shell(failure if attempt < 2 else "exit 0"), shell("exit 0")]

  assert supervise.supervise(commands_of, 3) == 0
  assert starts == [0, 1, 2]
  err = capfd.readouterr().err
  assert "process 0 of 2 ended with status" in err
  assert "all are started again, 2 of at most 3 times" in err


@pytest.mark.parametrize("code", [1, 2])
def test_mistakes_end_a_run(code, tmp_path, capfd):
  """Although another process, which lost the one that made it, ends with a code that restarts."""
  starts, file = [], tmp_path / "process"
  lost = (
    f"until [ -s {file} ]; do sleep 0.02; done; while kill -0 $(cat {file}); do sleep 0.02; done"
  )
  commands = [shell(f"{lost}; exit 75"), shell(f"echo $$ > {file}; exit {code}")]
  assert supervise.supervise(lambda n: starts.append(n) or commands, 3) == code
  assert starts == [0]
  assert f"process 1 of 2 ended with status {code}, after which" in capfd.readouterr().err


def test_restarts_have_a_limit(capfd):
  starts = []
  dies = [shell("kill -9 $$")]
  assert supervise.supervise(lambda n: starts.append(n) or dies, 2) == 137
  assert starts == [0, 1, 2]
  assert "was started again 2 times, no more than --max_restarts" in capfd.readouterr().err


def test_one_that_hangs_after_anothers_failure_is_killed(monkeypatch, capfd):
  monkeypatch.setattr(supervise, "_LEAVE_SECS", 0.2)
  hangs = shell("trap '' TERM; for _ in $(seq 1000); do sleep 0.1; done")
  assert supervise.supervise(lambda _: [hangs, shell("exit 75")], 0) == 75
  assert "processes [0] are killed" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_handed_to_all(number, tmp_path, capfd):
  """To children by the signal, to those on other hosts by the end of their input."""
  waits = "for ((i = 0; i < 1000; i++)); do sleep 0.05; done"
  commands = [
    shell(f"trap 'echo got it; exit 0' {number.name[3:]}; touch {tmp_path}/0; {waits}"),
    shell(f"touch {tmp_path}/1; cat; echo ended", held=True),
  ]
  thread = when(lambda: len(list(tmp_path.iterdir())) == 2, lambda: os.kill(os.getpid(), number))
  starts = []
  before = signal.getsignal(number)
  assert supervise.supervise(lambda n: starts.append(n) or commands, 3) == 0
  thread.join()
  assert starts == [0] and signal.getsignal(number) is before
  assert sorted(capfd.readouterr().out.splitlines()) == ["[0] got it", "[1] ended"]


def test_a_stopped_run_is_not_started_again(tmp_path, monkeypatch, capfd):
  """Although its processes, before they can save, die by the signal; a third one kills."""
  stubborn = shell(f"trap '' TERM; touch {tmp_path}/up; for _ in $(seq 1000); do sleep 0.1; done")
  hand, handed = supervise._hand, []

  def noted(child, command, number):
    handed.append(number)
    hand(child, command, number)

  def thrice():
    """Each when the one before it was handed on: two that come together are one."""
    for count in range(3):
      os.kill(os.getpid(), signal.SIGTERM)
      when(lambda count=count: len(handed) > count, lambda: None).join()

  monkeypatch.setattr(supervise, "_hand", noted)
  thread = when((tmp_path / "up").exists, thrice)
  assert supervise.supervise(lambda _: [stubborn], 3) == 137
  thread.join()
  assert handed == [signal.SIGTERM, signal.SIGTERM, signal.SIGKILL]
  assert "status 137 after SIGTERM" in capfd.readouterr().err


def test_a_program_that_is_not_there_ends_the_others():
  with pytest.raises(OSError, match="no_such_program"):
    supervise.supervise(lambda _: [shell("sleep 60"), Command(["no_such_program"], {})], 3)


@pytest.mark.parametrize(
  "name, workdir, expected",
  [
    (None, "runs/Tiny_1.5e-3/", "tiny-1-5e-3"),
    (None, "gs://bucket/7b", "run-7b"),
    ("my-run", "runs/x", "my-run"),
    (None, "runs/" + "a" * 80, "a" * 40),
  ],
)
def test_names_of_jobs(name, workdir, expected):
  assert run_lib.job_name(name, workdir) == expected


@pytest.mark.parametrize("name", ["", "A", "a_b", "-a", "a-", "1a", "a" * 41])
def test_names_that_kubernetes_refuses(name):
  with pytest.raises(ValueError, match="--name must have at most 40 letters"):
    run_lib.job_name(name, "runs/x")
