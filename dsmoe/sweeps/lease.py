"""Leases: which process runs a trial, on whichever machine, in files that all of them see.

A lease is a file that names its holder. On one machine the kernel's lock on that file decides: it
ends with the process, however that ends, and a process that merely stands still keeps it. For
other machines, whose locks a network file system or an object store may not show, the holder
rewrites the file every few seconds. A lease of another machine is free when its file has stayed
the same for a minute. That minute is measured by the clock of whoever wants the lease, so clocks
need not agree, only run equally fast.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from typing import Any, NamedTuple

from etils import epath

FOLDER = "leases"
_RENEWAL_SECS = 10.0
_STALE_SECS = 60.0
_LOOK_SECS = 0.01  # after which a lock that `is_held` had for a moment is free
_SETTLE_SECS = 2.0  # of two machines that take a lease at once, the one that wrote last has it
_RELEASED = "free"


class _Held(NamedTuple):
  """A lease of this process: the file's descriptor with the kernel's lock, None without one."""

  file: int | None
  token: str


def this_machine() -> str:
  """Names the running kernel, whose locks all its processes share."""
  boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
  return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}".strip()


def trial_name(number: int) -> str:
  """Returns the name of a trial's lease."""
  return f"trial-{number:04d}"


def is_held(workdir: epath.PathLike, name: str, machine: str | None = None) -> bool:
  """Whether a process has a lease, found out without taking it, for those who only look.

  Where the kernel's lock does not show the holder, which is on another machine, it is the age of
  the lease's file by the clock of this machine that tells.

  Args:
    workdir: the sweep's.
    name: of the lease.
    machine: see `this_machine`.
  """
  path = epath.Path(workdir) / FOLDER / name
  has_lock = False
  try:
    if "://" not in os.fspath(path):
      with open(path, "rb") as file:
        try:
          fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
          has_lock = True
        except BlockingIOError:
          return True
        except OSError:  # a file system without locks
          pass
    holder, age_secs = _holder(path.read_text().strip()), time.time() - path.stat().mtime
  except FileNotFoundError:
    return False
  if holder is None or (has_lock and holder in ("", machine or this_machine())):
    return False
  return age_secs <= _STALE_SECS


class Leases:
  """The leases of a process; a context that renews them, and ends them with it.

  Args:
    workdir: the sweep's, on a disk or in an object store that all machines see.
    machine: see `this_machine`.
    renewal_secs, stale_secs, settle_secs: see above; the same on all machines.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    machine: str | None = None,
    renewal_secs: float = _RENEWAL_SECS,
    stale_secs: float = _STALE_SECS,
    settle_secs: float = _SETTLE_SECS,
  ):
    self._folder = epath.Path(workdir) / FOLDER
    self._folder.mkdir(parents=True, exist_ok=True)
    self._is_on_disk = "://" not in os.fspath(self._folder)
    self._machine = machine or this_machine()
    self._renewal_secs, self._stale_secs = renewal_secs, stale_secs
    self._settle_secs = settle_secs
    self._held: dict[str, _Held] = {}
    self._lost: set[str] = set()
    self._seen: dict[str, tuple[str, float]] = {}  # others' leases, and since when they are so
    self._lock = threading.Lock()
    self._ended = threading.Event()
    self._renewal = threading.Thread(target=self._renew, name="leases", daemon=True)

  def __enter__(self) -> "Leases":
    self._renewal.start()
    return self

  def __exit__(self, *_) -> None:
    self._ended.set()
    self._renewal.join()
    for name in list(self._held):
      self.release(name)

  def take(self, name: str) -> bool:
    """Takes a lease if it is free; does not wait for one that is not.

    A lease that another machine held is found free only by calls that are a minute apart.
    """
    file, has_lock, is_new = None, False, False
    if self._is_on_disk:
      file, is_new = self._opened(name)
      try:
        has_lock = _locks(file)
      except BlockingIOError:
        os.close(file)
        return False
    text = self._text(name, file)
    before = None if is_new and not text else _holder(text)
    is_certain = has_lock and before in (None, "", self._machine)
    if not is_certain and before is not None and not self._is_stale(name, text):
      if file is not None:
        os.close(file)
      return False
    held = _Held(file, uuid.uuid4().hex)
    self._write(name, held, 0)
    if not is_certain:
      time.sleep(self._settle_secs)
      if not self._is_mine(name, held):
        if file is not None:
          os.close(file)
        return False
    with self._lock:
      self._lost.discard(name)
      self._held[name] = held
    self._seen.pop(name, None)
    return True

  def release(self, name: str) -> None:
    """Gives a lease of this process back, if it still has it."""
    with self._lock:
      held = self._held.pop(name, None)
      if held is None:
        return
      with contextlib.suppress(OSError):
        if self._is_mine(name, held):
          self._put(name, held.file, _RELEASED)
    if held.file is not None:
      os.close(held.file)

  def is_lost(self, name: str) -> bool:
    """Whether a lease that this process took has become another's, or could not be renewed."""
    return name in self._lost or name not in self._held

  def _renew(self) -> None:
    """Rewrites the leases of this process until it ends."""
    count, renewed = 0, dict.fromkeys(self._held, time.monotonic())
    while not self._ended.wait(self._renewal_secs):
      count += 1
      with self._lock:
        for name, held in self._held.items():
          renewed.setdefault(name, time.monotonic())
          with contextlib.suppress(Exception):  # a store may fail for a moment
            if not self._is_mine(name, held):
              self._lost.add(name)
              continue
            self._write(name, held, count)
            renewed[name] = time.monotonic()
          if time.monotonic() - renewed[name] > self._stale_secs:
            self._lost.add(name)
        renewed = {name: renewed[name] for name in self._held}

  def _is_stale(self, name: str, text: str) -> bool:
    """Whether another machine's lease has stayed the same for long enough."""
    before, since = self._seen.get(name, (None, 0.0))
    if before != text:
      self._seen[name] = (text, time.monotonic())
      return False
    return time.monotonic() - since > self._stale_secs

  def _is_mine(self, name: str, held: _Held) -> bool:
    found = _parsed(self._text(name, held.file))
    return found.get("token") == held.token

  def _write(self, name: str, held: _Held, count: int) -> None:
    holder = {"machine": self._machine, "process": os.getpid(), "token": held.token}
    self._put(name, held.file, json.dumps(holder | {"renewed": count}))

  def _opened(self, name: str) -> tuple[int, bool]:
    """Opens the file of a lease; returns its descriptor, and whether this call has made it.

    A new file is left empty: what is written before the lock is had could overwrite the lease of a
    process that has opened the file since, and taken it.
    """
    path = self._folder / name
    try:
      return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
      return os.open(path, os.O_RDWR), False

  def _text(self, name: str, file: int | None) -> str:
    if file is not None:
      return os.pread(file, 4096, 0).decode(errors="replace").strip()
    path = self._folder / name
    return path.read_text().strip() if path.exists() else _RELEASED

  def _put(self, name: str, file: int | None, text: str) -> None:
    """Writes a lease; on disk in one call, so that nobody reads a part of it."""
    if file is None:
      (self._folder / name).write_text(text)
      return
    size = os.fstat(file).st_size
    os.pwrite(file, text.ljust(size).encode(), 0)
    os.fsync(file)


def _locks(file: int) -> bool:
  """Takes the kernel's lock on a file; returns False on a file system without locks.

  Raises:
    BlockingIOError: when another process has the lock.
  """
  try:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # perhaps of one that only looks
      time.sleep(_LOOK_SECS)
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    raise
  except OSError:
    return False
  return True


def _parsed(text: str) -> dict[str, Any]:
  try:
    found = json.loads(text)
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}


def _holder(text: str) -> str | None:
  """Returns the machine that a lease names; "" if it is damaged, None if it is free."""
  return None if text == _RELEASED else str(_parsed(text).get("machine", ""))
