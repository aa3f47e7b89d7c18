"""XLA on CPU: what makes its programs fast, each with the measurement that showed it.

Measured on two shared cores of x86-64 with float32, `experiments/bench_small.py` and
`experiments/tiny.py`.
"""

import atexit
import ctypes
import gc
import io
import os
import re
import sys
import threading
from collections.abc import Callable

import jax

# Matrix products by oneDNN, up to twice as fast as the default on small batched ones, and
# reductions, but nothing else, by YNNPACK.
COMPILER_OPTIONS: dict[str, bool | str] = {
  "xla_cpu_use_onednn": True,
  "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
}

# Layers of one kind. A scan keeps what its gradient needs in stacked buffers that are cleared,
# filled and sliced, a fifth of a small model's step; written out, compile time grows with depth.
MAX_WRITTEN_OUT_LAYERS = 4

# XLA:CPU runs operations in parallel once more than eight are ready. Each expert contributes
# three, the copies of its matrices: with five a step of 8 rows takes 0.86 of the time.
EXPERTS_AT_ONCE = 5

_PASS_ON_SECS = 1.0  # at the end, for what is still in a pipe
_MALLOC = {"hugetlb": 1, "mmap_threshold": 2**40, "trim_threshold": 2**40}


def computed_once(fn: Callable, x_BS: jax.Array):
  """Computes fn row by row, in a loop whose results are kept.

  XLA:CPU would otherwise fuse fn into each of its readers: cos and sin were computed anew in 16
  places of a step.
  """
  return jax.lax.map(fn, x_BS)


def machine_memory() -> int:
  """Returns the bytes of the machine's memory."""
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _num_devices() -> int:
  """Returns as how many devices the CPU will show, without starting JAX's backend.

  As in JAX, XLA's flag counts where `jax_num_cpu_devices` is not set, which is -1 then.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  forced = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
  configured = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
  return configured if configured > 0 else int(forced[-1]) if forced else 1


def keep_memory() -> None:
  """Makes glibc keep freed memory and back it with huge pages, so that steps reuse buffers.

  XLA:CPU allocates its temporary buffers anew at every step. By default glibc returns them to the
  operating system, which clears every page before it hands it out again: a third of a small
  model's step, when only huge pages were turned on.

  glibc reads these settings when a process starts, so this function sets GLIBC_TUNABLES and
  executes the program again. If the user has set GLIBC_TUNABLES, it is not changed and nothing is
  executed again.

  Asynchronous dispatch on CPU is turned off, so that computations run on the main thread. Only the
  heap of the main thread holds blocks above 64 MiB; on any other thread, the buffers of a step
  would be mapped and cleared at every step. Where the CPU shows as several devices, each computes
  on a thread of its own, so that all threads share that heap: the layer of `bench_small` with
  `all_to_all` on two devices cleared some 700 huge pages at every run, 1,100 with gradients, and now
  none. A step on one device would take a sixth more with a shared heap.
  """
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    settings = _MALLOC | ({"arena_max": 1} if _num_devices() > 1 else {})
    os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{k}={v}" for k, v in settings.items())
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def hide_lines_of_gloo() -> None:
  """Keeps out of standard output which processes Gloo has connected, a line for each group of them.

  Gloo, by which JAX joins the CPUs of several processes, writes these lines from C++. What else is
  written there passes. Python's own output takes another way, so that none of it is lost with a
  process that is killed; standard error, with Gloo's errors, is not touched.
  """
  shown = sys.stdout
  if not isinstance(shown, io.TextIOWrapper) or shown.fileno() != 1:
    return
  shown.flush()
  to, (reader, writer) = os.dup(1), os.pipe()
  os.dup2(writer, 1)
  os.close(writer)
  sys.stdout = io.TextIOWrapper(
    open(to, "wb", 0 if shown.write_through else -1),
    shown.encoding,
    shown.errors,
    line_buffering=shown.line_buffering,
    write_through=shown.write_through,
  )

  def pass_on() -> None:
    with open(reader, "rb") as lines:
      for line in lines:
        if not line.startswith(b"[Gloo] Rank "):
          os.write(to, line)

  passing_on = threading.Thread(target=pass_on, name="lines_of_gloo", daemon=True)
  passing_on.start()

  @atexit.register
  def end() -> None:
    ctypes.CDLL(None).fflush(None)
    os.dup2(to, 1)  # which ends what `pass_on` reads
    passing_on.join(_PASS_ON_SECS)


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
