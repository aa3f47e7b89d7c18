"""Folders that appear whole or not at all, and whose making goes on after a kill.

`<name>.partial` grows beside its destination and takes its name at the end. The journal,
`<name>.partial.journal`, holds what is being made and which items are on disk.
"""

import contextlib
import fcntl
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

WORKERS = 3  # reading, converting and writing overlap; each holds a piece of a tensor
SYNC_SECS = 1.0  # between two notes in the journal
LINE_SECS = 10.0  # between two lines of progress, off a terminal


def check_absent(destination: pathlib.Path) -> None:
  """Raises ValueError when the destination exists."""
  if destination.exists():
    raise ValueError(f"the destination must not exist, {destination} does")


class Staging:
  """A folder on its way to its destination; a context manager that keeps others out."""

  def __init__(self, destination: pathlib.Path, job: dict[str, Any], num_bytes: int):
    """Starts, or goes on with, the making of a folder.

    Args:
      destination: must not exist.
      job: what is made from what, for JSON: only the same job goes on.
      num_bytes: what it will take on disk.

    Raises:
      ValueError: when the destination exists, another job is under way, or the disk is full.
    """
    self._destination = destination
    self.folder = destination.with_name(destination.name + ".partial")
    self._journal = destination.with_name(destination.name + ".partial.journal")
    self.done: set[str] = set()
    self._waiting: list[str] = []
    self._synced = time.monotonic()
    check_absent(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    self._file = self._journal.open("a+", encoding="utf-8")
    try:
      self._open(job, num_bytes)
    except BaseException:
      self._file.close()
      raise

  def _open(self, job: dict[str, Any], num_bytes: int) -> None:
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise ValueError(f"{self.folder} is being written by another process") from error
    self._file.seek(0)
    text = self._file.read()
    lines = text.split("\n")[:-1]  # a line cut short by a kill is not one
    header = json.dumps(job, sort_keys=True)
    if lines and lines[0] != header:
      raise ValueError(
        f"{self.folder} was begun from another source or with other settings; go on as it was "
        f"begun, or delete it and {self._journal.name}"
      )
    if not lines:
      free = shutil.disk_usage(self._destination.parent).free
      if free < num_bytes:
        self._journal.unlink()
        raise ValueError(
          f"{self._destination.parent} must have {num_bytes / 1e9:.1f} GB free, it has "
          f"{free / 1e9:.1f}"
        )
    self.folder.mkdir(exist_ok=True)
    self.done = set(lines[1:])
    self._file.truncate(0)
    self._file.write("\n".join([header, *lines[1:], ""]))
    self._file.flush()

  def __enter__(self) -> "Staging":
    return self

  def __exit__(self, *_):
    self._file.close()

  def mark(self, item: str, sync: Callable[[], None]) -> None:
    """Notes that an item is made; `sync` puts on disk what was made until now."""
    self._waiting.append(item)
    if time.monotonic() - self._synced >= SYNC_SECS:
      sync()
      self._file.write("".join(f"{item}\n" for item in self._waiting))
      self._file.flush()
      os.fsync(self._file.fileno())
      self._waiting, self._synced = [], time.monotonic()

  def finish(self) -> None:
    """Gives the folder its name, all of it being on disk: from here on it exists."""
    for path in [*self.folder.rglob("*"), self.folder]:
      number = os.open(path, os.O_RDONLY)
      os.fsync(number)
      os.close(number)
    self.folder.rename(self._destination)
    self._journal.unlink()


def run(
  staging: Staging,
  sizes: dict[str, int],
  make: Callable[[str], None],
  sync: Callable[[], None],
  label: str,
) -> None:
  """Makes every item that the journal does not name, a few at a time, and shows how far it is.

  Args:
    sizes: bytes of each item, in the order to make them.
    make: called with an item, in a thread.
    sync: see `Staging.mark`.
    label: in front of the bar.
  """
  items = [item for item in sizes if item not in staging.done]
  already = sum(sizes.values()) - sum(sizes[item] for item in items)
  with bytes_bar(label, sum(sizes.values()), already) as advance:
    for item in _in_threads(make, items):
      staging.mark(item, sync)
      advance(sizes[item])
  sync()


def _in_threads(make: Callable[[str], None], items: Sequence[str]) -> Iterator[str]:
  pool = ThreadPoolExecutor(WORKERS)
  try:
    for item, _ in zip(items, pool.map(make, items)):
      yield item
  finally:
    pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def bytes_bar(label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
  """Shows bytes, speed and time left; yields a function that is told of more bytes.

  A bar on a terminal; elsewhere a line now and then, and one at the end.
  """
  console = rich.console.Console(force_terminal=None if sys.stdout.isatty() else False)
  if console.is_terminal:
    columns = (
      *(rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn()),
      *(rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn()),
      *(rich.progress.TimeRemainingColumn(), rich.progress.TextColumn("left")),
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
