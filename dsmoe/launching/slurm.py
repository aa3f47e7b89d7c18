"""A run as a job of SLURM: a script for sbatch that starts itself again.

Source: https://slurm.schedmd.com/sbatch.html and srun.html. JAX reads SLURM's variables.
"""

import dataclasses
import shlex

from dsmoe.launching import shell
from dsmoe.launching.run import Run
from dsmoe.launching.topology import Topology
from dsmoe.parallel.processes import RESTART_CODE

# Seconds after the first process has ended until SLURM ends the others: longer than JAX takes to
# tell them.
_LEAVE_SECS = 150
# Signals the processes: srun, upon a SIGTERM of its own, kills them.
_TERMINATE = 'scancel --signal=TERM "$SLURM_JOB_ID"'


@dataclasses.dataclass(frozen=True)
class Options:
  """Of a job of SLURM.

  Attributes:
    time_limit: as SLURM writes it, "24:00:00" say; None: the partition's.
    partition, account: SLURM's; None: the user's default.
    tasks: "node", one process for all devices of a node, or "gpu", one for each.
    container: an image in which the processes run, a file *.sif for Apptainer or a name for Pyxis;
      None: no container.
    setup: a line of shell before it, "source .venv/bin/activate" say; "": none.
    grace_secs: how long before the time limit the run is told to save.
  """

  time_limit: str | None
  partition: str | None
  account: str | None
  tasks: str
  container: str | None
  setup: str
  grace_secs: int


def script(run: Run, topology: Topology, options: Options) -> str:
  """Returns the script.

  Before the time limit the run saves, ends and is queued again; so it is after RESTART_CODE or
  a signal, `run.max_restarts` times. Its failures are counted in a file beside its output.
  """
  per_node = 1 if options.tasks == "node" else topology.devices_per_host
  settings = {
    "job-name": run.name,
    "nodes": str(topology.hosts),
    "ntasks-per-node": str(per_node),
    "gpus-per-node": str(topology.devices_per_host) if topology.chip else None,
    "time": options.time_limit,
    "partition": options.partition,
    "account": options.account,
    "output": f"{run.name}-%j.log",
    "open-mode": "append",
    # B: to this script, which hands it on and remembers that it came.
    "signal": f"B:USR1@{options.grace_secs}",
  }
  header = [f"#SBATCH --{name}={value}" for name, value in settings.items() if value is not None]
  env = dict(run.env)
  if per_node == 1 and topology.chip:
    # JAX would take one device for each process.
    env["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(topology.devices_per_host)))
  again = f'[ "$code" -eq {RESTART_CODE} ] || {{ [ "$code" -gt 128 ] && [ "$code" -ne 130 ]; }}'
  lines = [
    "#!/bin/bash",
    *header,
    "#SBATCH --requeue",
    *([options.setup] if options.setup else []),
    *shell.exports(env),
    'failures="$SLURM_JOB_NAME-$SLURM_JOB_ID.failures"',
    "cancelled=",
    "trap cancelled=1 TERM",  # scancel, which signals the processes too
    # USR1: the time limit is near.
    *shell.started_with_traps([shlex.join(_srun(run, topology, options))], "USR1", _TERMINATE),
    *shell.waited(),
    '[ -z "$cancelled" ] || exit "$code"',
    'if [ -n "$stopped" ]; then',
    '  scontrol requeue "$SLURM_JOB_ID"',
    f"elif {again}; then",
    '  echo "status $code" >> "$failures"',
    f'  if [ "$(wc -l < "$failures")" -le {run.max_restarts} ]; then',
    '    scontrol requeue "$SLURM_JOB_ID"',
    "  else",
    f'    echo "launch: no more than {run.max_restarts} restarts, see $failures" >&2',
    "  fi",
    "fi",
    'exit "$code"',
  ]
  return "\n".join(lines) + "\n"


def _srun(run: Run, topology: Topology, options: Options) -> list[str]:
  words = ["srun", "--kill-on-bad-exit=0", f"--wait={_LEAVE_SECS}"]
  words += ["--gpu-bind=none"] if topology.chip else []  # each process chooses its devices
  inside = []
  if options.container and options.container.endswith(".sif"):
    inside = ["apptainer", "exec", *(["--nv"] if topology.chip else []), options.container]
  elif options.container:
    words += [f"--container-image={options.container}"]
  return [*words, *inside, *run.argv("python")]
