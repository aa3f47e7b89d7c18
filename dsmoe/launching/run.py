"""What is launched: one command, of a run or of a sweep's worker, for every way of starting it."""

import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from dsmoe.parallel.processes import RESTART_CODE, RESTARTED

TRAIN = ("-m", "dsmoe.train")
SWEEP = ("scripts/sweep.py",)
MISTAKES = (1, 2)  # exit codes after which starting again changes nothing


@dataclasses.dataclass(frozen=True)
class Run:
  """A run of `dsmoe.train`, or a part of a sweep.

  Attributes:
    name: of the job; see `job_name`.
    config: path of the experiment, from the repository's root.
    workdir: where the run's files go.
    arguments: further arguments: overrides of the config and flags of dsmoe.train.
    env: variables of each process, beside those that it inherits.
    max_restarts: how often the run may be started again after a failure.
    program: TRAIN, or SWEEP, whose processes do not join each other.
  """

  name: str
  config: str
  workdir: str
  arguments: tuple[str, ...]
  env: Mapping[str, str]
  max_restarts: int
  program: tuple[str, ...] = TRAIN

  def argv(self, python: str, *more: str) -> list[str]:
    """Returns the command line of a process.

    Args:
      python: the interpreter.
      *more: further arguments, those that tell a process its number say.
    """
    flags = (f"--config={self.config}", f"--workdir={self.workdir}", *self.arguments, *more)
    return [python, *self.program, *flags]


def jobs_of_sweep(run: Run, number: int) -> list[Run]:
  """Returns the jobs that run the trials of a sweep together, by names that end in their numbers."""
  names = [job_name(f"{run.name}-{i}", run.workdir) for i in range(number)]
  return [run] if number == 1 else [dataclasses.replace(run, name=name) for name in names]


def job_name(name: str | None, workdir: str) -> str:
  """Returns the name of a job; None: that of the workdir's last folder, its odd signs as dashes.

  Raises:
    ValueError: for a name that Kubernetes would refuse, which adds the numbers of slice and host.
  """
  if name is None:
    last = re.sub(r"[^a-z0-9]+", "-", workdir.rstrip("/").rpartition("/")[2].lower()).strip("-")
    name = (last if last[:1].isalpha() else f"run-{last}")[:40].strip("-")
  if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
    raise ValueError(
      "--name must have at most 40 letters a-z, digits and dashes, begin with a letter and not end "
      f"with a dash, got {name!r}"
    )
  return name


def restarted(run: Run) -> Run:
  """Returns the run as a launcher starts it that starts it again: its processes do not ask for that."""
  if not run.max_restarts:
    return run
  return dataclasses.replace(run, env={**run.env, RESTARTED: "1"})


def restarts(code: int) -> bool:
  """Whether a process that ended with this code should be started again.

  A negative code, and in a shell one above 128, means that a signal ended it; 255 is ssh's own, of
  a lost connection. 130 is what dsmoe.train says of a Ctrl-C before its first step.
  """
  return code == RESTART_CODE or code < 0 or (code > 128 and code != 130)


def give(tool: Sequence[str], text: str) -> int:
  """Runs a program that reads what is to be started from its standard input; returns its code.

  Raises:
    ValueError: when the program is not installed.
  """
  if shutil.which(tool[0]) is None:
    raise ValueError(f"--run needs {tool[0]}, which must be on the path {os.environ.get('PATH')}")
  return subprocess.run(tool, input=text, text=True, check=False).returncode
