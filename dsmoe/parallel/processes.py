"""The processes of a run: what they agree on, beside the arrays they compute together.

Short texts travel through the service that joined the processes, `jax._src.distributed`. It is the
only way that needs no device and may take hours, and JAX has no public name for it: a test of two
processes fails first when it changes.
"""

import contextlib
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

RESTART_CODE = 75  # the exit code of a process that should be started again (EX_TEMPFAIL)
_LIMIT_SECS = 24 * 3600  # one process may tokenise while the others wait
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
  client, call = distributed.global_state.client, next(_calls)
  assert client is not None  # since there are several processes
  client.key_value_set(f"dsmoe/{call}/{jax.process_index()}", f"={text}")
  return [
    client.blocking_key_value_get(f"dsmoe/{call}/{i}", _LIMIT_SECS * 1000)[1:]
    for i in range(jax.process_count())
  ]


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


def leave_if_alone(error: Exception) -> None:
  """Ends a process that cannot go on since another is gone, at once and with RESTART_CODE.

  The usual end would wait for the process that is gone, and then abort. Returns in a run of one
  process, and when `error` is not what a collective or the service between processes raises.
  """
  status = re.match(
    r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ", str(error)
  )
  if jax.process_count() == 1 or status is None:
    return
  reason = str(error).splitlines()[0]
  print(
    f"error: process {jax.process_index()} of {jax.process_count()} lost another process, or its "
    f"device failed ({reason}); start all processes again, and the run goes on from the newest "
    "checkpoint",
    file=sys.stderr,
    flush=True,
  )
  sys.stdout.flush()
  os._exit(RESTART_CODE)


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
