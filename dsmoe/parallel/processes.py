"""The processes of a run: what they agree on, beside the arrays they compute together.

Short texts travel through the service that joined the processes, `jax._src.distributed`. It is the
only way that needs no device and may take hours, and JAX has no public name for it: a test of two
processes fails first when it changes.
"""

import contextlib
import hashlib
import itertools
import os
import pathlib
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

RESTART_CODE = 75  # the exit code of a process that should be started again (EX_TEMPFAIL)
RESTARTED = "DSMOE_RESTARTED"  # a variable that a launcher sets which starts all processes again
_LIMIT_SECS = 24 * 3600  # one process may tokenise while the others wait
_NAMED_SECS = 10  # in which the loss of another process is found by other means than a collective
_calls = itertools.count()
T = TypeVar("T")


def is_first() -> bool:
  """Whether this process writes what a run writes once."""
  return jax.process_index() == 0


def exchange(text: str) -> list[str]:
  """Returns the text of every process, in the order of their numbers.

  Every process calls this equally often, in the same order.
  """
  if jax.process_count() == 1:
    return [text]
  call = next(_calls)
  publish(f"{call}/{jax.process_index()}", text)
  return [await_text(f"{call}/{i}") for i in range(jax.process_count())]


def publish(key: str, text: str) -> None:
  """Sets a text that `await_text` returns in every process; of one process nobody asks for it."""
  if (client := distributed.global_state.client) is not None:
    client.key_value_set(f"dsmoe/{key}", f"={text}")  # an empty value would be none


def await_text(key: str, limit_secs: float = _LIMIT_SECS) -> str:
  """Returns the text that a process has published, or will publish, under a key.

  Raises:
    JaxRuntimeError: when there is none within the limit, or the service is gone.
  """
  client = distributed.global_state.client
  assert client is not None  # since there are several processes
  return client.blocking_key_value_get(f"dsmoe/{key}", round(limit_secs * 1000))[1:]


def withdraw(key: str) -> None:
  """Deletes a published text, which nobody will ask for again."""
  if (client := distributed.global_state.client) is not None:
    client.key_value_delete(f"dsmoe/{key}")


def say(text: str) -> None:
  """Prints what every process would print, once."""
  if is_first():
    print(text)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
  """Where one process meets a user's mistake, all of them raise it, instead of waiting for it.

  What is done inside must not wait for other processes.

  Raises:
    ValueError: when another process raised ValueError or OSError inside, naming that process.
  """
  error = None
  try:
    yield
  except (ValueError, OSError) as raised:
    error = raised
  messages = exchange("" if error is None else str(error) or type(error).__name__)
  if error is not None:
    raise error
  for process, message in enumerate(messages):
    if message:
      raise ValueError(f"process {process}: {message}")


def first_then_others(what: str, make: Callable[[], T]) -> T:
  """Calls `make` in the first process and then in the others, which find on disk what it left.

  Args:
    what: "to prepare the data", say; the others print that they wait for it.
    make: returns what this function returns. Its user's mistakes fail all processes.
  """
  made: list[T] = []
  for turn in (True, False):
    if turn and not is_first():
      print(f"process {jax.process_index()} waits for process 0 {what}", flush=True)
    with failing_together():
      if is_first() == turn:
        made.append(make())
  return made[0]


def check_same(what: str, text: str, describe: Callable[[str, str], str]) -> None:
  """Checks that a text is the same in all processes.

  Args:
    what: its name, for the message.
    text: of this process.
    describe: returns how the text of the first process differs from that of another.

  Raises:
    ValueError: naming the first process that differs, and the difference.
  """
  first, *_ = texts = exchange(text)
  for process, other in enumerate(texts):
    if other != first:
      raise ValueError(
        f"all processes of a run must have the same {what}; between process 0 and process "
        f"{process} differ: {describe(first, other)}"
      )


def source_digests(*packages: types.ModuleType) -> dict[str, str]:
  """Returns a digest of each folder with source code in packages, by its name such as dsmoe/data."""
  digests = {}
  for package in packages:
    root = pathlib.Path(package.__path__[0])
    for folder in sorted({path.parent for path in root.rglob("*.py")}):
      digest = hashlib.sha256()
      for path in sorted(folder.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
      digests[folder.relative_to(root.parent).as_posix()] = digest.hexdigest()[:12]
  return digests


def leave(code: int, message: str = "") -> NoReturn:
  """Ends this process at once, from any thread, without waiting for the others as the usual end does.

  Args:
    code: exit code.
    message: why; printed to stderr.
  """
  if message:
    os.write(2, f"error: {message}\n".encode())
  # Another thread may stand still in the midst of printing.
  flushing = threading.Thread(target=sys.stdout.flush, daemon=True)
  flushing.start()
  flushing.join(1)
  os._exit(code)


def advice() -> str:
  """Returns what follows a message of a lost process: what the user does, or "" if a launcher does it."""
  if os.environ.get(RESTARTED):
    return ""
  return "; start all processes again, and the run goes on from its newest checkpoint"


def wait_if_alone(error: BaseException) -> bool:
  """Waits while another process may be found to be gone, upon which `watch` ends this one.

  What turns errors of any kind into a sentence of its own calls this first.

  Returns:
    Whether `error` is one that a collective or the service between processes raises; False, at once,
    in a run of one process.
  """
  status = re.match(
    r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ", str(error)
  )
  # `num_processes`, unlike `jax.process_count`, waits for no device.
  if distributed.global_state.num_processes == 1 or status is None:
    return False
  time.sleep(_NAMED_SECS)
  return True


def leave_if_alone(error: Exception) -> None:
  """Ends a process that cannot go on since another is gone, at once and with RESTART_CODE.

  The usual end would wait for the process that is gone. Returns in a run of one process, and when
  `error` is not what a collective or the service between processes raises.
  """
  if wait_if_alone(error):
    state = distributed.global_state
    leave(
      RESTART_CODE,
      f"process {state.process_id} of {state.num_processes} lost another process, or its device "
      f"failed ({str(error).splitlines()[0]}){advice()}",
    )


@contextlib.contextmanager
def leaving_if_alone() -> Iterator[None]:
  """Calls `leave_if_alone` with what is raised inside, before anything waits for other processes."""
  try:
    yield
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    leave_if_alone(error)
    raise


def agreed_reason(reason: str | None) -> str | None:
  """Returns the reason to stop that the first of the processes which were given one was given.

  Every process calls this at the same places, with None where it has no reason.
  """
  return next((text for text in exchange(reason or "") if text), None)


def agreed_to_stop(step: int, signals: list[str]) -> bool:
  """Whether a run ends after `step`, the same step for every process.

  A run of one process ends when a signal has come. One of several uses JAX's service, which tells
  the others of a SIGTERM that one process gets and names a step that none of them has passed;
  every process calls this after each step.

  Args:
    step: that was made.
    signals: names of those that came to this process.
  """
  if jax.process_count() == 1:
    return bool(signals)
  if signals and signals[-1] != "SIGTERM":
    signals.append("SIGTERM")
    signal.raise_signal(signal.SIGTERM)  # which the service waits for
  if not multihost_utils.reached_preemption_sync_point(step):
    return False
  signals[:] = signals or ["SIGTERM"]
  return True
