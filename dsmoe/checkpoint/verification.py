"""Whether a save has written what the devices hold: it is read back before it is committed.

Orbax writes a checkpoint into a place that no reader takes for a checkpoint, calls
`Verification.check` in process 0, and only then renames it (in an object store, marks it as
complete). Older checkpoints are deleted after that. Each process reads what its own devices hold.
"""

import json
import threading
from concurrent import futures
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath

from dsmoe.checkpoint import contents, integrity, slices
from dsmoe.parallel import processes

_READERS = 4  # arrays that a process reads at once


class DamagedSaveError(RuntimeError):
  """What a save has written is not what the devices hold; it does not become a checkpoint."""


class _Array(NamedTuple):
  """An array of the state, and which parts of it the devices of this process hold."""

  shape: tuple[int, ...]
  dtype: str
  parts: list[tuple[slice, ...]]


class Verification:
  """The verification of one save; every process has one, made before the save starts."""

  def __init__(self, step: int, state: Any, items: dict[str, Any], checksums: dict[str, str]):
    """Notes what is to be read; no array is kept.

    Args:
      step: of the checkpoint.
      state: tree of arrays, which is being saved.
      items: what is saved beside it as JSON, by the names of the folders.
      checksums: of the arrays by dotted name, from `integrity.measure`.
    """
    self._step, self._items, self._checksums = step, items, checksums
    self._arrays = {
      contents.name_of(path): _own_parts(x) for path, x in jax.tree.leaves_with_path(state)
    }

  def start(self, folder: epath.Path) -> None:
    """Lets another process than the first read its share as soon as the first asks it to."""
    if not processes.is_first():
      threading.Thread(target=self._help, args=(folder,), name="verification", daemon=True).start()

  def check(self, folder: epath.Path) -> None:
    """Reads back what was written; orbax calls this in process 0, in a thread of its own.

    Args:
      folder: of the run's checkpoints.

    Raises:
      DamagedSaveError: naming the checkpoint and what is wrong.
    """
    processes.publish(self._key("asked"), "")
    shares = [self._share(folder)]
    shares += [processes.await_text(self._key(i)) for i in range(1, jax.process_count())]
    for process, share in enumerate(shares):
      processes.withdraw(self._key(process))
      if "error" in (found := json.loads(share)):
        self._fail(folder, f"process {process} cannot read it: {found['error']}")
    totals = map(sum, zip(*(json.loads(share)["sums"] for share in shares)))
    for (name, array), total in zip(self._arrays.items(), totals, strict=True):
      found = f"{array.dtype} {total % 2**32:08x}"
      if found != self._checksums[name]:
        self._fail(folder, f"the checksum of {name} must be {self._checksums[name]}, it is {found}")
    for name, value in self._items.items():
      found = (_written(folder, self._step) / name / "metadata").read_text()
      if json.loads(found) != json.loads(json.dumps(value)):
        self._fail(folder, f"{name} is not what was saved")
    processes.withdraw(self._key("asked"))

  def _help(self, folder: epath.Path) -> None:
    processes.await_text(self._key("asked"))
    processes.publish(self._key(jax.process_index()), self._share(folder))

  def _share(self, folder: epath.Path) -> str:
    """Returns, as JSON, what this process's parts add to each checksum, or why it cannot tell."""
    try:
      shapes: dict[slices.Path, tuple[int, ...]] = {
        (name,): array.shape for name, array in self._arrays.items() if array.parts
      }
      stored = slices.open_arrays(_written(folder, self._step) / "state", shapes)
      with futures.ThreadPoolExecutor(_READERS) as pool:
        sums = pool.map(lambda name: _sum(stored, name, self._arrays[name]), self._arrays)
        return json.dumps({"sums": list(sums)})
    except Exception as error:  # tensorstore raises errors of many kinds
      return json.dumps({"error": " ".join(str(error).split())[:300] or type(error).__name__})

  def _fail(self, folder: epath.Path, reason: str) -> None:
    logging.get_absl_logger().addFilter(_is_worth_logging)
    raise DamagedSaveError(
      f"the checkpoint of step {self._step} in {folder.parent} was not written as it must be "
      f"({reason}): it is left out, and the checkpoints before it are kept; see whether the storage "
      "is sound, and start again from the newest one"
    )

  def _key(self, part: str | int) -> str:
    return f"verification/{self._step}/{part}"


def _own_parts(x: Any) -> _Array:
  shape, dtype = tuple(x.shape), x.dtype.name
  if not isinstance(x, jax.Array):
    return _Array(shape, dtype, [(slice(None),) * len(shape)] if processes.is_first() else [])
  return _Array(shape, dtype, [s.index for s in x.addressable_shards if s.replica_id == 0])


def _sum(stored: slices.Arrays, name: str, array: _Array) -> int:
  """Returns what this process's parts of an array, as they are stored, add to its checksum."""
  if not array.parts:
    return 0
  total, opened = 0, stored[(name,)]
  for index in array.parts:
    starts = [one.indices(n)[0] for one, n in zip(index, array.shape, strict=True)]
    total += integrity.sum_of_part(opened[index].read().result(), starts, array.shape)
  return total % 2**32


def _written(folder: epath.Path, step: int) -> epath.Path:
  """Returns where a save that is not committed lies: on disk in a folder that is renamed later."""
  beside = [path for path in folder.iterdir() if path.name.startswith(f"{step}.")]
  return beside[0] if beside else folder / str(step)


def _is_worth_logging(record: Any) -> bool:
  """Whether a record of absl's logger is none of the tracebacks that orbax logs of a damaged save."""
  return not (record.exc_info and isinstance(record.exc_info[1], DamagedSaveError))
