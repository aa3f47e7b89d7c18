"""A run on hosts that are reached by ssh, one process each; the first is the coordinator.

No signal reaches a process on another host. Each therefore watches its standard input and is sent
SIGTERM there when that ends: when the launcher stops it, and when the launcher or the link is gone.
"""

import dataclasses
import shlex

from dsmoe.launching import shell
from dsmoe.launching.run import SWEEP, Run
from dsmoe.launching.supervise import Command
from dsmoe.launching.topology import Topology


@dataclasses.dataclass(frozen=True)
class Options:
  """Of a run by ssh.

  Attributes:
    hosts: as ssh takes them; the part after @ of the first is the address that the others reach.
    folder: the repository's on each host.
    setup: a line of shell before the run, "source .venv/bin/activate" say; "": none.
    port: of the first host, where the others join.
  """

  hosts: tuple[str, ...]
  folder: str
  setup: str
  port: int


def commands(run: Run, options: Options) -> list[Command]:
  """Returns the commands that start the processes, each with what its host runs."""
  return [
    Command(["ssh", "-o", "BatchMode=yes", host, _on_host(run, options, number)], {}, held=True)
    for number, host in enumerate(options.hosts)
  ]


def check_hosts(hosts: tuple[str, ...], topology: Topology | None) -> None:
  """Raises ValueError unless hosts are named as ssh takes them, as many as the topology has."""
  for host in hosts:
    if not host or host.startswith("-") or any(c.isspace() for c in host):
      raise ValueError(f"--hosts must name hosts as ssh takes them, as a,b or user@a, got {host!r}")
  if topology and len(hosts) != topology.hosts * topology.num_slices:
    raise ValueError(
      f"--hosts must name the {topology.hosts * topology.num_slices} hosts of {topology}, "
      f"got {len(hosts)}"
    )


def script(run: Run, options: Options) -> str:
  """Returns a shell script that starts the processes once, hands SIGTERM on and waits for them."""
  # Each ssh reads from a pipe (4) whose other end (3) only this script holds. Both are opened here: an
  # ssh that opened its own end after a signal has closed the other would wait for ever.
  starts = [f"{shlex.join(c.argv)} <&4 3>&- 4<&-" for c in commands(run, options)]
  lines = [
    "#!/bin/bash",
    f"# Starts {run.name} once; scripts/launch.py ssh --run also starts it again after a failure.",
    'hold=$(mktemp -u) && mkfifo "$hold" && exec 3<>"$hold" 4<"$hold" && rm "$hold" || exit 1',
    *shell.started_with_traps(starts, "TERM INT", "exec 3>&-"),
    *shell.waited(),
    'exit "$code"',
  ]
  return "\n".join(lines) + "\n"


def _on_host(run: Run, options: Options, number: int) -> str:
  """Returns what a host's shell, whichever it is, is given."""
  joined: tuple[str, ...] = ()
  if len(options.hosts) > 1 and run.program != SWEEP:
    address = options.hosts[0].rpartition("@")[2]
    joined = (
      f"--coordinator={address}:{options.port}",
      f"--num_processes={len(options.hosts)}",
      f"--process_id={number}",
    )
  lines = [
    f"cd {shlex.quote(options.folder)} || exit 2",
    *([options.setup] if options.setup else []),
    *shell.exports(run.env),
    "exec 3<&0",
    *shell.started([f"{shlex.join(run.argv('python', *joined))} </dev/null 3<&-"]),
    f"(read -r _ <&3; {shell.TERMINATE}) >/dev/null 2>&1 & watcher=$!",
    *shell.waited(),
    "kill $watcher 2>/dev/null",
    'exit "$code"',
  ]
  return f"bash -c {shlex.quote(chr(10).join(lines))}"
