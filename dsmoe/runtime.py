"""The process: memory settings, its signals, and joining the other processes of a run."""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator

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
    TimeoutError: when the first process was not there in time. (The first one says that it waits
      for the others; if they do not come, JAX aborts it.)
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
    who = f"process {process_id} of {num_processes}"
    if process_id:
      _wait_for(coordinator, who)
    else:
      wait = f"waits at {coordinator} for the others, at most {_JOIN_SECS} s"
      print(f"{who} {wait}", file=sys.stderr, flush=True)
  jax.distributed.initialize(
    coordinator,
    num_processes,
    process_id,
    initialization_timeout=_JOIN_SECS,
    heartbeat_timeout_seconds=_HEARTBEAT_SECS,
  )


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


@contextlib.contextmanager
def noted_interrupts() -> Iterator[list[str]]:
  """Interrupts upon Ctrl-C as usual, and notes that it came.

  Python drops an interrupt that arrives while a garbage collector's callback runs (JAX has one); the
  note is what remains of it.

  Yields:
    The names of the signals that came so far.
  """
  received: list[str] = []
  previous = signal.getsignal(signal.SIGINT)

  def record(number, frame):
    received.append(signal.Signals(number).name)
    assert callable(previous)
    previous(number, frame)

  if callable(previous):
    signal.signal(signal.SIGINT, record)
  try:
    yield received
  finally:
    signal.signal(signal.SIGINT, previous)


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
