"""Runs the processes of one run as children: their output, signals to them, starting them again."""

import contextlib
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dsmoe.launching import run as run_lib

# JAX lets a process know within a minute that another is gone; one that has not left by then hangs.
_LEAVE_SECS = 150
_POLL_SECS = 0.05
_PRINT_SECS = 5  # for what a process has written when it ends; its own children may hold on to that


class Command(NamedTuple):
  """A process to start.

  Attributes:
    argv: the program and its arguments.
    env: variables beside those of this process.
    held: whether it is to stop when its standard input ends, as a process on another host is, which
      no signal reaches; otherwise signals are handed to it.
  """

  argv: list[str]
  env: dict[str, str]
  held: bool = False


def supervise(
  commands_of: Callable[[int], list[Command]], max_restarts: int, log_folder: str | None = None
) -> int:
  """Runs the processes of a run to their end and starts them again where that helps.

  They are started again, all together, when the first that failed ended with RESTART_CODE or by a
  signal; with any other code they would fail again. SIGTERM and Ctrl-C are handed to all; a third
  one kills them.

  Args:
    commands_of: returns the processes of a start, given how many starts there were before.
    max_restarts: how often they are started again.
    log_folder: for a file process_<i>.log of each; None: all write to this process' output, each
      line after `[i] `.

  Returns:
    0 when all ended with 0, otherwise the code of the first that failed, 128 + n for signal n.

  Raises:
    OSError: when a program cannot be started.
  """
  with _noted_signals() as received:
    for attempt in itertools.count():
      failed = _run(commands_of(attempt), received, log_folder)
      if failed is None:
        return 0
      process, code, count = failed
      status = code if code >= 0 else 128 - code
      ended = f"process {process} of {count} ended with status {status}"
      if received:
        _say(f"{ended} after {signal.Signals(received[0]).name}")
        return status
      if not run_lib.restarts(code):
        _say(f"{ended}, after which starting again changes nothing")
        return status
      if attempt == max_restarts:
        _say(f"{ended}; it was started again {max_restarts} times, no more than --max_restarts")
        return status
      _say(f"{ended}; all are started again, {attempt + 1} of at most {max_restarts} times")
  raise AssertionError  # `count` has no end


def _say(text: str) -> None:
  print(f"launch: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[int]]:
  """Collects SIGTERM and SIGINT instead of ending; yields the list of their numbers."""
  received: list[int] = []
  numbers = (signal.SIGTERM, signal.SIGINT)
  previous = {n: signal.signal(n, lambda number, _: received.append(number)) for n in numbers}
  try:
    yield received
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def _run(
  commands: list[Command], received: list[int], log_folder: str | None
) -> tuple[int, int, int] | None:
  """Runs processes to their end; returns the first that failed, its code and their number."""
  children: list[subprocess.Popen] = []
  printers: list[threading.Thread] = []
  failed: tuple[int, int, int] | None = None
  handed, limit = 0, float("inf")
  try:
    for i, command in enumerate(commands):
      children.append(_start(command, i, log_folder))
      if log_folder is None:
        printers.append(threading.Thread(target=_print_lines, args=(children[i], i), daemon=True))
        printers[i].start()
    while any([child.poll() is None for child in children]):
      for number in received[handed:]:
        handed += 1
        for child, command in zip(children, commands):
          _hand(child, command, number if handed < 3 else signal.SIGKILL)
      if failed is None:
        failed = _first_failure(children)
        limit = time.monotonic() + _LEAVE_SECS if failed else limit
      if time.monotonic() > limit:
        left = [i for i, child in enumerate(children) if child.poll() is None]
        _say(f"processes {left} are killed, which have not left {_LEAVE_SECS} s after a failure")
        _kill(children)
        limit = float("inf")
      time.sleep(_POLL_SECS)
  finally:
    _kill(children)
    for child in children:
      child.wait()
      if child.stdin is not None:
        child.stdin.close()
    for printer in printers:
      printer.join(_PRINT_SECS)
  return failed or _first_failure(children)


def _start(command: Command, number: int, log_folder: str | None) -> subprocess.Popen:
  with contextlib.ExitStack() as stack:
    output: Any = subprocess.PIPE
    if log_folder is not None:
      path = pathlib.Path(log_folder) / f"process_{number}.log"
      path.parent.mkdir(parents=True, exist_ok=True)
      output = stack.enter_context(path.open("ab"))
    return subprocess.Popen(
      command.argv,
      env=os.environ | command.env,
      stdin=subprocess.PIPE if command.held else subprocess.DEVNULL,
      stdout=output,
      stderr=subprocess.STDOUT,
      start_new_session=True,  # a terminal's Ctrl-C reaches this process only, which hands it on
    )


def _print_lines(child: subprocess.Popen, number: int) -> None:
  """Copies a child's output, each line after its number.

  Where nobody reads this process' output any more, the child's is still read and dropped: it would
  otherwise stand still when the pipe is full.
  """
  assert child.stdout is not None
  for line in child.stdout:
    text = f"[{number}] ".encode() + line.rstrip(b"\r\n") + b"\n"
    with contextlib.suppress(OSError):
      sys.stdout.buffer.write(text)
      sys.stdout.buffer.flush()


def _hand(child: subprocess.Popen, command: Command, number: int) -> None:
  if child.poll() is not None:
    return
  if command.held and number != signal.SIGKILL:
    if child.stdin is not None and not child.stdin.closed:
      child.stdin.close()
  elif number == signal.SIGKILL:
    _kill([child])
  else:
    child.send_signal(number)


def _kill(children: list[subprocess.Popen]) -> None:
  """Ends children that are still there, with what they have started."""
  for child in children:
    if child.poll() is None:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _first_failure(children: list[subprocess.Popen]) -> tuple[int, int, int] | None:
  """Returns (number, code, number of children) of a child that failed; mistakes go first."""
  codes = [(i, child.poll()) for i, child in enumerate(children)]
  failed = sorted((run_lib.restarts(code), i, code) for i, code in codes if code)
  return (failed[0][1], failed[0][2], len(children)) if failed else None
