"""Ends a process that hangs, after it has written what its threads were doing.

A process of a run that waits for ever, for a collective that another process does not join or for a
file system that does not answer, holds all others. Their launcher starts them again when they end
with `processes.RESTART_CODE`.
"""

import contextlib
import datetime
import faulthandler
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator

import jax
from etils import epath

from dsmoe.parallel import processes
from dsmoe.reporting.goodput import PHASES, Goodput

_UNWATCHED = ("start_up", "data", "compile", "paused")  # how long these take, nobody can say
_WRITE_SECS = 30.0  # within which the file must be written: the workdir itself may be what hangs


@contextlib.contextmanager
def watching(
  goodput: Goodput,
  workdir: epath.PathLike,
  limit_secs: float,
  leave: Callable[[int], None] = os._exit,
) -> Iterator[None]:
  """Ends the process when it has completed no phase and no step for `limit_secs`.

  The stacks of all threads go to standard error and to `hang.<process>.txt` in the workdir, beside
  older ones. Not watched are start-up, the preparation of data, compiling, and the time that whoever
  takes a run's points needs between two of them. A thread does it, which a call into C++ does not
  hold up unless that keeps Python's lock.

  Args:
    goodput: which knows the phase, the step, and when they were completed.
    workdir: of the run.
    limit_secs: 0 to watch nothing.
    leave: called with `processes.RESTART_CODE`; ends the process without waiting for its threads.
  """
  if not limit_secs:
    yield
    return
  ended = threading.Event()

  def watch() -> None:
    while not ended.wait(min(limit_secs / 4, 10.0)):
      # The phase first: a phase that begins sets `beat_time` before its name. Read the other way round,
      # the time of a compilation could be taken for silence of the phase after it.
      phase = goodput.phase
      silent_secs = goodput.clock() - goodput.beat_time
      if silent_secs > limit_secs and phase not in _UNWATCHED:
        report(goodput, workdir, silent_secs)
        leave(processes.RESTART_CODE)
        return

  thread = threading.Thread(target=watch, name="watchdog", daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()


def report(goodput: Goodput, workdir: epath.PathLike, silent_secs: float) -> None:
  """Writes the stacks of all threads, and where the run was, to standard error and to a file."""
  now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
  process = jax.process_index()
  text = (
    f"process {process} of {jax.process_count()} (number {os.getpid()} on {socket.gethostname()}) "
    f"hangs at {now}: {PHASES[goodput.phase]} after step {goodput.step}, for {silent_secs:,.0f} s. "
    "The stacks of its threads:\n\n"
  )
  with tempfile.TemporaryFile("w+") as file:  # a file of the system, as faulthandler needs it
    faulthandler.dump_traceback(file, all_threads=True)
    file.seek(0)
    text += file.read()
  print(text, file=sys.stderr, flush=True)

  def write() -> None:
    path, number = epath.Path(workdir) / f"hang.{process}.txt", 0
    while path.exists():
      number += 1
      path = path.with_name(f"hang.{process}.{number}.txt")
    path.write_text(text)

  writer = threading.Thread(target=write, name="write_hang", daemon=True)
  writer.start()
  writer.join(_WRITE_SECS)
