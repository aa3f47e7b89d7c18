"""The process: memory settings, and joining the other processes of a multi-host run."""

import os

import jax

from dsmoe.platforms import cpu

# A launcher of several processes sets one of these: Cloud TPU, SLURM, Open MPI, or the user.
_CLUSTER_VARIABLES = (
  "TPU_WORKER_HOSTNAMES",
  "SLURM_NTASKS",
  "OMPI_COMM_WORLD_SIZE",
  "JAX_COORDINATOR_ADDRESS",
)


def start() -> None:
  """Sets the memory allocator up and, in a multi-host run, joins the other processes.

  Call this first in `main`: `keep_memory` may execute the program a second time, in place of the
  first.
  """
  cpu.keep_memory()
  if any(name in os.environ for name in _CLUSTER_VARIABLES):
    jax.distributed.initialize()
