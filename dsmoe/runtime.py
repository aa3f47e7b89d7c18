"""The process: memory settings, and joining the other processes of a multi-host run."""

import os

import jax

from dsmoe.platforms import cpu

# A launcher of several processes sets one of these, where JAX finds the rest: Cloud TPU, SLURM,
# Open MPI, or the user.
_CLUSTER_VARIABLES = (
  "TPU_WORKER_HOSTNAMES",
  "SLURM_NTASKS",
  "OMPI_COMM_WORLD_SIZE",
  "JAX_COORDINATOR_ADDRESS",
)
_JOIN_SECS = 300  # within which all processes must have started
_HEARTBEAT_SECS = 60  # after which a process that is silent is taken for dead, and the others end


def start(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
  """Sets the memory allocator up and, in a run of several processes, joins the others.

  Call this first in `main`: `keep_memory` may execute the program a second time, in place of the
  first.

  Args:
    coordinator: address and port of the first process, "10.0.0.2:8476" say; None where the
      variables of a launcher tell.
    num_processes, process_id: how many there are, and which this is, from 0; None likewise.

  Raises:
    ValueError: for one of the three without the others, or an address without a port.
    RuntimeError: when the others have not joined in time, naming whom this process waited for.
  """
  cpu.keep_memory()
  given = [coordinator, num_processes, process_id]
  if given.count(None) not in (0, 3):
    raise ValueError(
      "--coordinator, --num_processes and --process_id go together, got "
      f"{coordinator}, {num_processes} and {process_id}"
    )
  if coordinator is None and not any(name in os.environ for name in _CLUSTER_VARIABLES):
    return
  if coordinator is not None and num_processes is not None and process_id is not None:
    if not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdigit():
      raise ValueError(f"--coordinator must be an address and a port, got {coordinator!r}")
    if not process_id < num_processes:
      raise ValueError(
        f"--process_id ({process_id}) must be below --num_processes ({num_processes})"
      )
  try:
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      initialization_timeout=_JOIN_SECS,
      heartbeat_timeout_seconds=_HEARTBEAT_SECS,
    )
  except RuntimeError as error:
    who = f"process {process_id} of {num_processes}" if coordinator else "this process"
    raise RuntimeError(
      f"{who} waited {_JOIN_SECS} s for the coordinator at {coordinator or 'the address found'} and "
      f"the other processes, and could not join: {error}"
    ) from error
