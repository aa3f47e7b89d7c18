"""Settings of the process itself, made before any computation."""

import ctypes
import gc
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
_MALLOC = {"hugetlb": 1, "mmap_threshold": 2**40, "trim_threshold": 2**40}


def start() -> None:
  """Settles memory, then joins the other processes of a multi-host run if there are any.

  Call it first in `main`: it may start the program again, in the same process.
  """
  keep_memory()
  if any(name in os.environ for name in _CLUSTER_VARIABLES):
    jax.distributed.initialize()


def keep_memory() -> None:
  """Has glibc keep freed memory and back it by huge pages; starts the program again to do so.

  XLA:CPU allocates its temporary buffers anew at every step. By default glibc returns them to
  the system, which clears every page again: a third of a small model's step when measured with
  huge pages alone. (One arena for all threads, `arena_max=1`, faults in nothing at all and yet
  costs a sixth more time.) glibc reads these settings only when a process starts. A
  GLIBC_TUNABLES of the user's is left alone.

  Computations on CPU run on the thread that asks for them: only the main thread's heap holds
  blocks above 64 MiB, and a step's buffers, were another thread to ask for them, would be mapped
  and cleared anew at each step.
  """
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{k}={v}" for k, v in _MALLOC.items())
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def release_memory() -> None:
  """Gives free memory back to the system, once; call it when the last compilation is over.

  `keep_memory` has glibc keep all that compiling used, half a gigabyte that no step needs.
  """
  gc.collect()
  if sys.platform == "linux":
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
      trim(0)


def compiler_options(platform: str | None = None) -> dict[str, bool | str]:
  """Returns XLA options for `jax.jit` that make a train step faster on a platform.

  On CPU: matmuls by oneDNN, up to twice as fast as the default on small batched ones, and
  reductions, but nothing else, by YNNPACK.

  Args:
    platform: "cpu", "tpu" or "gpu"; None: the one computed on.
  """
  if (platform or jax.default_backend()) != "cpu":
    return {}
  return {
    "xla_cpu_use_onednn": True,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
  }
