"""The process: memory settings, its signals, and joining the other processes of a run."""

import contextlib
import gc
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import types
import urllib.request
from collections.abc import Iterator

import jax
from jax._src import cloud_tpu_init

from dsmoe.parallel import processes, watch
from dsmoe.platforms import cpu

# A launcher of several processes sets one of these, where JAX finds the rest: Cloud TPU in
# Kubernetes, several slices of it, SLURM, Open MPI, an indexed Job of Kubernetes, or the user.
CLUSTER_VARIABLES = (
  "TPU_WORKER_HOSTNAMES",
  "TPU_PROCESS_ADDRESSES",
  "MEGASCALE_COORDINATOR_ADDRESS",
  "SLURM_NTASKS",
  "OMPI_COMM_WORLD_SIZE",
  "JOB_COMPLETION_INDEX",
  "JAX_COORDINATOR_ADDRESS",
)
_METADATA_SECS = 5
_JOIN_SECS = 300  # within which all processes must have started
_AGAIN_SECS = 0.2  # between an interrupt in a callback and the next attempt


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
    ValueError: for one of the three without the others, or an address without a port; when JAX does
      not understand a launcher's variables.
    TimeoutError: when the first process was not there in time. One that waits for others than the
      first is ended with `processes.RESTART_CODE`.
  """
  cpu.keep_memory()
  given = [coordinator, num_processes, process_id]
  if given.count(None) not in (0, 3):
    raise ValueError(
      "--coordinator, --num_processes and --process_id go together, got "
      f"{coordinator}, {num_processes} and {process_id}"
    )
  if coordinator is None and not _is_in_cluster():
    return
  who = "this process"
  if coordinator is not None and num_processes is not None and process_id is not None:
    if not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdigit():
      raise ValueError(f"--coordinator must be an address and a port, got {coordinator!r}")
    if not process_id < num_processes:
      raise ValueError(
        f"--process_id ({process_id}) must be below --num_processes ({num_processes})"
      )
    who = f"process {process_id} of {num_processes}"
    if process_id:
      _wait_for(coordinator, who)
    else:
      wait = f"waits at {coordinator} for the others, at most {_JOIN_SECS} s"
      print(f"{who} {wait}", file=sys.stderr, flush=True)
  cpu.hide_lines_of_gloo()
  watch.delay_aborts()
  with _leaving_after(_JOIN_SECS, f"{who} waited {_JOIN_SECS} s for all others to join it"):
    try:
      jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=2 * _JOIN_SECS,  # after which JAX would abort this process
        heartbeat_timeout_seconds=watch.SERVICE_SECS,
      )
    except (ValueError, RuntimeError) as error:
      if coordinator is not None:
        raise
      found = [name for name in CLUSTER_VARIABLES if name in os.environ]
      raise ValueError(
        f"the variables {', '.join(found) or 'of this Cloud TPU'} tell of several processes, and JAX "
        f"cannot find them ({' '.join(str(error).split())[:300]}): start each with the launcher, such "
        "as srun, install the package kubernetes in a Job of Kubernetes, or give --coordinator, "
        "--num_processes and --process_id"
      ) from error
  watch.start()


@contextlib.contextmanager
def _leaving_after(secs: float, message: str) -> Iterator[None]:
  """Ends the process, as one that should be started again, if what is done inside takes longer."""
  timer = threading.Timer(secs, processes.leave, (processes.RESTART_CODE, message))
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _is_in_cluster() -> bool:
  """Whether a launcher, or the metadata server of a Cloud TPU, tells JAX of other processes."""
  if any(name in os.environ for name in CLUSTER_VARIABLES):
    return True
  if not cloud_tpu_init.running_in_cloud_tpu_vm or "TPU_SKIP_MDS_QUERY" in os.environ:
    return False
  host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
  request = urllib.request.Request(
    f"http://{host}/computeMetadata/v1/instance/attributes/agent-worker-number",
    headers={"Metadata-Flavor": "Google"},
  )
  with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=_METADATA_SECS):
    return True
  return False


class CachedPrograms:
  """Counts the programs that JAX looks for in its compilation cache, and those that it finds.

  There is such a cache where JAX_COMPILATION_CACHE_DIR names a folder. Of several processes the
  first alone writes to it. The keys of JAX 0.10.2 hold a fingerprint of the topology, which on CPU
  differs by process: there the others compile at every start.
  """

  def __init__(self):
    self.asked = self.found = 0
    jax.monitoring.register_event_listener(self._count)

  def __enter__(self) -> "CachedPrograms":
    return self

  def __exit__(self, *_) -> None:
    jax.monitoring.unregister_event_listener(self._count)

  def _count(self, event: str, **_) -> None:
    self.asked += event == "/jax/compilation_cache/compile_requests_use_cache"
    self.found += event == "/jax/compilation_cache/cache_hits"

  def __str__(self) -> str:
    """Returns ", 3 of 5 programs from the compilation cache", or "" where there is none."""
    if not self.asked:
      return ""
    return f", {self.found} of {self.asked} programs from the compilation cache"


def _wait_for(coordinator: str, who: str) -> None:
  """Waits until the first process listens, where JAX would abort this one.

  Raises:
    TimeoutError: naming who waited for whom, and how long.
  """
  host, _, port = coordinator.rpartition(":")
  end = time.monotonic() + _JOIN_SECS
  while time.monotonic() < end:
    with contextlib.suppress(OSError):
      socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
      return
    time.sleep(0.2)
  raise TimeoutError(
    f"{who} waited {_JOIN_SECS} s for process 0 at {coordinator}, which must be started within that "
    "time and be reachable"
  )


def process_began() -> float:
  """Returns when this process was started, in seconds since 1970; now, where /proc does not tell."""
  try:
    # Of the fields behind the program's name, in parentheses, the 20th is the start in clock ticks.
    ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_secs = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
  except (OSError, AttributeError):
    age_secs = 0.0
  return time.time() - age_secs


@contextlib.contextmanager
def noted_interrupts() -> Iterator[list[str]]:
  """Interrupts upon Ctrl-C as usual, and notes that it came.

  Python prints and drops an interrupt that is raised where nobody can catch it. In a callback of the
  garbage collector (JAX has one that runs often) it is therefore not raised but sent again a moment
  later; of one in a `__del__`, say, the note is what remains.

  Yields:
    The names of the signals that came so far.

  Raises:
    ValueError: in another thread than the main one, which alone gets signals.
  """
  if threading.current_thread() is not threading.main_thread():
    name = threading.current_thread().name
    raise ValueError(f"a run must be trained by the main thread of its process, got thread {name}")
  received: list[str] = []
  previous = signal.getsignal(signal.SIGINT)

  def record(number, frame):
    received.append(signal.Signals(number).name)
    assert callable(previous)
    if _is_in_callback(frame):
      main = threading.main_thread().ident
      threading.Timer(_AGAIN_SECS, signal.pthread_kill, [main, number]).start()
    else:
      previous(number, frame)

  if callable(previous):
    signal.signal(signal.SIGINT, record)
  try:
    yield received
  finally:
    signal.signal(signal.SIGINT, previous)


def _is_in_callback(frame: types.FrameType | None) -> bool:
  """Whether a callback of the garbage collector is among the functions that run."""
  callbacks = [getattr(callback, "__code__", None) for callback in gc.callbacks]
  while frame is not None and frame.f_code not in callbacks:
    frame = frame.f_back
  return frame is not None


@contextlib.contextmanager
def stop_signals(received: list[str]) -> Iterator[list[str]]:
  """Collects SIGTERM and SIGINT (Ctrl-C) instead of ending; a second Ctrl-C interrupts as usual.

  Args:
    received: the names of the signals that came before.

  Yields:
    `received`, to which the names of those that come are added.
  """

  def record(number, _):
    received.append(signal.Signals(number).name)
    if number == signal.SIGINT:
      signal.signal(number, previous[number])

  # Of several processes SIGTERM is JAX's: see `processes.agreed_to_stop`.
  numbers = (signal.SIGINT, signal.SIGTERM)[: 2 if jax.process_count() == 1 else 1]
  previous = {number: signal.signal(number, record) for number in numbers}
  try:
    yield received
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
