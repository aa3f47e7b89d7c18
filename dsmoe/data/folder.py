"""The files of a folder that several processes may use: whole or absent, with a lock."""

import contextlib
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath


class ChangedDataError(ValueError):
  """Tokenised data is damaged, or was made from other text or settings than there are now."""


def json_sha256(value: Any) -> str:
  """Returns the SHA-256, hexadecimal, of a value's JSON with sorted keys."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: epath.Path) -> Any:
  """Reads a JSON file that is made again when it is missing.

  Raises:
    ValueError: if it is not JSON.
  """
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"{path} must be JSON, got {error}; delete it, and the next start makes it again"
    ) from error


def write_json(path: epath.Path, value: Any) -> None:
  """Writes a value as JSON."""
  with whole(path) as temporary:
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


@contextlib.contextmanager
def whole(path: epath.Path) -> Iterator[epath.Path]:
  """Gives a temporary file that becomes `path` at the end, or goes if something is raised."""
  temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
  try:
    yield temporary
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def delete_temporary(directory: epath.Path) -> None:
  """Deletes what `whole` left in processes that were killed; no process may be at work."""
  for file in directory.glob("*.tmp"):
    file.unlink(missing_ok=True)


class Lock:
  """Tells whether other processes are at work in a folder; a killed process leaves it free.

  `is_exclusive` is True for a process that is alone with the folder until it calls `share`. Others
  wait for that. On file systems without locks it is False.
  """

  def __init__(self, directory: epath.Path):
    self._file = os.open(directory, os.O_RDONLY)
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      self.is_exclusive = True
    except OSError as error:
      self.is_exclusive = False
      if isinstance(error, BlockingIOError):
        self.share()

  def share(self) -> None:
    with contextlib.suppress(OSError):
      fcntl.flock(self._file, fcntl.LOCK_SH)

  def close(self) -> None:
    os.close(self._file)
