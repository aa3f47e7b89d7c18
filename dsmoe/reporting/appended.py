"""A file of lines that a run appends to, on disk or in an object store, which cannot append."""

import os
import shutil
import tempfile
import time

from etils import epath

_UPLOAD_SECS = 60.0  # between two copies of the file to an object store


class AppendedFile:
  """Appends lines; an object store gets the whole file by `flush`, `close` and once a minute."""

  def __init__(self, path: epath.Path):
    """Opens the file behind the lines that it has; its folder must exist."""
    self._path = live = path
    self._staging = None
    if is_remote(path):
      self._staging = tempfile.TemporaryDirectory(prefix="appended")
      live = epath.Path(self._staging.name) / path.name
      if path.exists():
        _copy(path, live)
    self._live = live
    self._file = live.open("a")
    self._upload_time = time.monotonic()

  def write(self, line: str) -> None:
    """Appends a line."""
    self._file.write(line + "\n")
    self._file.flush()
    if time.monotonic() - self._upload_time > _UPLOAD_SECS:
      self.flush()

  def flush(self) -> None:
    """Makes the lines written so far durable."""
    if self._staging is not None:
      _copy(self._live, self._path)
    self._upload_time = time.monotonic()

  def close(self) -> None:
    """Flushes and closes the file."""
    self._file.close()
    self.flush()
    if self._staging is not None:
      self._staging.cleanup()


def is_remote(path: epath.PathLike) -> bool:
  """Whether a path is in an object store."""
  return "://" in os.fspath(path)


def _copy(source: epath.Path, target: epath.Path) -> None:
  with source.open("rb") as reader, target.open("wb") as writer:
    shutil.copyfileobj(reader, writer)
