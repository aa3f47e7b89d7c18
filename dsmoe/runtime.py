"""Settings of the whole process: memory, the other hosts of a run, options of the compiler."""

import ctypes
import gc
import os
import sys

import jax

# A launcher of several processes sets one of these: Cloud TPU, SLURM, Open MPI, or the user.
_CLUSTER_VARIABLES = (
  "TPU_WORKER_HOSTNAMES",
  "SLURM_NTASKS",
  "OMPI_COMM_WORLD_SIZE",
  "JAX_COORDINATOR_ADDRESS",
)
_MALLOC = {"hugetlb": 1, "mmap_threshold": 2**40, "trim_threshold": 2**40}


def start() -> None:
  """Sets the memory allocator up and, in a multi-host run, joins the other processes.

  Call this first in `main`: `keep_memory` may execute the program a second time, in place of the
  first.
  """
  keep_memory()
  if any(name in os.environ for name in _CLUSTER_VARIABLES):
    jax.distributed.initialize()


def keep_memory() -> None:
  """Makes glibc keep freed memory and back it with huge pages, so that steps reuse buffers.

  XLA:CPU allocates its temporary buffers anew at every step. By default glibc returns them to the
  operating system, which clears every page before it hands it out again: a third of a small
  model's step, when only huge pages were turned on. (A single arena for all threads, `arena_max=1`,
  avoids every page fault but costs a sixth more time.)

  glibc reads these settings when a process starts, so this function sets GLIBC_TUNABLES and
  executes the program again. If the user has set GLIBC_TUNABLES, it is not changed and nothing is
  executed again.

  Asynchronous dispatch on CPU is turned off, so that computations run on the main thread. Only the
  heap of the main thread holds blocks above 64 MiB; on any other thread, the buffers of a step
  would be mapped and cleared at every step.
  """
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{k}={v}" for k, v in _MALLOC.items())
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def release_memory() -> None:
  """Returns free memory to the operating system; call this after the last compilation.

  After `keep_memory`, glibc keeps everything that compiling used: half a gigabyte that no step
  needs.
  """
  gc.collect()
  if sys.platform == "linux":
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
      trim(0)


def compiler_options(platform: str | None = None) -> dict[str, bool | str]:
  """Returns the XLA options that make a training step faster on a platform, for `jax.jit`.

  On CPU, oneDNN computes the matmuls: it is up to twice as fast as the default on small batched
  ones. YNNPACK computes reductions and nothing else. Other platforms need no options.

  Args:
    platform: "cpu", "tpu" or "gpu"; None means JAX's default backend.
  """
  if (platform or jax.default_backend()) != "cpu":
    return {}
  return {
    "xla_cpu_use_onednn": True,
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
  }
