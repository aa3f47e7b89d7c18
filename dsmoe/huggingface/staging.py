"""Creates folders atomically, and resumes after a kill.

A folder is written as `<name>.partial` beside its destination and renamed at the end. The journal
in it describes the job and lists the items that are on disk.
"""

import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import rich.console
import rich.progress

JOURNAL = "journal"
WORKERS = 3  # reading, converting and writing overlap; each holds a piece of a tensor
SYNC_SECS = 1.0  # between two entries of the journal
LINE_SECS = 10.0  # between two lines of progress, where there is no terminal
LONG_BYTES = 10**9  # steps from this size on are announced


def check_absent(destination: pathlib.Path) -> None:
  """Raises ValueError when the destination exists."""
  if destination.exists():
    raise ValueError(f"the destination must not exist, {destination} does")


def announce(what: str, num_bytes: int) -> None:
  """Prints the name of a step without a progress bar, if its size makes it slow."""
  if num_bytes >= LONG_BYTES:
    print(f"{what}, {num_bytes / 1e9:.1f} GB", flush=True)


class Staging:
  """A folder that is being written; a context manager that locks out other processes."""

  def __init__(self, destination: pathlib.Path, job: dict[str, Any], num_bytes: int):
    """Starts to write a folder, or resumes.

    Args:
      destination: final path; must not exist.
      job: describes inputs and settings, for JSON; only an equal job is resumed.
      num_bytes: size of the finished folder.

    Raises:
      ValueError: if the destination exists, another job is under way, `<name>.partial` was not
        created by this class, or the disk is full.
    """
    self._destination = destination
    self.folder = destination.with_name(destination.name + ".partial")
    self._journal = self.folder / JOURNAL
    self._waiting: list[str] = []
    self._synced = time.monotonic()
    check_absent(destination)
    header = json.dumps(job, sort_keys=True).encode() + b"\n"
    if not self.folder.exists():
      self._begin(header, num_bytes)
    if not self._journal.exists():
      raise ValueError(
        f"{self.folder} must hold the {JOURNAL} of what is being made, it has none: delete it to "
        "begin anew"
      )
    self._file = self._journal.open("r+b")
    try:
      self.done = self._resume(header)
    except BaseException:
      self._file.close()
      raise

  def _begin(self, header: bytes, num_bytes: int) -> None:
    parent = self._destination.parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
      raise ValueError(f"{parent} must have {num_bytes / 1e9:.1f} GB free, it has {free / 1e9:.1f}")
    self.folder.mkdir()
    temporary = self._journal.with_name(JOURNAL + ".tmp")
    temporary.write_bytes(header)
    temporary.replace(self._journal)

  def _resume(self, header: bytes) -> set[str]:
    """Locks the journal; returns the items that it says are on disk."""
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(f"{self.folder} is being written by another process") from error
    check_absent(self._destination)
    # Before this process had the lock, another may have finished, or a user may have deleted it.
    try:
      same = os.path.samestat(os.fstat(self._file.fileno()), self._journal.stat())
    except FileNotFoundError:
      same = False
    if not same:
      raise ValueError(f"{self.folder} must stay while it is opened, it was replaced or removed")
    text = self._file.read()
    whole = text[: text.rfind(b"\n") + 1]  # a line cut short by a kill is not one
    if not whole.startswith(header):
      raise ValueError(
        f"{self.folder} was begun from another source or with other settings; go on as it was "
        "begun, or delete it"
      )
    self._file.truncate(len(whole))
    self._file.seek(len(whole))
    return set(whole.decode().split("\n")[1:-1])

  def __enter__(self) -> "Staging":
    return self

  def __exit__(self, *_):
    self._file.close()

  def mark(self, item: str, sync: Callable[[], None]) -> None:
    """Records that an item is written; `sync` flushes to disk what was written until now."""
    self._waiting.append(item)
    if time.monotonic() - self._synced >= SYNC_SECS:
      sync()
      self._file.write("".join(f"{item}\n" for item in self._waiting).encode())
      self._file.flush()
      os.fsync(self._file.fileno())
      self._waiting, self._synced = [], time.monotonic()

  def finish(self) -> None:
    """Flushes the folder to disk and renames it to its destination."""
    paths = [*self.folder.rglob("*"), self.folder]
    announce(f"putting {self._destination} on disk", sum(path.stat().st_size for path in paths))
    for path in paths:
      number = os.open(path, os.O_RDONLY)
      os.fsync(number)
      os.close(number)
    self._journal.unlink()
    self.folder.rename(self._destination)


def run(
  staging: Staging,
  sizes: dict[str, int],
  make: Callable[[str], None],
  sync: Callable[[], None],
  label: str,
  group: Callable[[str], Any] = lambda item: None,
) -> None:
  """Writes every item that the journal does not list, a few at a time, with a progress bar.

  Args:
    staging: the folder.
    sizes: bytes of each item, in the order in which they are written.
    make: writes an item; called in a thread.
    sync: see `Staging.mark`.
    label: text of the progress bar.
    group: neighbouring items of an equal group may be written at the same time.
  """
  items = [item for item in sizes if item not in staging.done]
  already = sum(sizes.values()) - sum(sizes[item] for item in items)
  with bytes_bar(label, sum(sizes.values()), already) as advance:
    for item in _in_threads(make, items, group):
      staging.mark(item, sync)
      advance(sizes[item])
  sync()


def _in_threads(
  make: Callable[[str], None], items: Sequence[str], group: Callable[[str], Any]
) -> Iterator[str]:
  pool = ThreadPoolExecutor(WORKERS)
  try:
    for _, members in itertools.groupby(items, group):
      together = list(members)
      for item, _ in zip(together, pool.map(make, together)):
        yield item
  finally:
    pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def bytes_bar(label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
  """Shows bytes, speed and time left; yields a function that adds bytes.

  A terminal shows a bar; elsewhere a line is printed now and then, and one at the end.
  """
  console = rich.console.Console(force_terminal=None if sys.stdout.isatty() else False)
  if console.is_terminal:
    columns = (
      rich.progress.TextColumn("{task.description}"),
      rich.progress.BarColumn(),
      rich.progress.DownloadColumn(),
      rich.progress.TransferSpeedColumn(),
      rich.progress.TimeRemainingColumn(),
      rich.progress.TextColumn("left"),
    )
    with rich.progress.Progress(*columns, console=console) as bar:
      task = bar.add_task(label, total=total, completed=done)
      yield lambda more: bar.advance(task, more)
    return
  start = last = time.monotonic()
  now = done

  def line():
    speed = (now - done) / max(time.monotonic() - start, 1e-3)
    left = (total - now) / speed if speed else 0
    print(
      f"{label}: {now / 1e9:.2f} of {total / 1e9:.2f} GB, {speed / 1e9:.3f} GB/s, {left:.0f} s left",
      flush=True,
    )

  def advance(more: int):
    nonlocal now, last
    now += more
    if time.monotonic() - last >= LINE_SECS:
      last = time.monotonic()
      line()

  yield advance
  line()
