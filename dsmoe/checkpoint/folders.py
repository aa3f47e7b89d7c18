"""Folders of checkpoints: which are complete, and copying, deleting and naming them.

As with orbax, a checkpoint on disk is complete when its folder has its name, which it gets at the
end, and in an object store when it has the commit file, which is written last.
"""

import os
from collections.abc import Callable, Iterator
from concurrent import futures

import orbax.checkpoint as ocp
from etils import epath

from dsmoe.checkpoint import contents
from dsmoe.data.folder import whole

_COMMIT_FILE = ocp.path.atomicity_types.COMMIT_SUCCESS_FILE
_UNFINISHED = ocp.path.atomicity_types.TMP_DIR_SUFFIX  # the next run deletes folders that have it
_CHUNK_BYTES = 16 << 20
_FILES_AT_ONCE = 8


def steps_in(workdir: epath.PathLike) -> list[int]:
  """Returns the steps of a workdir's complete checkpoints, in order."""
  folder = contents.folder(workdir)
  if not folder.exists():
    return []
  found = [path for path in folder.iterdir() if path.name.isdigit() and is_complete(path)]
  return sorted(int(path.name) for path in found)


def _commits_by_file(path: epath.Path) -> bool:
  """Whether a folder is complete when it has the commit file, as in object stores; else by its name."""
  return "://" in os.fspath(path)


def is_complete(path: epath.Path) -> bool:
  """Whether a folder whose name is a step is a checkpoint that may be read."""
  return (path / _COMMIT_FILE).exists() if _commits_by_file(path) else path.is_dir()


def files(folder: epath.Path) -> Iterator[epath.Path]:
  """Yields the files of a folder and of those in it."""
  for path in folder.iterdir():
    if path.is_dir():
      yield from files(path)
    else:
      yield path


def copy_folder(
  source: epath.Path, target: epath.Path, count: Callable[[int], None] = lambda num_bytes: None
) -> None:
  """Copies a checkpoint; a reader sees all of it or no checkpoint, whenever this is killed.

  Args:
    source, target: folders of one step; a target that exists is replaced.
    count: called with the number of bytes after each part of a file; what it raises ends the copy.

  Raises:
    OSError: when a file cannot be read or written, or becomes shorter or longer on the way.
  """
  unfinished = target
  if not _commits_by_file(target):
    unfinished = target.with_name(target.name + _UNFINISHED)
  delete(unfinished)
  paths = [path.relative_to(source) for path in files(source)]
  for parent in {path.parent for path in paths}:
    (unfinished / parent).mkdir(parents=True, exist_ok=True)
  commit = epath.Path(_COMMIT_FILE)

  def copy(path: epath.Path) -> None:
    _copy_bytes(source / path, unfinished / path, count)

  with futures.ThreadPoolExecutor(_FILES_AT_ONCE, "copy_files") as pool:
    list(pool.map(copy, [path for path in paths if path != commit]))
  if not _commits_by_file(target):
    delete(target)
  text = f"Copied from {source}"
  (unfinished / commit).write_text((source / commit).read_text() if commit in paths else text)
  if unfinished != target:
    unfinished.rename(target)


def _copy_bytes(source: epath.Path, target: epath.Path, count: Callable[[int], None]) -> None:
  """Copies a file in chunks.

  Raises:
    OSError: when the copy has another length.
  """
  size = 0
  with source.open("rb") as reader, target.open("wb") as writer:
    while chunk := reader.read(_CHUNK_BYTES):
      writer.write(chunk)
      size += len(chunk)
      count(len(chunk))
  if (found := target.stat().length) != size:
    raise OSError(f"{target} must have {size} bytes, it has {found}")


def copy_file(source: epath.Path, target: epath.Path) -> None:
  """Copies a small file, if there is one, as a whole."""
  if source.exists():
    with whole(target) as temporary:
      _copy_bytes(source, temporary, lambda num_bytes: None)


def delete(folder: epath.Path) -> None:
  """Deletes a checkpoint; what a kill leaves of it is none."""
  if not folder.exists():
    return
  if _commits_by_file(folder):
    (folder / _COMMIT_FILE).unlink(missing_ok=True)
  elif _UNFINISHED not in folder.name:
    doomed = folder.with_name(folder.name + _UNFINISHED + "-deleted")
    if doomed.exists():
      doomed.rmtree()
    folder = folder.rename(doomed)
  folder.rmtree()


def move(source: epath.Path, target: epath.Path) -> None:
  """Moves a checkpoint; a reader sees all of it or none."""
  if _commits_by_file(target):
    copy_folder(source, target)
    delete(source)
  else:
    source.rename(target)


def delete_unfinished(folder: epath.Path) -> None:
  """Deletes what saves, copies and deletions that were killed have left in a folder."""
  for path in folder.iterdir() if folder.exists() else ():
    is_half = path.name.isdigit() and path.is_dir() and not is_complete(path)
    if is_half or ocp.utils.is_tmp_checkpoint(path):
      path.rmtree()


def unused(path: epath.Path) -> epath.Path:
  """Returns a path, with a number behind it if it is there already."""
  found, number = path, 0
  while found.exists():
    number += 1
    found = path.with_name(f"{path.name}.{number}")
  return found
