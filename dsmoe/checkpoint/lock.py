"""One owner of a workdir: a second process that would train in it is refused.

On disk the owner holds the kernel's lock on the file `lock`, which goes with its process however
that ends. Object stores have no such locks. There the owner writes the object anew every few
seconds, and one that nobody has rewritten for a while is free.
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

LOCK_FILE = "lock"
_RENEWAL_SECS = 10.0  # between two writes of an object
_STALE_SECS = 40.0  # an object that was not written for so long has no owner
# Of processes that start at once, the one that wrote last is the owner. Whoever writes within this
# time after it found the object free is seen by all that wait for as long after they wrote.
_SETTLE_SECS = 2.0


class InUseError(ValueError):
  """Another process trains in the workdir; says nothing about the run itself."""


@contextlib.contextmanager
def owned(workdir: epath.PathLike) -> Iterator[Callable[[], None]]:
  """Makes this run the only one that writes to `workdir` until the context ends.

  Of a run of several processes the first one takes the lock.

  Args:
    workdir: on disk or in an object store; created if absent.

  Yields:
    A function that raises InUseError if another process has become the owner, which can happen in
    an object store, to a process that stood still, and on disk, to one whose lock somebody deleted.
    Call it before anything is replaced.

  Raises:
    InUseError: when another process is the owner, naming it.
  """
  workdir = epath.Path(workdir)
  if jax.process_index() != 0:
    yield lambda: None
    return
  workdir.mkdir(parents=True, exist_ok=True)
  with (_lease if "://" in os.fspath(workdir) else _kernel_lock)(workdir) as check:
    yield check


def _owner() -> str:
  now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
  return f"process {os.getpid()} on {socket.gethostname()} since {now}"


def _refuse(workdir: epath.Path, owner: str) -> None:
  raise InUseError(
    f"{workdir} must have one run at a time, and is in use by {owner}: wait for its end, or name "
    "another --workdir"
  )


@contextlib.contextmanager
def _kernel_lock(workdir: epath.Path) -> Iterator[Callable[[], None]]:
  """The lock of a file on disk. A process that was forked from the owner would hold it too."""
  path = workdir / LOCK_FILE

  def check() -> None:
    # Somebody deleted it, and another process has locked the file that it made instead.
    with contextlib.suppress(FileNotFoundError), open(path, errors="replace") as found:
      if not os.path.samestat(os.fstat(found.fileno()), os.fstat(file.fileno())):
        _refuse(workdir, found.read().strip() or "another process")

  with open(path, "a+", errors="replace") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      _refuse(workdir, file.read().strip() or "another process")
    except OSError:  # a file system without locks
      with _lease(workdir) as check_lease:
        yield check_lease
      return
    file.truncate(0)
    file.write(_owner() + "\n")
    file.flush()
    yield check


@contextlib.contextmanager
def _lease(workdir: epath.Path) -> Iterator[Callable[[], None]]:
  """An object that its owner keeps rewriting, each time with another number.

  A process whose write came so late that another may have become the owner before it waits until
  that other has seen the write and given way.
  """
  path = workdir / LOCK_FILE
  mine = {"owner": _owner(), "token": uuid.uuid4().hex}

  def others() -> dict[str, Any] | None:
    text = path.read_text().strip() if path.exists() else ""
    try:
      found = json.loads(text) if text else None
    except ValueError:
      found = {}
    if found is not None and not isinstance(found, dict):
      found = {}
    return None if found is not None and found.get("token") == mine["token"] else found

  looked = time.monotonic()
  if (before := others()) is not None:
    print(f"{path} names {before.get('owner')}: waiting for {_STALE_SECS:.0f} s whether it lives")
    time.sleep(_STALE_SECS)
    looked = time.monotonic()
    if (now := others()) not in (None, before):
      _refuse(workdir, now.get("owner", "another process"))
  path.write_text(json.dumps(mine))
  late = time.monotonic() - looked > _SETTLE_SECS
  time.sleep(_STALE_SECS if late else _SETTLE_SECS)
  if (now := others()) is not None:
    _refuse(workdir, now.get("owner", "another process"))

  ended, lost = threading.Event(), []

  def renew() -> None:
    number, renewed = 0, time.monotonic()
    while not ended.wait(_RENEWAL_SECS):
      number += 1
      with contextlib.suppress(Exception):  # a store may fail for a moment
        if (now := others()) is not None:
          lost.append(now.get("owner", "another process"))
          return
        path.write_text(json.dumps(mine | {"renewed": number}))
        renewed = time.monotonic()
      if time.monotonic() - renewed > _STALE_SECS:
        lost.append(f"nobody: {path} could not be renewed for {_STALE_SECS:.0f} s")
        return

  def check() -> None:
    if lost:
      _refuse(workdir, lost[0])

  renewal = threading.Thread(target=renew, name="lock", daemon=True)
  renewal.start()
  try:
    yield check
  finally:
    ended.set()
    renewal.join()
    if not lost:
      path.unlink(missing_ok=True)
