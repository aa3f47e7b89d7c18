"""Runs the commands of a part, each in a process group of its own, until the part's time is up."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import dsmoe

ROOT = pathlib.Path(dsmoe.__path__[0]).parent
_POLL_SECS = 0.005


class Failed(Exception):
  """A part ended before it was done; its message is a sentence."""


class Process(NamedTuple):
  """A running command."""

  name: str
  args: tuple[str, ...]  # of Python
  popen: subprocess.Popen
  output: pathlib.Path  # what it writes to stdout and stderr


class Runner:
  """Starts Python programs of this repository; those that still run at its end are killed."""

  def __init__(self, folder: pathlib.Path, name: str, limit_secs: float, env: dict[str, str]):
    """Begins the time of a part.

    Args:
      folder: for the files of the session, which exists.
      name: the part's.
      limit_secs: its time.
      env: variables of its processes, beside those of this one.
    """
    self.folder, self._name, self._env = folder, name, env
    self._limit_secs, self._began = limit_secs, time.monotonic()
    self._processes: list[Process] = []

  def __enter__(self) -> "Runner":
    return self

  def __exit__(self, *_) -> None:
    for process in list(self._processes):
      self.kill(process)

  @property
  def secs(self) -> float:
    """Seconds since the part began."""
    return time.monotonic() - self._began

  @property
  def left_secs(self) -> float:
    """Seconds until the part's time is up, at least a small number."""
    return max(0.1, self._limit_secs - self.secs)

  def start(self, *args: str) -> Process:
    """Starts `python *args` in the repository."""
    name = next(arg for arg in args if not arg.startswith("-"))
    output = self.folder / f"{self._name}.{len(self._processes)}.log"
    env = os.environ | {"PYTHONUNBUFFERED": "1"} | self._env
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with output.open("w") as written:
      popen = subprocess.Popen(
        [sys.executable, *args],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=written,
        stderr=subprocess.STDOUT,
        process_group=0,
      )
    self._processes.append(Process(name, args, popen, output))
    return self._processes[-1]

  def wait_for(self, process: Process, condition: Callable[[], bool], what: str) -> None:
    """Waits until something holds.

    Raises:
      Failed: when the process ends before, or the part's time.
    """
    while not condition():
      if process.popen.poll() is not None:
        raise Failed(f"{process.name} ended before {what}: {self.tail(process)}")
      self._check_time(process, what)
      time.sleep(_POLL_SECS)

  def finish(self, process: Process) -> None:
    """Waits for the end.

    Raises:
      Failed: for another exit code than 0, and when the part's time ends before.
    """
    while process.popen.poll() is None:
      self._check_time(process, "its end")
      time.sleep(_POLL_SECS)
    if code := process.popen.returncode:
      raise Failed(f"{process.name} ended with {code}: {self.tail(process)}")

  def run(self, *args: str) -> None:
    """Runs `python *args` to its end; raises as `finish`."""
    self.finish(self.start(*args))

  def kill(self, process: Process) -> None:
    """Kills a process that still runs, and those that it has started, which may outlive it."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.popen.pid, signal.SIGKILL)
    process.popen.wait()

  def text(self, process: Process) -> str:
    """Returns what a process has written so far."""
    return process.output.read_text(errors="replace")

  def tail(self, process: Process) -> str:
    """Returns the last lines that a process has written, as one."""
    lines = [line.strip() for line in self.text(process).splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-600:] or "it wrote nothing"

  def log(self) -> str:
    """Returns what all processes of the part wrote."""
    heads = (f"=== {self._name}: python {' '.join(p.args)}\n" for p in self._processes)
    return "".join(head + self.text(p) + "\n" for head, p in zip(heads, self._processes))

  def _check_time(self, process: Process, what: str) -> None:
    if self.secs > self._limit_secs:
      raise Failed(
        f"{process.name} took longer than the {self._limit_secs:.0f} s left until {what}: "
        f"{self.tail(process)}"
      )
