"""Optuna's journal in a file, with a lock that goes with its holder and an end that heals.

Optuna's own locks are files that their holder deletes: after a kill all others wait half a minute,
and then delete a lock that by then may be another's. The kernel's lock on a file is free as soon as
its holder is gone. A process or machine that dies while it writes can leave half a line, which
Optuna would join with the next one and then never read past.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import optuna
from optuna.storages import journal

_BLOCK_BYTES = 4096


class _Journal(journal.JournalFileBackend):
  """Optuna's journal file with another way of writing to it; reading needs no lock."""

  def __init__(self, path: str):
    super().__init__(path)
    self._path = path

  def append_logs(self, logs: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
    with _locked(f"{self._path}.lock"), open(self._path, "rb+") as file:
      file.truncate(_end_of_lines(file))
      file.seek(0, os.SEEK_END)
      file.write(text.encode())
      file.flush()
      os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
  """Holds the kernel's lock on a file; a process that ends in any way lets go of it."""
  file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
  try:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
  finally:
    os.close(file)


def _end_of_lines(file: BinaryIO) -> int:
  """Returns the size of a file without an unfinished last line, which nobody was told is stored."""
  end = file.seek(0, os.SEEK_END)
  while end:
    begin = max(0, end - _BLOCK_BYTES)
    file.seek(begin)
    newline = file.read(end - begin).rfind(b"\n")
    if newline >= 0:
      return begin + newline + 1
    end = begin
  return 0


def storage(path: str) -> optuna.storages.JournalStorage:
  """Opens the journal in the file `path`, which is created if absent."""
  return optuna.storages.JournalStorage(_Journal(path))
