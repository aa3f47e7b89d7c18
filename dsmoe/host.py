"""Settings of the process itself, made before any computation."""

import ctypes
import os
import sys

import jax

# Set by what starts several processes: Cloud TPU pods, SLURM, Open MPI, or by hand.
_CLUSTER_VARIABLES = (
  "TPU_WORKER_HOSTNAMES",
  "SLURM_NTASKS",
  "OMPI_COMM_WORLD_SIZE",
  "JAX_COORDINATOR_ADDRESS",
)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def start() -> None:
  """Joins the other processes of a multi-host run, if there are any, and settles memory."""
  if any(name in os.environ for name in _CLUSTER_VARIABLES):
    jax.distributed.initialize()
  keep_freed_memory()


def keep_freed_memory() -> None:
  """Tells glibc to reuse freed memory instead of returning it to the system.

  XLA:CPU allocates its temporary buffers anew at every step; without this each large one
  is mapped, zeroed page by page and unmapped again, a third of a small model's step.
  """
  if sys.platform == "linux" and jax.default_backend() == "cpu":
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
      libc.mallopt(_M_MMAP_MAX, 0)
      libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
      libc.mallopt(_M_TOP_PAD, 2**26)
