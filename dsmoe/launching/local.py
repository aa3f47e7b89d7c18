"""Several processes of a run on this machine."""

import shlex
import socket
import sys

from dsmoe.launching import shell
from dsmoe.launching.run import Run
from dsmoe.launching.supervise import Command

_FIXED_PORT = 8476  # in what is rendered; a run takes a free one


def commands(run: Run, num_processes: int, port: int) -> list[Command]:
  """Returns the commands of a run's processes.

  Args:
    run: what they run.
    num_processes: how many there are.
    port: of the first one, where the others join; none is needed for one process.
  """
  joined = (f"--coordinator=localhost:{port}", f"--num_processes={num_processes}")
  flags = [
    (*joined, f"--process_id={i}") if num_processes > 1 else () for i in range(num_processes)
  ]
  return [Command(run.argv(sys.executable, *more), dict(run.env)) for more in flags]


def free_port() -> int:
  """Returns a port that nobody listens on."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def script(run: Run, num_processes: int) -> str:
  """Returns a shell script that starts the processes once and waits for them."""
  made = commands(run, num_processes, _FIXED_PORT)
  lines = [
    "#!/bin/bash",
    f"# Starts {run.name} once; scripts/launch.py local --run also starts it again after a failure.",
    *shell.exports(made[0].env),
    *shell.started_with_traps([shlex.join(command.argv) for command in made], "TERM INT"),
    *shell.waited(),
    'exit "$code"',
  ]
  return "\n".join(lines) + "\n"
