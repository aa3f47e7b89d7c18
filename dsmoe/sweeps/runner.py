"""Keeps a sweep's workers on this machine running until every trial is finished."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from etils import epath

from dsmoe.sweeps import worker
from dsmoe.sweeps.devices import Slot

LOGS = "logs"
WORKER = (sys.executable, "-m", "dsmoe.sweeps.worker")
_POLL_SECS = 0.2
_SHOW_SECS = 2.0
_MAX_ERRORS = 5  # of a worker, before its slot is given up; a kill is none
_LONGEST_PAUSE_SECS = 60.0
_LINE_BYTES = 4096  # of a log, at its end, in which its last line is looked for


class Ended(Exception):
  """All workers of this machine have ended with an error; str() is one of the errors."""


class _Worker:
  """The present process of a slot, and what became of those before it."""

  def __init__(self, slot: Slot, command: Sequence[str], env: dict[str, str], log: pathlib.Path):
    self.slot, self._log = slot, log
    self._command = [*command, f"--slot={slot.name}"]
    if slot.cores:
      self._command.append(f"--cores={','.join(map(str, slot.cores))}")
    self._env = env | slot.env
    self.process: subprocess.Popen | None = None
    self.is_over = False
    self.error = ""
    self._errors = 0
    self._begin = 0  # of what the present process prints, in the log
    self._starts_at = 0.0

  def start_if_due(self) -> None:
    """Starts a process unless there is one, or none should be started yet or again."""
    if self.process is not None or self.is_over or time.monotonic() < self._starts_at:
      return
    with open(self._log, "ab") as log:
      self._begin = log.seek(0, os.SEEK_END)
      # It ends with its standard input, so it ends when this process does, however that ends.
      self.process = subprocess.Popen(
        self._command,
        env=self._env,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,  # Ctrl-C in a terminal is for this process, which hands it on
      )

  def note_end(self, say: Callable[[str], None], is_stopping: bool) -> None:
    """Notes whether the process has ended, and whether another takes its place."""
    if self.process is None or (code := self.process.poll()) is None:
      return
    assert self.process.stdin is not None
    self.process.stdin.close()
    self.process = None
    if code == 0:  # there is nothing left, or it was told to hand back what it had
      self.is_over = True
    elif code < 0:
      then = "" if is_stopping else "; another takes its place"
      say(f"{self.slot.name} was ended by {signal.Signals(-code).name}{then}")
    else:
      self.error = self.last_line().removeprefix("error: ") or "it printed nothing"
      self._errors += 1
      self.is_over = code == 2 or self._errors >= _MAX_ERRORS
      pause = min(2.0**self._errors, _LONGEST_PAUSE_SECS)
      self._starts_at = time.monotonic() + pause
      then = "it is not started again" if self.is_over else f"it is started again in {pause:.0f} s"
      say(f"{self.slot.name} ended with {code}, {self.error}; {then}: {self._log}")

  def tell(self, number: int) -> None:
    """Sends its process a signal, if it has one."""
    if self.process is not None:
      self.process.send_signal(number)

  def last_line(self) -> str:
    """Returns what its process printed last; "" if nothing was."""
    with open(self._log, "rb") as log:
      log.seek(max(log.seek(0, os.SEEK_END) - _LINE_BYTES, self._begin))
      lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def run(
  workdir: epath.Path,
  storage: str | None,
  slots: Sequence[Slot],
  logs: pathlib.Path,
  max_restarts: int,
  grace_secs: float,
  show: Callable[[list[str]], None],
  say: Callable[[str], None],
  command: Sequence[str] = WORKER,
) -> list[str]:
  """Runs a worker in every slot until they end, which they do when all trials are finished.

  A worker that was killed is started again; SIGTERM and Ctrl-C are handed to all, which hand their
  trials back; a second one kills them, and so does `grace_secs` after the first.

  Args:
    workdir: the sweep's.
    storage: URL of a PostgreSQL server; None for the journal.
    slots: from `devices.slots`.
    logs: folder, on this machine's disk, for a file of each worker's output.
    max_restarts: see `claim.next_trial`.
    grace_secs: for workers to save.
    show: called every two seconds, and once more at the end, with what each worker printed last.
    say: takes sentences for the user.
    command: what starts a worker.

  Returns:
    The signals that came.

  Raises:
    Ended: when every worker ended with an error.
  """
  logs.mkdir(parents=True, exist_ok=True)
  env = os.environ | {"PYTHONUNBUFFERED": "1"}
  if storage is not None:
    env[worker.STORAGE_VARIABLE] = storage
  env.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir / "compiled"))
  started = [*command, str(workdir), f"--max_restarts={max_restarts}"]
  workers = [_Worker(slot, started, env, logs / f"{slot.name}.log") for slot in slots]
  shown, told, deadline = 0.0, 0, float("inf")
  with _noted_signals() as received:
    while True:
      for each in workers:
        each.note_end(say, is_stopping=bool(received))
        if not received:
          each.start_if_due()
      running = [each for each in workers if each.process is not None]
      if not running and (received or all(each.is_over for each in workers)):
        break
      if len(received) > told:
        if told == 0:
          say(
            f"{received[0]}: the workers hand their trials back, each when its step, evaluation or "
            "compilation ends; a second signal kills them, and then a trial goes on from its checkpoint"
          )
          deadline = time.monotonic() + grace_secs
        for each in running:
          each.tell(signal.SIGTERM if told == 0 else signal.SIGKILL)
        told = len(received)
      if time.monotonic() > deadline:
        for each in running:
          each.tell(signal.SIGKILL)
      if time.monotonic() - shown > _SHOW_SECS:
        show(_said(workers))
        shown = time.monotonic()
      time.sleep(_POLL_SECS)
  show([])
  errors = [each.error for each in workers if each.error and each.is_over]
  if errors and len(errors) == len(workers):
    raise Ended(errors[0])
  return received


def _said(workers: Sequence[_Worker]) -> list[str]:
  """Returns the last line of each worker that runs, but for how far its trial is."""
  running = [(number, each) for number, each in enumerate(workers, 1) if each.process is not None]
  lines = [(number, each.last_line() or "starting") for number, each in running]
  return [f"worker {number}: {line}" for number, line in lines if not line.startswith("step ")]


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[str]]:
  """Notes SIGTERM and SIGINT instead of ending."""
  received: list[str] = []
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = [signal.getsignal(number) for number in numbers]
  for number in numbers:
    signal.signal(number, lambda got, _: received.append(signal.Signals(got).name))
  try:
    yield received
  finally:
    for number, handler in zip(numbers, before, strict=True):
      signal.signal(number, handler)
